"""What a real server logs when it is sent a canary in every place: nothing of it, at the most talkative level."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute

from seamount.cli.wire import make_access
from seamount.core.database import Database
from seamount.core.identity import Principal
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine, say
from seamount.security.keys import ApiKeys
from seamount.server.door.access import RULES, Rule
from seamount.server.telemetry.logs import set_up_logging

CANARY = "canary7f3a"
WRONG_KEY = "sm-canary7f3a-" + "b" * 43
TOOL = {"type": "function", "function": {"name": CANARY, "description": CANARY, "parameters": {"title": CANARY}}}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    database = open_state(str(tmp_path / "state.db"))
    yield database
    database.close()


@dataclass
class Log:
    """All that the process logs."""

    form: str
    stream: io.StringIO


@pytest.fixture(params=["json", "text"])
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    """The log at its most talkative."""
    root, own = logging.getLogger(), logging.getLogger("seamount")
    before = (root.level, own.level, list(root.handlers))
    stream = io.StringIO()
    set_up_logging(request.param, "debug", stream)
    yield Log(request.param, stream)
    root.setLevel(before[0])
    own.setLevel(before[1])
    root.handlers[:] = before[2]


def bodies() -> list[dict[str, object]]:
    """Bodies that hold the canary wherever a route may look: right ones, and ones that it must refuse."""
    chat = {"model": "fake", "messages": [{"role": "user", "content": CANARY}]}
    return [
        chat,
        {**chat, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": CANARY}}},
        {**chat, "stop": [CANARY], "user": CANARY, "metadata": {CANARY: CANARY}},
        {**chat, "stream": True},
        {**chat, CANARY: CANARY},
        {**chat, "model": CANARY},
        {**chat, "messages": [{"role": CANARY, "content": CANARY}]},
        {**chat, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": CANARY}}]}]},
        {**chat, "response_format": {"type": "json_schema", "json_schema": {"name": CANARY, "schema": {CANARY: 1}}}},
        {**chat, "logit_bias": {CANARY: 1}},
        {**chat, "chat_template": "{{ '" + CANARY + "' }}"},
        {**chat, "chat_template_kwargs": {CANARY: CANARY}},
        {"model": "fake", "prompt": CANARY},
        {"model": "fake", "input": CANARY, "instructions": CANARY, "max_tokens": 5},
        {"model": "fake", "messages": chat["messages"], "system": CANARY, "max_tokens": 5},
        {"tenant": CANARY, "label": CANARY, "routes": [CANARY]},
        {"input_file_id": CANARY, "endpoint": CANARY, "completion_window": CANARY},
    ]


async def storm(url: str, key: str, routes: list[tuple[str, str]]) -> int:
    """Send the canary to every route in every place; return how many requests that were."""
    mine = {"authorization": f"Bearer {key}"}
    odd = {
        "x-canary": CANARY,
        "user-agent": CANARY,
        "traceparent": CANARY,
        "x-request-id": f"{CANARY} {CANARY}",
        "accept-language": CANARY,
        "x-request-timeout": CANARY,
    }
    count = 0
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        for method, path in routes:
            sent = [
                http.request(method, f"{path}?q={CANARY}", headers=mine),
                http.request(method, path, headers={**mine, **odd}),
                http.request(method, path, headers={"authorization": f"Bearer {WRONG_KEY}"}),
                http.request(method, path, headers={"x-api-key": CANARY}),
                http.request(method, path, headers={"authorization": f"Basic {CANARY}"}),
                http.request(CANARY.upper(), path, headers=mine),
                http.request(method, path, content=f'{{"{CANARY}": ', headers=mine),
                http.request(method, path, content=CANARY, headers={**mine, "content-type": CANARY}),
                http.request(method, path, content=b"\xff" + CANARY.encode(), headers=mine),
                http.request(
                    method,
                    path,
                    files={"file": (f"{CANARY}.jsonl", CANARY.encode())},
                    data={"purpose": CANARY},
                    headers=mine,
                ),
            ]
            if method == "POST":
                sent += [http.post(path, json=body, headers=mine) for body in bodies()]
            for one in sent:
                assert (await one).status_code < 600
                count += 1
        for path in (f"/{CANARY}", f"/v1/{CANARY}/..", f"/console/{CANARY}.js", f"/console/%0a{CANARY}"):
            await http.get(path, headers=mine)
            count += 1
    return count


async def test_no_line_and_no_metric_holds_what_was_sent_or_a_key(state, log, serve):
    keys = ApiKeys(state)
    admin, _ = keys.add_first_administrator(tenant="admin", label="")
    clerk, clerk_key = keys.add(Principal(key_id=None, tenant="bank"))

    def reply(request: object, index: int) -> object:
        if next(turns) % 5 == 0:  # an unforeseen failure, which quotes what it was given
            raise ValueError(f"cannot say {CANARY}")
        return say(CANARY)(request, index)

    turns = iter(range(1, 10**9))
    running = await serve(FakeEngine(reply), access=make_access(state), state=state)
    routes = []
    for route in running.server._server.config.app.routes:
        if isinstance(route, APIRoute):
            path = re.sub(r"\{[^}]*\}", CANARY, route.path)
            routes += [(method, path) for method in sorted(route.methods - {"HEAD"})]
    assert len(routes) >= 8
    count = await storm(running.url, clerk, routes)
    count += await storm(running.url, admin, routes)
    async with httpx.AsyncClient(base_url=running.url, headers={"authorization": f"Bearer {admin}"}) as http:
        metrics = (await http.get("/metrics")).text
    running.server.stop()
    await running.task
    text = log.stream.getvalue()
    secrets = [key.rpartition("-")[2] for key in (admin, clerk, WRONG_KEY)]
    for hidden in (CANARY, CANARY.upper(), *secrets):
        assert [line for line in text.splitlines() if hidden in line] == []
        assert [line for line in metrics.splitlines() if hidden in line] == []
    assert text.count("ValueError") > 0, "unforeseen failures are logged, by kind and place"
    assert text.count("\n") == len(text.splitlines())
    assert clerk_key.id in text, "the public id is there, to find who it was"
    if log.form == "json":
        lines = [json.loads(line) for line in text.splitlines()]
        told = [line for line in lines if line["message"] == "request"]
        assert len(told) == count + 1
        assert all(line["request_id"] and line["status"] and line["method"] for line in told)
        chats = [line for line in told if line.get("completion_tokens") and line["tenant"] == "bank"]
        assert chats and all(line["prompt_tokens"] > 0 for line in chats)
        keyed = {path for path, rule in RULES.items() if rule is Rule.KEY and path.startswith("/v1/")}
        assert {line.get("route") for line in told} >= keyed


def test_the_command_logs_json_lines_and_readies_for_programs(small_checkpoint: Path, tmp_path: Path):
    words = ["serve", str(small_checkpoint), "--port", "0", "--log-format", "json", "--log-level", "debug"]
    words += ["--database", str(tmp_path / "state.db"), "--num-threads", "1", "--max-model-len", "256"]
    process = subprocess.Popen(
        [sys.executable, "-m", "seamount", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    logged: list[str] = []
    reader = threading.Thread(target=lambda: logged.extend(process.stderr))
    reader.start()
    try:
        url = next(found[1] for line in process.stdout if (found := re.search(r"API base\s+(\S+)/v1", line)))
        body = {"model": small_checkpoint.name, "prompt": CANARY, "max_tokens": 3}
        asked = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", "x-request-id": "r-9"},
        )
        with urllib.request.urlopen(asked) as answer:
            usage = json.load(answer)["usage"]
    finally:
        process.terminate()
        process.stdout.read()
        reader.join()  # not `communicate`, which would read the other half of the log
        assert process.wait() == 0
        process.stdout.close()
        process.stderr.close()
    lines = [json.loads(line) for line in logged if line.startswith("{")]
    told = next(line for line in lines if line.get("request_id") == "r-9")
    assert (told["status"], told["route"], told["level"]) == (200, "/v1/completions", "info")
    assert (told["prompt_tokens"], told["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert not [line for line in logged if CANARY in line]
