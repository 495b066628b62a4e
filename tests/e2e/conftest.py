"""A real Chromium against the real server, whose engine plays what each test writes on a stage.

Fixtures: `stage` (what the server answers, and what it was asked), `base_url`, `page` (opened and ready), `open_page`
(further pages and sizes), `serve_stage` (servers that ask for keys). Afterwards a test fails when its pages logged an
error or asked for anything elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from seamount.core.errors import EngineError, SeamountError
from seamount.core.requests import Chunk, Request
from seamount.core.settings import ServerConfig
from seamount.engine.fake import FakeEngine
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.app import create_app

MODEL = "seamount-test"
THINK_START, THINK_END = "<think>", "</think>"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Stage:
    """What the engine does next. One byte of the answer is one token, and so is the end of the reasoning.

    Set from the test's thread, read by the server's.

    Attributes:
        hold_after: tokens after which the answer waits for `go_on`.
        fail_after: tokens after which it fails with `failure`.
        requests: the bodies of the chat requests that arrived.
        gone: set when a client left before its answer was complete.
        cut: breaks every open connection, as a failing network would.
    """

    content: str = "Hello."
    reasoning: str = ""
    hold_after: int | None = None
    fail_after: int | None = None
    failure: SeamountError = field(default_factory=lambda: EngineError("The engine failed."))
    requests: list[dict[str, Any]] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)
    cut: Callable[[], None] = lambda: None

    def say(self, content: str, reasoning: str = "", **how: Any) -> None:
        """Answer with this from now on; `how` sets other fields, which else go back to their defaults."""
        fresh = Stage(content, reasoning, **how)
        for name in ("content", "reasoning", "hold_after", "fail_after", "failure"):
            setattr(self, name, getattr(fresh, name))
        self.go_on.clear()
        self.gone.clear()


class StagedEngine(FakeEngine):
    """Plays each request by the stage as it is when the request arrives."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        stage, encoder = self._stage, ByteEncoder()
        in_reasoning = encoder.token_text(request.prompt_token_ids[-1]) == THINK_START
        opening = "" if in_reasoning else THINK_START * bool(stage.reasoning)
        text = opening + stage.reasoning + THINK_END * (in_reasoning or bool(stage.reasoning)) + stage.content
        # The marks that only the prompt's form asks for are not counted.
        uncounted = len(opening) > 0 or (in_reasoning and not stage.reasoning)
        num_tokens = 0

        async def pause() -> None:
            nonlocal num_tokens
            while stage.hold_after == num_tokens - uncounted and not stage.go_on.is_set():
                await asyncio.sleep(0.01)
            num_tokens += 1

        def reply(request: Request, index: int) -> Sequence[int]:
            return encoder.encode_text(text, add_special_tokens=False)

        fail_after = stage.fail_after and stage.fail_after + uncounted
        engine = FakeEngine(reply, pause=pause, fail_after_tokens=fail_after, failure=stage.failure)
        await engine.start()
        try:
            async with aclosing(engine.generate(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            if engine.aborted:
                stage.gone.set()


def _recording(app: Any, stage: Stage) -> Any:
    """The app, with the bodies of chat requests noted on the stage."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        body = b""

        async def receive_on() -> Any:
            nonlocal body
            message = await receive()
            if message["type"] == "http.request":
                body += message.get("body", b"")
                if not message.get("more_body"):
                    stage.requests.append(json.loads(body))
            return message

        chat = scope["type"] == "http" and scope["path"] == "/v1/chat/completions"
        await app(scope, receive_on if chat else receive, send)

    return call


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def base_url(stage: Stage, serve_stage: Callable[..., str]) -> str:
    """The address of a server that plays `stage` and asks for no key."""
    return serve_stage()


@pytest.fixture
def serve_stage(stage: Stage) -> Iterator[Callable[..., str]]:
    """A function that serves `stage`, with what `create_app` takes beside, and returns the address."""
    with ExitStack() as stack:
        yield lambda **parts: stack.enter_context(_serving(stage, **parts))


@contextmanager
def _serving(stage: Stage, **parts: Any) -> Iterator[str]:
    app = create_app(StagedEngine(stage), ByteEncoder(), ServerConfig(served_model_name=MODEL), **parts)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(_recording(app, stage), log_level="critical", lifespan="on"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(sockets=[listener]),))

    def cut() -> None:
        for connection in list(server.server_state.connections):
            loop.call_soon_threadsafe(connection.transport.abort)

    stage.cut = cut
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    stage.go_on.set()
    server.should_exit = True
    thread.join(timeout=20)
    loop.close()
    listener.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium. Of module scope: while Playwright's loop lives, no other asyncio test can run."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("browser tests need Debian's package `chromium`, which is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, base_url: str) -> Iterator[Callable[..., Any]]:
    """A function that opens the console: `open_page(path="/", **context options)`.

    Afterwards every page it opened must have stayed within the origin, broken no policy and logged no error.
    """
    contexts = []
    requested: list[str] = []
    complaints: list[str] = []

    def open_page(path: str = "/", **options: Any) -> Any:
        context = browser.new_context(**{"locale": "en-GB", "viewport": {"width": 1100, "height": 760}, **options})
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if _serious(message) else None)
        page.goto(base_url + path)
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    outside = [url for url in requested if not url.startswith((base_url + "/", "data:", "blob:"))]
    assert not outside, "requests left the origin"
    assert not complaints


def _serious(message: Any) -> bool:
    # The browser itself logs every failed fetch; tests of errors cause those on purpose.
    return message.type == "error" and "Failed to load resource" not in message.text


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()
