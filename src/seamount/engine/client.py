"""The server's side of the worker process: starts it, talks to it, notices its death and starts it again.

Implements `core.ports.Engine`. Lives in one asyncio event loop. Imports no torch: the worker does that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
import sys
from collections.abc import AsyncGenerator, Callable
from typing import Any

from seamount.core.errors import (
    BackendError,
    CapacityError,
    DrainingError,
    EngineError,
    SeamountError,
    WorkerDiedError,
    error_from_fields,
)
from seamount.core.requests import Chunk, EngineState, EngineStats, ModelFacts, Request
from seamount.core.settings import EngineConfig

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

_log = logging.getLogger(__name__)

# A worker that has never become ready is not started more often than this.
_MAX_FRUITLESS_STARTS = 5
_RESTART_DELAY_S = 0.5
_MAX_RESTART_DELAY_S = 15.0
# How long a new request waits for a worker that is being started again.
_READY_WAIT_S = 120.0
_STOP_TIMEOUT_S = 5.0
# Chunks that a request's reader may leave unread. A client who reads slowly, or not at all, fills the buffers of its
# connection first and then this; beyond it the request is given up, so that nobody's answer grows in memory.
MAX_UNREAD_CHUNKS = 4096


class WorkerEngine:
    """An engine in a process of its own.

    Args:
        config: the model and how to run it.
        on_progress: called in the event loop with a stage, bytes done and bytes in all while the model loads.
    """

    def __init__(self, config: EngineConfig, *, on_progress: Callable[[str, int, int], None] | None = None) -> None:
        self._config = config
        self._on_progress = on_progress
        self._state: EngineState = "starting"
        self._facts: ModelFacts | None = None
        self._failure: SeamountError | None = None
        self._ready = asyncio.Event()
        self._requests: dict[str, asyncio.Queue[Chunk | SeamountError]] = {}
        self._stats = EngineStats()
        self._past = EngineStats()
        self._num_restarts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None

    def state(self) -> EngineState:
        """Where the engine is in its life."""
        return self._state

    async def start(self) -> ModelFacts:
        """Start the worker and wait until the model is loaded.

        Raises:
            SeamountError: the worker's own error when the model cannot be loaded.
        """
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
        self._supervisor.add_done_callback(self._supervisor_ended)
        return await self._when_ready()

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """See `core.ports.Engine.generate`. While the worker restarts, a new request waits for it."""
        try:
            async with asyncio.timeout(_READY_WAIT_S):
                await self._when_ready()
        except TimeoutError as cause:
            raise CapacityError("The model's worker process has not come back yet.", retry_after=10.0) from cause
        queue: asyncio.Queue[Chunk | SeamountError] = asyncio.Queue()
        self._requests[request.id] = queue
        unfinished = request.sampling.n
        try:
            self._send(Submit(request))
            while unfinished:
                item = await queue.get()
                if isinstance(item, SeamountError):
                    unfinished = 0
                    raise item
                if item.error is not None:
                    unfinished = 0
                    raise error_from_fields(item.error)
                unfinished -= item.finish_reason is not None
                yield item
        finally:
            del self._requests[request.id]
            if unfinished:
                self._send(Abort(request.id))

    async def stats(self) -> EngineStats:
        """The latest counters that the worker sent; they go on across its restarts."""
        counters = _sum_counters(self._past, self._stats)
        pid = self._process.pid if self._process is not None else 0
        return dataclasses.replace(self._stats, **counters, num_worker_restarts=self._num_restarts, worker_pid=pid)

    async def close(self) -> None:
        """End all requests, stop the worker and wait for its end."""
        if self._state == "closed":
            return
        self._state = "closed"
        self._failure = DrainingError("The engine is closed.")
        self._ready.set()
        self._fail_requests(DrainingError("The server is stopping."))
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        await self._stop_process()

    async def _when_ready(self) -> ModelFacts:
        await self._ready.wait()
        if self._failure is not None:
            raise self._failure
        if self._facts is None:
            raise EngineError("The engine has no model.")
        return self._facts

    def _send(self, message: object) -> None:
        """Hand a message to the worker; when it has just died its supervisor already tells the requests."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))

    async def _supervise(self) -> None:
        """Keep a worker running until the engine is closed, or until no worker ever became ready."""
        fruitless = 0
        while self._facts is not None or fruitless < _MAX_FRUITLESS_STARTS:
            try:
                fruitless = 0 if await self._run_worker() else fruitless + 1
            except OSError as error:
                _log.error("the worker could not be started: %s", error)
                fruitless += 1
            if self._failure is not None:
                return
            await asyncio.sleep(min(_RESTART_DELAY_S * fruitless, _MAX_RESTART_DELAY_S))
        self._fail(EngineError("The worker died at every start.", hint="Its last words are in the log above."))

    def _supervisor_ended(self, task: asyncio.Task[None]) -> None:
        """A defect of the supervisor itself must not leave requests waiting for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the engine's supervisor failed", exc_info=error)
            self._fail(EngineError("The engine's supervisor failed.", hint="The log above says why."))

    async def _run_worker(self) -> bool:
        """Run one worker to its end; return whether it had become ready.

        Raises:
            OSError: no process or socket could be had.
        """
        reader, writer, process = await self._spawn()
        self._writer, self._process = writer, process
        try:
            self._send(Start(self._config.model_dump_json()))
            while True:
                length = frame_length(await reader.readexactly(HEADER.size))
                self._receive(CODEC.decode(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except BackendError as error:
            # Out of step with the worker: nothing that it says from here on can be understood.
            _log.error("%s", error)
            process.kill()
        finally:
            self._writer = None
            writer.close()
        code = await process.wait()
        was_ready = self._state == "ready"
        if self._failure is None and self._state != "closed":
            self._worker_died(process.pid, code)
        return was_ready

    async def _spawn(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, asyncio.subprocess.Process]:
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                # Without -P, Python files in the working directory, which may be a checkpoint, would be imported.
                "-P",
                "-m",
                "seamount.engine.worker",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                # Ctrl-C reaches the whole foreground group; what it means is the server's to decide.
                start_new_session=True,
            )
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return reader, writer, process

    def _receive(self, message: Any) -> None:
        if isinstance(message, Stepped):
            self._stats = message.stats
            for chunk in message.chunks:
                self._deliver(chunk)
        elif isinstance(message, Progress):
            if self._on_progress is not None:
                self._on_progress(message.stage, message.done, message.total)
        elif isinstance(message, Ready):
            self._facts = message.facts
            self._state = "ready"
            self._ready.set()
        elif isinstance(message, Failed):
            error = error_from_fields(message.error)
            if self._facts is None:
                self._fail(error)
            else:
                _log.error("the worker could not load the model again: %s", error)

    def _deliver(self, chunk: Chunk) -> None:
        """Hand a chunk to its request's reader; one who leaves too many unread gets an error for the rest."""
        queue = self._requests.get(chunk.request_id)
        if queue is None or queue.qsize() > MAX_UNREAD_CHUNKS:
            return
        if queue.qsize() < MAX_UNREAD_CHUNKS:
            queue.put_nowait(chunk)
            return
        self._send(Abort(chunk.request_id))
        queue.put_nowait(
            EngineError(
                f"The answer was not read: {MAX_UNREAD_CHUNKS} pieces of it were waiting.",
                hint="Read the stream as it comes.",
                code="reader_too_slow",
            )
        )

    def _worker_died(self, pid: int, code: int) -> None:
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        _log.error("worker %d died (%s) with %d requests in flight; starting another", pid, how, len(self._requests))
        if self._facts is not None:
            self._state = "restarting"
        self._ready.clear()
        self._num_restarts += 1
        self._past = dataclasses.replace(self._past, **_sum_counters(self._past, self._stats))
        self._stats = EngineStats()
        self._fail_requests(
            WorkerDiedError(
                f"The model's worker process died ({how}) while it ran this request.",
                hint="It is being started again; send the request once more.",
                retry_after=1.0,
            )
        )

    def _fail(self, error: SeamountError) -> None:
        self._failure = error
        self._state = "failed"
        self._ready.set()
        self._fail_requests(error)

    def _fail_requests(self, error: SeamountError) -> None:
        for queue in self._requests.values():
            queue.put_nowait(error)

    async def _stop_process(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        try:
            await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


_GAUGES = frozenset(
    {"num_running", "num_waiting", "num_blocks", "num_free_blocks", "num_worker_restarts", "worker_pid"}
)


def _sum_counters(past: EngineStats, latest: EngineStats) -> dict[str, int]:
    return {
        field.name: getattr(past, field.name) + getattr(latest, field.name)
        for field in dataclasses.fields(EngineStats)
        if field.name not in _GAUGES
    }
