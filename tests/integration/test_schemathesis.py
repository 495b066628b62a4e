"""The OpenAPI document, tried by `schemathesis`: no request that it allows, or nearly allows, gets a 5xx, and every
answer is of a status, a type and a shape that the document names.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from seamount.core.database import Database
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine, say

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance"
)
# Without it nearly all requests end at a model that is not served.
HOOKS = """
import schemathesis

@schemathesis.hook
def map_body(context, body):
    return {**body, "model": "fake"} if isinstance(body, dict) and "model" in body else body
"""


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    with closing(open_state(str(tmp_path / "state.db"))) as opened:
        yield opened


async def test_every_answer_is_as_the_document_says(tmp_path: Path, state: Database, serve):
    (tmp_path / "hooks.py").write_text(HOOKS)
    running = await serve(FakeEngine(say("hello")), state=state)
    process = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{running.url}/openapi.json"),
        *("--url", running.url, "--checks", CHECKS, "--phases", "coverage,fuzzing"),
        *("--max-examples", "5", "--seed", "1", "--continue-on-failure", "--no-color"),
        cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    told = out.decode()
    assert process.returncode == 0, told[-6000:]
    assert "Stateful (disabled)" in told and "generated," in told, told[-6000:]
