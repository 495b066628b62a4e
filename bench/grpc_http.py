"""Measure gRPC beside HTTP: the same short chats, at the same server, with the same work behind them.

    python bench/grpc_http.py                                 requests/s, latency and the server's CPU time per request
    python bench/grpc_http.py --engine fake --profile http    where the server's time goes, by package

Three engines: `fake` answers at once, so that what is measured is the protocol and the server round it; `tiny` is the
embedded model in its worker process; behind `none` there is no server at all, only uvicorn and gRPC's library, which
answer from memory: what the protocols cost by themselves. The server and each client have a process of their own.
Rounds are interleaved (every way once, then all again), so that what else the machine does hits all of them; medians
are printed. Four ways: `http`, a client of few instructions that keeps its connections; `httpx`, a usual one; `grpc`,
the library's own; and `inside`, no protocol: the same requests checked and answered in the server's own process.
The server's CPU time per request is the figure that no client's own cost is part of. It never fails on a number.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil

if TYPE_CHECKING:
    from fastapi import FastAPI

    from seamount.core.settings import ServerConfig

PATH = "/v1/chat/completions"
WAYS = ("http", "httpx", "grpc", "inside")
ENGINES = ("none", "fake", "tiny")
Ask = Callable[[], Awaitable[None]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, action="append", help="default: all")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream", action="store_true", help="stream the answers")
    parser.add_argument("--profile", choices=WAYS[:3], help="profile the server under one way instead")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--as-server", help=argparse.SUPPRESS)
    parser.add_argument("--as-client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_server:
        serve(args.as_server, args.profile)
    elif args.as_client:
        print(json.dumps(run_client(**json.loads(args.as_client))))
    else:
        rows = [row for engine in args.engine or ENGINES for row in measure(engine, args)]
        if args.json:
            print(json.dumps(rows, indent=1))


# The server's process


def serve(engine_name: str, profile: str | None) -> None:
    """Serve until the standard input ends; print where."""
    with asyncio.Runner(loop_factory=_uvloop) as runner:
        if profile is None:
            runner.run(_serve(engine_name))
            return
        profiler = cProfile.Profile()
        profiler.runcall(runner.run, _serve(engine_name))
    _print_shares(profiler)


async def _serve(engine_name: str) -> None:
    if engine_name == "none":
        await _serve_nothing()
        return
    from seamount.server.serve import HttpServer

    app, config = _app(engine_name)

    def ready(url: str) -> None:
        print(json.dumps({"http": url, "grpc": app.state.grpc_address}), flush=True)

    server = HttpServer(app, config, ready)
    task = asyncio.create_task(server.serve())
    await asyncio.to_thread(sys.stdin.read)
    server.stop()
    await task


def _app(engine_name: str) -> tuple[FastAPI, ServerConfig]:
    from seamount.core.settings import EngineConfig, ServerConfig
    from seamount.engine.client import WorkerEngine
    from seamount.engine.fake import FakeEngine, say
    from seamount.engine.fake_encoder import ByteEncoder
    from seamount.models.locate import locate_model
    from seamount.models.prompt import PromptEncoder
    from seamount.server.app import create_app

    config = ServerConfig(port=0, grpc_port=0, served_model_name="bench", drain_timeout_s=1)
    if engine_name == "fake":
        return create_app(FakeEngine(say("x" * 64)), ByteEncoder(), config), config
    encoder = PromptEncoder.from_folder(locate_model("seamount-tiny"))
    return create_app(WorkerEngine(EngineConfig()), encoder, config), config


async def _serve_nothing() -> None:
    """Answer every request with the same bytes, as large as a short answer's."""
    import grpc
    import uvicorn

    from seamount.server.door.connections import BoundedProtocol

    answer = b"x" * 450
    head = [(b"content-type", b"application/json"), (b"content-length", b"450")]

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": answer})

    async def handle(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return answer[:150]  # the same in protobuf's bytes

    handlers = {"Chat": grpc.unary_unary_rpc_method_handler(handle)}
    rpc = grpc.aio.server()
    rpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("seamount.v1.Seamount", handlers),))
    port = rpc.add_insecure_port("127.0.0.1:0")
    await rpc.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, http=BoundedProtocol, lifespan="off", log_config=None, access_log=False)
        http = uvicorn.Server(config)
        task = asyncio.create_task(http.serve([listener]))
        where = {"http": f"http://127.0.0.1:{listener.getsockname()[1]}", "grpc": f"127.0.0.1:{port}"}
        print(json.dumps(where), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        http.should_exit = True
        await task
    await rpc.stop(0)


def _uvloop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


def _print_shares(profiler: cProfile.Profile) -> None:
    """Print each package's share of the time that functions spent in themselves."""
    shares: dict[str, float] = {}
    for (file, _, name), (_, _, own_s, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        shares[_package(file, name)] = shares.get(_package(file, name), 0.0) + own_s
    # Waiting for something to happen is no work.
    total_s = sum(shares.values()) - shares.pop("waiting", 0.0)
    for package, own_s in sorted(shares.items(), key=lambda item: -item[1])[:24]:
        print(f"{package:40} {own_s:8.2f} s {own_s / total_s:6.1%}", file=sys.stderr)


def _package(file: str, name: str) -> str:
    if "uvloop" in name or name == "<built-in method select.epoll>" or "run_until_complete" in name:
        return "waiting"
    found = re.search(r"site-packages/([^/]+)(/[^/]+)?", file)
    if found:
        return found.group(1)
    found = re.search(r"seamount/(\w+/\w+)", file)
    if found:
        return f"seamount {found.group(1)}"
    found = re.search(r"lib/python[^/]+/([^/]+)", file)
    return f"python {found.group(1)}" if found else f"builtin {name[:40]}"


# A client's process


def run_client(way: str, where: str, concurrency: int, max_tokens: int, seconds: float, stream: bool) -> dict:
    """Return the requests per second and latencies in seconds of so many requests at once for so long."""
    with asyncio.Runner(loop_factory=_uvloop) as runner:
        return runner.run(_load(way, where, concurrency, max_tokens, seconds, stream))


async def _load(way: str, where: str, concurrency: int, max_tokens: int, seconds: float, stream: bool) -> dict:
    took: list[float] = []
    async with AsyncExitStack() as stack:
        connect = {"http": _raw, "httpx": _httpx, "grpc": _grpc, "inside": _inside}[way]
        asks = await stack.enter_async_context(connect(where, concurrency, max_tokens, stream))
        for ask in asks:  # connections are made, and the server is warm
            await ask()
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        end_s = begin_s + seconds

        async def work(ask: Ask) -> None:
            while (start_s := time.perf_counter()) < end_s:
                await ask()
                took.append(time.perf_counter() - start_s)

        await asyncio.gather(*(work(ask) for ask in asks))
        lasted_s, own_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    took.sort()
    return {
        "num": len(took) + concurrency,
        "requests_per_s": len(took) / lasted_s,
        "p50_s": took[len(took) // 2],
        "p95_s": took[int(len(took) * 0.95)],
        "own_ms": own_s / len(took) * 1e3,
    }


def _body(max_tokens: int, stream: bool) -> bytes:
    messages = [{"role": "user", "content": "What is 2+2?"}]
    fields = {"model": "bench", "messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return json.dumps({**fields, **more}).encode()


@asynccontextmanager
async def _raw(where: str, concurrency: int, max_tokens: int, stream: bool) -> AsyncIterator[list[Ask]]:
    """HTTP/1.1 with kept connections and no library: as little work in the client as can be."""
    host, _, port = where.removeprefix("http://").rpartition(":")
    body = _body(max_tokens, stream)
    head = f"POST {PATH} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    request = f"{head}\r\n\r\n".encode() + body
    writers = []

    async def connect() -> Ask:
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)

        async def ask() -> None:
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"answered with {answer[:40]!r}")
            if stream:
                await reader.readuntil(b"0\r\n\r\n")
            else:
                at = answer.index(b"content-length: ") + 16
                await reader.readexactly(int(answer[at : answer.index(b"\r", at)]))

        return ask

    try:
        yield [await connect() for _ in range(concurrency)]
    finally:
        for writer in writers:
            writer.close()


@asynccontextmanager
async def _httpx(where: str, concurrency: int, max_tokens: int, stream: bool) -> AsyncIterator[list[Ask]]:
    body, headers = _body(max_tokens, stream), {"content-type": "application/json"}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=where, limits=limits, timeout=60) as client:

        async def ask() -> None:
            (await client.post(PATH, content=body, headers=headers)).raise_for_status()

        yield [ask] * concurrency


@asynccontextmanager
async def _grpc(where: str, concurrency: int, max_tokens: int, stream: bool) -> AsyncIterator[list[Ask]]:
    import grpc

    from seamount.server.rpc import seamount_pb2 as pb

    messages = [pb.Message(role=pb.ROLE_USER, content="What is 2+2?")]
    request = pb.ChatRequest(model="bench", messages=messages, max_tokens=max_tokens, temperature=0, ignore_eos=True)
    async with grpc.aio.insecure_channel(where) as channel:
        route, encode = "/seamount.v1.Seamount/", pb.ChatRequest.SerializeToString
        whole = channel.unary_unary(f"{route}Chat", encode)  # not read, as the other clients do not
        chunks = channel.unary_stream(f"{route}StreamChat", encode)

        async def ask() -> None:
            if stream:
                async for _ in chunks(request):
                    pass
            else:
                await whole(request)

        yield [ask] * concurrency


@asynccontextmanager
async def _inside(where: str, concurrency: int, max_tokens: int, stream: bool) -> AsyncIterator[list[Ask]]:
    """No protocol: what every way has in common, from the check of the parsed body to the answer's objects."""
    from seamount.server.chat.answer import prepare_chat
    from seamount.server.wire.chat import ChatRequest

    app, _ = _app(where)
    fields = json.loads(_body(max_tokens, stream))
    service = app.state.service
    async with app.router.lifespan_context(app):
        await service.started

        async def ask() -> None:
            answer = await prepare_chat(service, ChatRequest.model_validate(fields))
            if stream:
                async for _ in answer.chunks():
                    pass
            else:
                await answer.whole()

        yield [ask] * concurrency


# The one that measures


def measure(engine: str, args: argparse.Namespace) -> list[dict]:
    """Measure all ways at one engine; print a line for each, and return the numbers."""
    command = [sys.executable, __file__, "--as-server", engine]
    if args.profile:
        command += ["--profile", args.profile]
    rows = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        where = {**json.loads(process.stdout.readline()), "inside": engine}
        server = psutil.Process(process.pid)
        if args.profile:
            _one(server, where, args.profile, args.concurrency[-1], args.max_tokens[-1], args)
        else:
            for max_tokens in args.max_tokens:
                for concurrency in args.concurrency:
                    rows += _compare(server, where, engine, concurrency, max_tokens, args)
        process.stdin.close()
    return rows


def _compare(
    server: psutil.Process, where: dict, engine: str, concurrency: int, max_tokens: int, args: argparse.Namespace
) -> list[dict]:
    ways = [way for way in WAYS if not (args.stream and way == "httpx") and not (engine == "none" and way == "inside")]
    found: dict[str, list[dict]] = {way: [] for way in ways}
    for number in range(args.rounds):
        for way in ways if number % 2 else reversed(ways):
            found[way].append(_one(server, where, way, concurrency, max_tokens, args))
    rows = []
    base = statistics.median(one["requests_per_s"] for one in found["http"])
    for way, ones in found.items():
        row = {"engine": engine, "way": way, "concurrency": concurrency, "max_tokens": max_tokens}
        row |= {name: statistics.median(one[name] for one in ones) for name in ones[0]}
        rows.append(row)
        print(
            f"{engine:5} {max_tokens:3} tokens, {concurrency:3} at once, {way:6} {row['requests_per_s']:8.0f} /s "
            f"({row['requests_per_s'] / base:4.2f}x)  p50 {row['p50_s'] * 1e3:7.2f} ms  p95 {row['p95_s'] * 1e3:7.2f} "
            f"ms  server {row['server_ms']:6.3f} ms CPU, worker {row['worker_ms']:6.3f}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def _one(
    server: psutil.Process, where: dict, way: str, concurrency: int, max_tokens: int, args: argparse.Namespace
) -> dict:
    before = _cpu_s(server)
    plan = {
        "way": way,
        "where": where.get(way, where["http"]),
        "concurrency": concurrency,
        "max_tokens": max_tokens,
        "seconds": args.seconds,
        "stream": args.stream,
    }
    command = [sys.executable, str(Path(__file__)), "--as-client", json.dumps(plan)]
    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    after = _cpu_s(server)
    num = result.pop("num")
    own_ms = result.pop("own_ms")
    result["server_ms"] = own_ms if way == "inside" else (after[0] - before[0]) / num * 1e3
    result["worker_ms"] = (after[1] - before[1]) / num * 1e3
    return result


def _cpu_s(server: psutil.Process) -> tuple[float, float]:
    """Return the CPU seconds of the server's process, and of its children."""
    children = sum(sum(child.cpu_times()[:2]) for child in server.children(recursive=True))
    return sum(server.cpu_times()[:2]), children


if __name__ == "__main__":
    main()
