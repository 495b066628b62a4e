"""Files and batches with the official client: at a real server, over a real database, and after a kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from seamount.cli.wire import make_access
from seamount.core.database import Database
from seamount.core.identity import Principal
from seamount.core.settings import EngineConfig
from seamount.core.state import open_state
from seamount.engine.client import WorkerEngine
from seamount.engine.fake import FakeEngine, say
from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder
from seamount.security.keys import ApiKeys

ENDED = ("completed", "failed", "expired", "cancelled")
CHAT = "/v1/chat/completions"


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    database = open_state(str(tmp_path / "state.db"))
    yield database
    database.close()


def client(url: str, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def as_line(custom_id: str, url: str = CHAT, **body: object) -> dict[str, Any]:
    content = {"messages": [{"role": "user", "content": custom_id}]} if url == CHAT else {"prompt": custom_id}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "fake", **content, **body}}


def as_file(*lines: object) -> tuple[str, io.BytesIO]:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    return "input.jsonl", io.BytesIO("\n".join(texts).encode())


async def begin(api: openai.AsyncOpenAI, *lines: object, endpoint: str = CHAT, **other: Any) -> Batch:
    file = await api.files.create(file=as_file(*lines), purpose="batch")
    return await api.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **other)


async def ended(api: openai.AsyncOpenAI, batch: Batch, is_so: Callable[[Batch], bool] | None = None) -> Batch:
    """Return the batch when it has ended, or when it is as asked."""
    async with asyncio.timeout(60):
        while not (is_so(batch) if is_so else batch.status in ENDED):
            await asyncio.sleep(0.01)
            batch = await api.batches.retrieve(batch.id)
    return batch


async def lines_of(api: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in (await api.files.content(file_id)).text.splitlines()]


async def test_the_client_sends_lists_reads_and_deletes_files(state, serve):
    running = await serve(FakeEngine(), state=state)
    async with client(running.url) as api:
        name, content = as_file(as_line("一"))
        made = await api.files.create(
            file=(name, content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert (made.filename, made.purpose, made.status) == ("input.jsonl", "batch", "processed")
        assert made.expires_at == made.created_at + 3600
        assert made.bytes == len(content.getvalue())
        others = [await api.files.create(file=as_file(number), purpose="batch") for number in range(4)]
        every = [made, *others]
        assert [file.id async for file in api.files.list(limit=2)] == [file.id for file in every[::-1]]
        assert [file.id async for file in api.files.list(order="asc", purpose="batch")] == [file.id for file in every]
        assert await api.files.retrieve(made.id) == made
        assert (await api.files.content(made.id)).content == content.getvalue()
        assert (await api.files.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await api.files.retrieve(made.id)
        with pytest.raises(openai.BadRequestError) as caught:
            await api.files.create(file=as_file(1), purpose="fine-tune")
        assert caught.value.param == "purpose"


async def test_a_batch_from_its_file_to_its_answers(state, serve):
    running = await serve(FakeEngine(say("<think>hm</think>Ja, 一."), num_cached_tokens=3), state=state)
    async with client(running.url) as api:
        batch = await begin(
            api, as_line("a"), as_line("b", n=2), "", as_line("c", temperature=9000),
            metadata={"Zweck": "Prüfung"}, output_expires_after={"anchor": "created_at", "seconds": 3600},
        )  # fmt: skip
        assert (batch.status, batch.object, batch.completion_window) == ("validating", "batch", "24h")
        assert batch.expires_at == batch.created_at + 86_400
        done = await ended(api, batch)
        assert (done.status, done.errors, done.metadata) == ("completed", None, {"Zweck": "Prüfung"})
        counts = done.request_counts
        assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
        found = await lines_of(api, done.output_file_id)
        assert [line["custom_id"] for line in found] == ["a", "b"]
        message = found[0]["response"]["body"]["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("Ja, 一.", "hm")
        assert len(found[1]["response"]["body"]["choices"]) == 2
        (error,) = await lines_of(api, done.error_file_id)
        assert (error["custom_id"], error["response"]["status_code"]) == ("c", 400)
        assert error["response"]["body"]["error"]["param"] == "temperature"
        answers = [line["response"]["body"]["usage"] for line in found]
        assert done.usage.input_tokens == sum(usage["prompt_tokens"] for usage in answers) > 0
        assert done.usage.output_tokens == sum(usage["completion_tokens"] for usage in answers)
        assert done.usage.total_tokens == sum(usage["total_tokens"] for usage in answers)
        thoughts = sum(usage["completion_tokens_details"]["reasoning_tokens"] for usage in answers)
        assert done.usage.output_tokens_details.reasoning_tokens == thoughts > 0
        assert done.usage.input_tokens_details.cached_tokens == 2 * 3
        output = await api.files.retrieve(done.output_file_id)
        assert (output.purpose, output.expires_at) == ("batch_output", output.created_at + 3600)
        assert output.bytes == len((await api.files.content(output.id)).content)
        made = {file.id async for file in api.files.list(purpose="batch_output", order="asc")}
        assert made == {done.output_file_id, done.error_file_id}
        text = await begin(api, as_line("d", "/v1/completions"), endpoint="/v1/completions")
        assert (await ended(api, text)).request_counts.completed == 1
        assert [one.id async for one in api.batches.list(limit=1)] == [text.id, batch.id]


async def test_bad_lines_fail_a_batch_and_each_is_told(state, serve):
    running = await serve(FakeEngine(), state=state)
    async with client(running.url) as api:
        batch = await begin(
            api, as_line("a"), "{", as_line("a"), as_line("b", "/v1/completions"), as_line("c", stream=True),
            as_line("d", model="gpt"),
        )  # fmt: skip
        failed = await ended(api, batch)
        assert (failed.status, failed.output_file_id, failed.error_file_id) == ("failed", None, None)
        assert [(error.line, error.code) for error in failed.errors.data] == [
            (2, "invalid_json_line"),
            (3, "duplicate_custom_id"),
            (4, "invalid_url"),
            (5, "unsupported_parameter"),
            (6, "model_not_found"),
        ]
        with pytest.raises(openai.BadRequestError):
            await api.batches.cancel(batch.id)
        output = (await api.files.create(file=as_file(as_line("x")), purpose="batch")).id
        for wrong in (
            {"endpoint": "/v1/responses"}, {"completion_window": "1h"}, {"input_file_id": "file-0"},
            {"metadata": {"k": "v" * 513}}, {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
        ):  # fmt: skip
            asked = {"input_file_id": output, "endpoint": CHAT, "completion_window": "24h", **wrong}
            with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
                await api.batches.create(**asked)


async def test_another_tenants_files_and_batches_do_not_exist(state, serve):
    keys = ApiKeys(state)
    keys.add_first_administrator(tenant="admin", label="")
    bank, _ = keys.add(Principal(key_id=None, tenant="bank"))
    club, _ = keys.add(Principal(key_id=None, tenant="club"))
    narrow, _ = keys.add(Principal(key_id=None, tenant="bank", routes=("/v1/files", "/v1/batches")))
    other, _ = keys.add(Principal(key_id=None, tenant="bank", models=("other",)))
    running = await serve(FakeEngine(say("Ja.")), access=make_access(state), state=state)
    async with client(running.url, bank) as api, client(running.url, club) as stranger:
        batch = await ended(api, await begin(api, as_line("a")))
        assert batch.status == "completed"
        for file_id in (batch.input_file_id, batch.output_file_id):
            for ask in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
                with pytest.raises(openai.NotFoundError) as refused:
                    await ask(file_id)
                with pytest.raises(openai.NotFoundError) as unknown:
                    await ask("file-" + "0" * 31)
                assert refused.value.body == unknown.value.body
        for ask in (stranger.batches.retrieve, stranger.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await ask(batch.id)
        with pytest.raises(openai.NotFoundError):
            await stranger.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
        assert [file.id async for file in stranger.files.list()] == []
        assert [one.id async for one in stranger.batches.list()] == []
    for key, code in ((narrow, "route_not_permitted"), (other, "model_not_permitted")):
        async with client(running.url, key) as api:
            with pytest.raises(openai.PermissionDeniedError) as caught:
                await api.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
            assert caught.value.code == code


async def test_too_large_a_file_is_refused_and_leaves_nothing(state, serve):
    running = await serve(FakeEngine(), state=state, max_file_bytes=100_000, max_body_bytes=2048)
    async with client(running.url) as api:
        for size in (100_001, 150_000):
            with pytest.raises(openai.APIStatusError) as caught:
                await api.files.create(file=("f", b'"x"\n' * (size // 4 + 1)), purpose="batch")
            assert caught.value.status_code == 413
        assert [file.id async for file in api.files.list()] == []
        whole = await api.files.create(file=("f", b'"x"\n' * 25_000), purpose="batch")
        assert whole.bytes == 100_000


async def test_an_upload_that_breaks_off_leaves_nothing(state, serve):
    running = await serve(FakeEngine(), state=state)
    head = "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    part = '--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
    _, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(f"{head}Content-Length: 9000000\r\n\r\n{part}".encode() + b'"x"\n' * 1_000_000)
    await writer.drain()
    count = "SELECT COUNT(*) FROM file_chunks"
    async with asyncio.timeout(20):
        while not state.read(lambda run: run(count))[0][0]:
            await asyncio.sleep(0.01)
        async with client(running.url) as api:
            assert [file.id async for file in api.files.list()] == []
        writer.close()
        while state.read(lambda run: run(count))[0][0] or state.read(lambda run: run("SELECT id FROM files")):
            await asyncio.sleep(0.01)
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


SERVER = """
import asyncio, sys
from contextlib import aclosing
from seamount.core.settings import ServerConfig
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.app import create_app
from seamount.server.batches import runner
from seamount.server.serve import run_server

runner.LEASE_S, runner.LOOK_S = 1.0, 0.1
num_free = int(sys.argv[2])

class Held(FakeEngine):
    async def generate(self, request):
        global num_free
        num_free -= 1
        if num_free < 0:
            await asyncio.Event().wait()
        print("begins", bytes(token for token in request.prompt_token_ids if token < 256).decode().strip(), flush=True)
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk

config = ServerConfig(port=0, drain_timeout_s=0)
state = open_state(sys.argv[1])
app = create_app(Held(), ByteEncoder(), config, None, state)
run_server(app, config, lambda url: print(url, flush=True))
state.close()
"""


@contextlib.asynccontextmanager
async def process(database: Path, num_free: int = 10**9) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run a server whose engine answers so many lines and holds the rest; yield its process and its URL."""
    made = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, str(database), str(num_free), stdout=subprocess.PIPE
    )
    try:
        assert made.stdout is not None
        yield made, (await made.stdout.readline()).decode().strip()
    finally:
        if made.returncode is None:
            made.kill()
        await made.wait()


async def test_a_batch_outlives_kill_9(tmp_path):
    names = [f"line {number:02}" for number in range(40)]
    lines = [as_line(name, "/v1/completions", max_tokens=100) for name in names]
    async with process(tmp_path / "state.db", 15) as (server, url), client(url) as api:
        batch = await begin(api, *lines, endpoint="/v1/completions")
        before = await ended(api, batch, lambda one: one.request_counts.completed >= 5)
        assert before.request_counts.completed < 40
        server.kill()
        await server.wait()
    async with process(tmp_path / "state.db") as (server, url), client(url) as api:
        done = await ended(api, await api.batches.retrieve(batch.id))
        counts = done.request_counts
        assert (done.status, counts.total, counts.completed, counts.failed) == ("completed", 40, 40, 0)
        found = await lines_of(api, done.output_file_id)
        assert [line["custom_id"] for line in found] == names
        # Whatever was answered again, what counts is what is in the file.
        answers = [line["response"]["body"]["usage"] for line in found]
        assert done.usage.input_tokens == sum(usage["prompt_tokens"] for usage in answers)
        assert done.usage.output_tokens == sum(usage["completion_tokens"] for usage in answers)
        assert server.stdout is not None
        server.kill()
        begun = (await server.stdout.read()).decode().count("begins ")
        assert begun <= 40 - before.request_counts.completed


async def test_the_embedded_model_answers_a_batch_as_it_answers_anybody(state, serve):
    engine = WorkerEngine(EngineConfig(model="seamount-tiny", num_threads=1))
    running = await serve(engine, PromptEncoder.from_folder(locate_model("seamount-tiny")), state=state)
    asked = {"model": "seamount-tiny", "temperature": 0, "max_tokens": 30}
    questions = ["What is 2+2?", "Hello!", "What is the capital of France?", "Count to three."]
    async with client(running.url) as api:
        batch = await begin(api, *(as_line(question, **asked) for question in questions))
        done = await ended(api, batch)
        assert done.request_counts.completed == 4
        for question, line in zip(questions, await lines_of(api, done.output_file_id), strict=True):
            direct = await api.chat.completions.create(messages=[{"role": "user", "content": question}], **asked)
            assert line["custom_id"] == question
            assert line["response"]["body"]["choices"][0]["message"]["content"] == direct.choices[0].message.content


async def test_metrics_count_waiting_lines_apart(state, serve):
    running = await serve(FakeEngine(), state=state)
    async with httpx.AsyncClient(base_url=running.url) as http:
        text = (await http.get("/metrics")).text
    assert 'seamount:admission_queue_requests{engine="0",model_name="fake",priority="batch"} 0.0' in text
