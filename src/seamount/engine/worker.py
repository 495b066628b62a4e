"""The engine's process: loads one model and steps it while requests are in flight; sleeps when there are none.

Started by `client.WorkerEngine` with one end of a socket pair; ends when the other end closes, so it never outlives its
server. An unexpected error ends the process, and the client sees that and starts another.
"""

from __future__ import annotations

import logging
import select
import socket
import sys
import time
from typing import Any

from seamount.core.errors import BackendError, SeamountError, error_to_fields
from seamount.core.requests import Chunk
from seamount.core.settings import EngineConfig

from .build import build_engine
from .engine import EngineCore
from .messages import (
    CODEC,
    HEADER,
    Abort,
    Failed,
    Progress,
    Ready,
    Start,
    Stepped,
    Submit,
    frame,
    frame_length,
)
from .pacing import Pacer

# Progress messages at most this often; loading thousands of tensors should not mean thousands of messages.
_PROGRESS_INTERVAL_S = 0.1
_READ_BYTES = 2**16


class Connection:
    """The worker's end of the socket pair: whole messages in and out, blocking only where told to."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()

    def send(self, message: object) -> None:
        """Send one message; waits until the other side has room."""
        self._socket.sendall(frame(message))

    def receive(self, *, wait: bool) -> list[Any]:
        """Return the messages that have arrived; with `wait`, at least one.

        Raises:
            EOFError: the other side has closed.
            BackendError: what arrived is no message.
        """
        messages = self._messages()
        while True:
            readable, _, _ = select.select([self._socket], [], [], None if wait and not messages else 0)
            if not readable:
                return messages
            data = self._socket.recv(_READ_BYTES)
            if not data:
                raise EOFError
            self._buffer += data
            messages += self._messages()

    def _messages(self) -> list[Any]:
        messages = []
        while len(self._buffer) >= HEADER.size:
            end = HEADER.size + frame_length(bytes(self._buffer[: HEADER.size]))
            if len(self._buffer) < end:
                break
            messages.append(CODEC.decode(bytes(self._buffer[HEADER.size : end])))
            del self._buffer[:end]
        return messages


def serve(connection: Connection) -> None:
    """Load the model that the first message names, then answer requests until the other side closes."""
    first, *pending = connection.receive(wait=True)
    if not isinstance(first, Start):
        raise BackendError(f"The first message must be Start, not {type(first).__name__}.")
    engine = _load(connection, first)
    if engine is None:
        return
    connection.send(Ready(engine.facts))
    pacer = Pacer()
    while True:
        pending += connection.receive(wait=engine.idle and not pending)
        chunks = [chunk for message in pending for chunk in _handle(engine, message)]
        pending = []
        if not engine.idle:
            chunks += engine.step()
        pacer.add(chunks)
        if engine.idle or pacer.is_due():
            connection.send(Stepped(pacer.take(), engine.stats()))


def _load(connection: Connection, start: Start) -> EngineCore | None:
    last_sent = 0.0

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal last_sent
        now = time.monotonic()
        if done == total or now - last_sent >= _PROGRESS_INTERVAL_S:
            last_sent = now
            connection.send(Progress(stage, done, total))

    try:
        engine, _ = build_engine(EngineConfig.model_validate_json(start.config), on_progress)
    except SeamountError as error:
        connection.send(Failed(error_to_fields(error)))
        return None
    return engine


def _handle(engine: EngineCore, message: Any) -> list[Chunk]:
    if isinstance(message, Abort):
        return engine.abort(message.request_id)
    if not isinstance(message, Submit):
        raise BackendError(f"A worker cannot handle {type(message).__name__}.")
    try:
        engine.add(message.request)
    except SeamountError as error:
        return [Chunk(request_id=message.request.id, finish_reason="error", error=error_to_fields(error))]
    return []


def main() -> None:
    """Entry point of `python -m seamount.engine.worker FD`."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s worker: %(message)s")
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        try:
            serve(Connection(sock))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    main()
