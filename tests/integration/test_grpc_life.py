"""gRPC calls that end early, servers that come and go, clients who do not read, and TLS."""

from __future__ import annotations

import asyncio
import re
import ssl
import subprocess
import sys
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from seamount.core.settings import EngineConfig
from seamount.engine.client import WorkerEngine
from seamount.engine.fake import FAKE_FACTS, FakeEngine, say
from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder
from seamount.security.certificates import CertificateFiles, make_certificates
from seamount.server.admission import call as admission_call

OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Hold:
    """Lets `free` tokens pass; the next one waits. `reached` tells when, and `go` lets all pass."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.reached = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self) -> None:
        self.free -= 1
        if self.free < 0:
            self.reached.set()
            await self.go.wait()


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def channel_to(running, *options) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(running.grpc_address, options=(OWN_CONNECTION, *options))


def chat(pb, **fields):
    return pb.ChatRequest(**{"model": "fake", "messages": [pb.Message(role=pb.ROLE_USER, content="hi")], **fields})


async def gave_all_back(running, engine, num_requests: int = 1) -> None:
    await until(lambda: len(engine.aborted) == num_requests)
    stats = await engine.stats()
    assert (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks)
    await until(lambda: not running.service.num_active)
    assert running.service.admission.load().num_admitted == 0


@pytest.mark.parametrize("tokens_before", [0, 3], ids=["before-the-first-token", "midway"])
@pytest.mark.parametrize("name", ["Chat", "StreamChat", "Complete", "StreamComplete"])
async def test_a_call_that_is_cancelled_stops_computing(serve, stubs, name, tokens_before):
    hold = Hold(tokens_before)
    engine = FakeEngine(say("abcdef"), pause=hold)
    running = await serve(engine, grpc_port=0)
    prompts = [stubs.pb.Prompt(text="ab"), stubs.pb.Prompt(text="cd")]
    texts = stubs.pb.CompletionRequest(model="fake", prompt=prompts)
    async with channel_to(running) as channel:
        call = getattr(stubs.grpc.SeamountStub(channel), name)(texts if "Complete" in name else chat(stubs.pb))
        await hold.reached.wait()
        call.cancel()
        await gave_all_back(running, engine, num_requests=2 if "Complete" in name else 1)


async def test_a_client_that_vanishes_stops_computing(serve, stubs):
    hold = Hold(2)
    engine = FakeEngine(say("abcdef"), pause=hold)
    running = await serve(engine, grpc_port=0)
    channel = channel_to(running)
    call = stubs.grpc.SeamountStub(channel).StreamChat(chat(stubs.pb))
    await call.read()
    await hold.reached.wait()
    await channel.close()
    await gave_all_back(running, engine)


@pytest.mark.parametrize("name", ["Chat", "StreamChat"])
async def test_a_deadline_ends_the_work(serve, stubs, name):
    hold = Hold(1)
    engine = FakeEngine(say("abcdef"), pause=hold)
    running = await serve(engine, grpc_port=0)
    async with channel_to(running) as channel:
        call = getattr(stubs.grpc.SeamountStub(channel), name)(chat(stubs.pb), timeout=0.3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while True:
                await (call.read() if name == "StreamChat" else call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await gave_all_back(running, engine)


async def test_who_could_not_be_answered_in_time_is_told_so_at_once(serve, stubs):
    """Work that waits for its turn knows its deadline: it is not begun for nobody."""
    hold = Hold(0)
    engine = FakeEngine(say("ok"), pause=hold, facts=replace(FAKE_FACTS, max_num_seqs=1))
    running = await serve(engine, grpc_port=0)
    async with channel_to(running) as channel:
        stub = stubs.grpc.SeamountStub(channel)
        first = stub.Chat(chat(stubs.pb))
        await hold.reached.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Chat(chat(stubs.pb), timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: not running.service.admission.load().num_waiting[0])
        hold.go.set()
        assert (await first).choices
    assert engine.aborted == []


async def test_a_client_that_stops_reading_is_given_up(serve, stubs, monkeypatch):
    monkeypatch.setattr(admission_call, "STALL_S", 0.2)
    engine = FakeEngine(lambda request, index: (65,) * 50_000, facts=replace(FAKE_FACTS, max_model_len=60_000))
    running = await serve(engine, grpc_port=0)
    small_window = ("grpc.http2.bdp_probe", 0)  # else the library takes megabytes that nobody reads
    async with channel_to(running, small_window) as channel:
        call = stubs.grpc.SeamountStub(channel).StreamChat(chat(stubs.pb, logprobs=True, top_logprobs=20))
        await call.read()
        await gave_all_back(running, engine)
        assert (await engine.stats()).num_generated_tokens < 50_000
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # who reads on after all is told
            while True:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.ABORTED


async def test_health_follows_the_server_and_a_drain_lets_streams_end(serve, stubs):
    hold = Hold(2)
    engine = FakeEngine(say("abcdef"), pause=hold)
    running = await serve(engine, grpc_port=0, drain_timeout_s=30)
    async with channel_to(running) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="seamount.v1.Seamount"))
        assert (await watch.read()).status == SERVING
        stub = stubs.grpc.SeamountStub(channel)
        call = stub.StreamChat(chat(stubs.pb))
        await call.read()
        await hold.reached.wait()
        running.server.stop()
        assert (await watch.read()).status == NOT_SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Chat(chat(stubs.pb))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(caught.value.trailing_metadata())["seamount-code"] == "draining"
        hold.go.set()
        while (chunk := await call.read()) is not grpc.aio.EOF:
            last = chunk
        assert last.usage.completion_tokens == 7
        assert await watch.read() is grpc.aio.EOF
        await running.task


async def test_what_outlasts_the_drain_is_told(serve, stubs):
    hold = Hold(2)
    running = await serve(FakeEngine(say("abcdef"), pause=hold), grpc_port=0, drain_timeout_s=0.2)
    async with channel_to(running) as channel:
        call = stubs.grpc.SeamountStub(channel).StreamChat(chat(stubs.pb))
        await hold.reached.wait()
        running.server.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await running.task


async def test_health_of_a_service_that_is_none(serve):
    running = await serve(FakeEngine(), grpc_port=0)
    async with channel_to(running) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest(service="nothing"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_a_real_worker_is_stopped_within_a_step_and_may_die_and_come_again(serve, stubs):
    engine = WorkerEngine(EngineConfig(model="seamount-tiny", num_threads=1))
    running = await serve(engine, PromptEncoder.from_folder(locate_model("seamount-tiny")), grpc_port=0)
    pb, name = stubs.pb, running.service.model_name()
    async with channel_to(running) as channel:
        stub = stubs.grpc.SeamountStub(channel)
        asked = chat(pb, model=name, max_tokens=1000, temperature=0, ignore_eos=True)
        call = stub.StreamChat(asked)
        await call.read()
        call.cancel()
        async with asyncio.timeout(30):
            while (stats := await engine.stats()).num_running or stats.num_free_blocks != stats.num_blocks:
                await asyncio.sleep(0.05)
        assert stats.num_generated_tokens < 1000
        broken = stub.StreamChat(asked)
        await broken.read()
        subprocess.run(["kill", "-9", str(running.service.facts().worker_pid)], check=True)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while True:
                await broken.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await stub.Chat(chat(pb, model=name, max_tokens=4))).usage.completion_tokens


async def test_the_command_serves_both_and_says_where(stubs, tmp_path):
    """Its worker and the sandbox of templates are begun while gRPC's threads run: nothing of that may show."""
    command = [sys.executable, "-m", "seamount", "serve", "--port", "0", "--grpc-port", "0", "--num-threads", "1"]
    with (tmp_path / "stderr").open("w+") as complaints:
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=complaints)
        shown = ""
        while "Ctrl-C" not in shown:
            line = (await process.stdout.readline()).decode()
            assert line, "it ended"
            shown += line
        (address,) = re.findall(r"gRPC +(\S+)\n", shown)
        pb = stubs.pb
        async with grpc.aio.insecure_channel(address, options=(OWN_CONNECTION,)) as channel:
            stub = stubs.grpc.SeamountStub(channel)
            answer = await stub.Chat(chat(pb, model="seamount-tiny", max_tokens=4))
            assert answer.usage.completion_tokens
        process.terminate()
        assert await process.wait() == 0
        complaints.seek(0)
        assert "fork" not in complaints.read()


def make(folder: Path) -> CertificateFiles:
    return make_certificates(folder, ("localhost", "127.0.0.1"), days=30, now=datetime.now(UTC))


async def shown(address: str, trust: ssl.SSLContext) -> tuple[bytes, str | None]:
    """Return the certificate that the server shows, in DER, and the version that was agreed."""
    host, _, port = address.rpartition(":")
    trust.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection(host, int(port), ssl=trust)
    connection = writer.get_extra_info("ssl_object")
    found = connection.getpeercert(binary_form=True), connection.version()
    writer.close()
    return found


def der(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text("ascii"))


async def test_tls_is_1_3_and_its_certificate_can_be_changed(serve, stubs, tmp_path):
    files = make(tmp_path)
    running = await serve(FakeEngine(say("Vier.")), grpc_port=0, tls_cert=files.cert, tls_key=files.key)
    credentials = grpc.ssl_channel_credentials(files.ca.read_bytes())
    async with grpc.aio.secure_channel(running.grpc_address, credentials, options=(OWN_CONNECTION,)) as channel:
        stub = stubs.grpc.SeamountStub(channel)
        assert (await stub.Chat(chat(stubs.pb))).choices[0].message.content == "Vier."
        first = der(files.cert)
        trust = ssl.create_default_context(cafile=files.ca)
        assert await shown(running.grpc_address, trust) == (first, "TLSv1.3")
        old = ssl.create_default_context(cafile=files.ca)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await shown(running.grpc_address, old)
        make(tmp_path)
        trust = ssl.create_default_context(cafile=files.ca)
        assert await shown(running.grpc_address, trust) == (der(files.cert), "TLSv1.3")
        assert der(files.cert) != first
        files.key.write_bytes(make(tmp_path / "other").key.read_bytes())  # not that of the certificate
        assert (await shown(running.grpc_address, trust))[0] == der(files.cert)
        assert (await stub.Chat(chat(stubs.pb))).choices  # the connection from before goes on
    async with channel_to(running) as plain:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stubs.grpc.SeamountStub(plain).Chat(chat(stubs.pb))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


CLIENT = """
import sys
import grpc, seamount_pb2 as pb, seamount_pb2_grpc as service

with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = service.SeamountStub(channel)
    asked = pb.ChatRequest(model="fake", messages=[pb.Message(role=pb.ROLE_USER, content="hi")])
    print("".join(choice.delta.content for chunk in stub.StreamChat(asked) for choice in chunk.choices))
"""


async def test_a_client_elsewhere_needs_nothing_but_the_proto(serve, stubs):
    running = await serve(FakeEngine(say("Vier.")), grpc_port=0)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CLIENT,
        running.grpc_address,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(Path(stubs.pb.__file__).parent)},
    )
    told, _ = await process.communicate()
    assert told.decode().strip() == "Vier."


async def test_http_and_grpc_share_one_queue(serve, stubs):
    """A place that a call over gRPC holds is taken for HTTP too."""
    hold = Hold(0)
    running = await serve(
        FakeEngine(say("ok"), pause=hold, facts=replace(FAKE_FACTS, max_num_seqs=1)), grpc_port=0, drain_timeout_s=20
    )
    async with channel_to(running) as channel, httpx.AsyncClient(base_url=running.url) as client:
        first = stubs.grpc.SeamountStub(channel).Chat(chat(stubs.pb))
        await hold.reached.wait()
        body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
        second = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await until(lambda: running.service.admission.load().num_waiting[0] == 1)
        hold.go.set()
        assert (await first).choices
        assert (await second).status_code == 200


async def test_unread_streams_are_closed_with_their_generators(serve, stubs):
    engine = FakeEngine(say("abcdef"))
    running = await serve(engine, grpc_port=0)
    async with channel_to(running) as channel:
        stub = stubs.grpc.SeamountStub(channel)
        calls = [stub.StreamChat(chat(stubs.pb)) for _ in range(50)]
        for call in calls[::2]:
            call.cancel()
        for call in calls[1::2]:
            async with aclosing(aiter(call)) as chunks:
                assert [chunk async for chunk in chunks][-1].usage.completion_tokens == 7
    await until(lambda: not running.service.num_active)
    stats = await engine.stats()
    assert (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks)


async def test_more_prompts_than_could_ever_be_taken_are_wrong_not_early(serve, stubs):
    running = await serve(FakeEngine(facts=replace(FAKE_FACTS, max_num_seqs=1)), grpc_port=0, max_waiting=1)
    request = stubs.pb.CompletionRequest(model="fake", prompt=[stubs.pb.Prompt(text="a")] * 3)
    async with channel_to(running) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stubs.grpc.SeamountStub(channel).Complete(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 2 such prompts" in caught.value.details()
