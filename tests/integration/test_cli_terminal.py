"""`seamount chat` on a real (pseudo) terminal: typing, streaming, Ctrl-C, Ctrl-D, the history file."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seamount.engine.fake import FakeEngine, say

PATIENCE_S = 60
# The child takes the pseudo terminal as its own, so that Ctrl-C typed into it becomes a signal, as it does for people.
LAUNCHER = (
    "import fcntl, os, sys, termios\n"
    "os.setsid()\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.executable, [sys.executable, '-m', 'seamount', *sys.argv[1:]])"
)
PROMPT = "\n>"  # once it stands, keys go to the line editor and not to the terminal
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_])")


class Terminal:
    """The person's side of a pseudo terminal."""

    def __init__(self, descriptor: int, process: subprocess.Popen[bytes]) -> None:
        self._descriptor = descriptor
        self.process = process
        self._seen = b""
        self._num_read_chars = 0

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def wait_for(self, text: str) -> str:
        """Read on until `text` appears; return what stands before it, without escape sequences, and `text`."""
        return self._wait(lambda unread: unread.find(text) + len(text) if text in unread else 0, text)

    def wait_for_chars(self, num_chars: int) -> str:
        """Read on until this many characters have come; return them."""
        return self._wait(lambda unread: num_chars if len(unread) >= num_chars else 0, f"{num_chars} characters")

    def _wait(self, end_in: Callable[[str], int], what: str) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            unread = ESCAPES.sub("", self._seen.decode(errors="replace"))[self._num_read_chars :]
            if end := end_in(unread):
                self._num_read_chars += end
                return unread[:end]
            if time.monotonic() > deadline or not self._read(deadline):
                raise AssertionError(f"{what!r} did not appear; there was: {unread!r}")

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))
        try:
            piece = os.read(self._descriptor, 65536) if ready else b""
        except OSError:  # Linux's way of saying that the other side has closed
            piece = b""
        self._seen += piece
        return bool(piece)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", LAUNCHER, *arguments]
    environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "200"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(ours)


async def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(serve: Any, tmp_path: Path) -> None:
    tokens_before_the_pause = 20
    seen = 0

    async def pause() -> None:
        nonlocal seen
        seen += 1
        if seen == tokens_before_the_pause:
            await asyncio.Event().wait()

    engine = FakeEngine(say("An answer that never comes to its end."), pause=pause)
    running = await serve(engine)

    def person() -> int:
        with terminal("chat", "--url", running.url) as screen:
            screen.wait_for("/help lists the commands")
            screen.type("first question\r")
            screen.wait_for("An answer that nev")
            screen.type("\x03")
            screen.wait_for("stopped")
            screen.type("second\\\rquestion\r")
            assert "An answer that never comes to its end." in screen.wait_for("tokens/s")
            screen.wait_for(PROMPT)
            screen.type("half a lin\x03")
            screen.wait_for("Ctrl-D or /exit leaves")
            screen.type(f"/save {tmp_path / 'talk.md'}\r")
            screen.wait_for("Saved to")
            screen.type("/nonsense\r")
            screen.wait_for("hint: /help lists the commands.")
            screen.wait_for(PROMPT)
            screen.type("\x04")
            return screen.process.wait(PATIENCE_S)

    assert await asyncio.to_thread(person) == 0
    assert len(engine.aborted) == 1
    saved = (tmp_path / "talk.md").read_text(encoding="utf-8")
    assert "(stopped)" in saved
    assert "second\nquestion" in saved
    history = Path(os.environ["XDG_DATA_HOME"]) / "seamount" / "chat_history"
    assert "first question" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0


def test_a_model_in_the_process_chats_and_is_stopped_too(small_checkpoint: Path) -> None:
    with terminal(
        "chat", str(small_checkpoint), "--no-history", "--temperature", "0", "--max-tokens", "3900"
    ) as screen:
        screen.wait_for("small-qwen2. /help lists the commands")
        screen.type("/params max_tokens=4\r")
        screen.wait_for("max_tokens=4")
        screen.type("hello\r")
        screen.wait_for("4 tokens")
        screen.type("/params max_tokens=3900\r")
        screen.wait_for("max_tokens=3900")
        screen.type("/retry\r")
        screen.wait_for_chars(1000)  # far more than the line editor draws, however often: the answer runs
        screen.type("\x03")
        screen.wait_for("stopped")
        screen.type("/params max_tokens=4\r")
        screen.wait_for("max_tokens=4")
        screen.type("again\r")
        screen.wait_for("4 tokens")
        screen.type("/exit\r")
        assert screen.process.wait(PATIENCE_S) == 0


def test_a_missing_model_is_told_on_a_terminal() -> None:
    with terminal("chat", "/no/such/folder") as screen:
        shown = screen.wait_for("hint:")
        assert "error: There is no model or folder named /no/such/folder." in shown
        assert screen.process.wait(PATIENCE_S) == 2
