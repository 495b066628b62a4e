"""The engine as the routes see it: its life, whether it takes requests, and the chunks of one request.

Made by `app.create_app`, driven by the app's lifespan and by `serve.run_server`. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TypeVar

from seamount.core.embedding import check_generates
from seamount.core.errors import (
    CapacityError,
    ContextTooLongError,
    DrainingError,
    EngineError,
    InvalidRequestError,
    NotFoundError,
    QuotaError,
    SeamountError,
    error_from_fields,
)
from seamount.core.ports import Engine
from seamount.core.requests import Chunk, EngineState, ModelFacts, Request
from seamount.core.settings import ServerConfig

from .admission.call import Call, Calls, current_call
from .admission.core import Capacity, Ticket
from .admission.queue import Admission
from .door.access import permit_model
from .encoder import Encoder
from .telemetry.metrics import Metrics

T = TypeVar("T")

MAX_ENCODES = 2
_WAIT_S = {"starting": 2.0, "restarting": 1.0}
_REASONS: dict[EngineState, str] = {
    "starting": "The model is still being loaded.",
    "restarting": "The engine's worker ended and is being started again.",
    "draining": "The server is stopping and takes no new requests.",
    "failed": "The engine could not be started; the server's log says why.",
    "closed": "The server is stopping and takes no new requests.",
}


class Service:
    """One engine and its encoder, behind one server.

    Attributes:
        created_s: Unix time of this object's making: the `created` of its model.
        started: done when the engine is ready; holds the error when it could not start.
        num_active: requests that are being answered.
        calls: opens a call for each request; see `admission.call`.
        admission: who is worked on, who waits.
    """

    def __init__(self, engine: Engine, encoder: Encoder, config: ServerConfig) -> None:
        self.engine = engine
        self.encoder = encoder
        self.config = config
        self.metrics = Metrics()
        self.created_s = self.now_s()
        self.started: asyncio.Task[None] | None = None
        self.num_active = 0
        self.calls = Calls()
        self.admission = Admission(max_waiting=config.max_waiting, max_wait_s=config.max_wait_s)
        self._salt_key = secrets.token_bytes(32)
        self._facts: ModelFacts | None = None
        self._draining = False
        # Threads of its own: one that works for a client who left keeps its place, so that they cannot pile up.
        self._encoders = ThreadPoolExecutor(MAX_ENCODES, thread_name_prefix="encode")

    def start(self) -> None:
        """Begin to start the engine; the probes answer meanwhile."""
        self.started = asyncio.create_task(self._start())

    async def _start(self) -> None:
        self._facts = facts = await self.engine.start()
        self.admission.open(Capacity(max_sequences=facts.max_num_seqs, max_tokens=facts.num_blocks * facts.block_size))

    async def close(self) -> None:
        """Stop the engine. Idempotent."""
        self._draining = True
        if self.started is not None:
            self.started.cancel()
            await asyncio.gather(self.started, return_exceptions=True)
        self.admission.close(DrainingError(_REASONS["closed"]))
        await self.engine.close()

    def begin_drain(self) -> None:
        """Take no new requests from now on; those that were taken, waiting ones too, go on until `close`.

        Batches, for whose next line nobody waits, begin no more of them: they go on when a server starts again.
        """
        self._draining = True
        self.admission.hold_batches()

    def enter(self) -> None:
        """A request begins."""
        self.num_active += 1

    def leave(self) -> None:
        """A request is over, whatever became of it."""
        self.num_active -= 1

    def state(self) -> EngineState:
        """Return where the server is in its life."""
        if self._draining:
            return "draining"
        state = self.engine.state()
        return "starting" if state == "ready" and self._facts is None else state

    def not_ready(self) -> SeamountError | None:
        """Return why no request is taken now; None when ready."""
        state = self.state()
        if state == "ready":
            return None
        if state in ("draining", "closed"):
            return DrainingError(_REASONS[state])
        if state == "failed":
            return EngineError(_REASONS[state], code="engine_failed")
        return CapacityError(_REASONS[state], code=state, retry_after=_WAIT_S.get(state))

    def facts(self) -> ModelFacts:
        """Return what the engine said of itself when it started.

        Raises:
            CapacityError: it has not started yet.
        """
        if self._facts is None:
            raise self.not_ready() or CapacityError(_REASONS["starting"], code="starting", retry_after=2.0)
        return self._facts

    def now_s(self) -> int:
        """Return the Unix time, for an answer's `created`."""
        return int(time.time())

    def model_name(self) -> str:
        """Return the name that clients use; empty before it is known."""
        return self.config.served_model_name or (self._facts.name if self._facts else "")

    def check_model(self, name: str) -> None:
        """Check that `name` is the model that is served.

        Raises:
            NotFoundError: it is not.
        """
        if name != self.model_name():
            raise NotFoundError(
                "There is no model of that name here.",
                hint=f"The model is called {self.model_name()!r}; /v1/models lists it.",
                code="model_not_found",
                param="model",
            )

    def admit(self, model: str, *, needs_engine: bool = True) -> None:
        """Check that the caller's request for this model can be taken now, and count it against its key's limits.

        Asked before a prompt is encoded, so that a request that will be refused costs nothing.

        Args:
            needs_engine: else it does not matter how many wait for the engine.

        Raises:
            SeamountError: why not.
        """
        permit_model(model)
        call = current_call()
        try:
            reason = self.not_ready()
            # While a dead worker is started again, the engine lets requests wait for it.
            if reason is not None and self.state() != "restarting":
                raise reason
            self.check_model(model)
            call.begin()
            if needs_engine:
                self.admission.check(call.caller.tenant, call.caller.priority)
        except (CapacityError, EngineError, QuotaError) as error:
            self.metrics.reject(self.model_name(), error.code)
            raise

    def check_generates(self) -> None:
        """Check that the model can continue text.

        Raises:
            InvalidRequestError: it makes embeddings only.
        """
        check_generates(self.facts().generates)

    def check_count(self, num_prompts: int, n: int) -> None:
        """Check that so many prompts, each with `n` answers, could ever be taken together.

        Raises:
            InvalidRequestError: not even while nobody else asks for anything.
        """
        most = self.admission.most_at_once(n, current_call().caller.priority)
        if num_prompts > most:
            raise InvalidRequestError(
                f"There are {num_prompts} prompts with {n} answers each; this server takes at most {most} such prompts "
                "at once.",
                hint="Send them in several requests.",
                param="prompt",
            )

    def check_prompt(self, token_ids: Sequence[int], limit: tuple[str, int] | None, *, param: str) -> None:
        """Check a prompt against the model.

        Args:
            limit: name and value of the limit on output that the caller set; None: up to the context.
            param: the request's field that holds the prompt.

        Raises:
            InvalidRequestError: it is empty, or a token id is none of the model's.
            ContextTooLongError: it does not fit, alone or with the output asked for.
        """
        facts = self.facts()
        if not token_ids:
            raise InvalidRequestError("The prompt is empty.", param=param)
        if max(token_ids) >= facts.vocab_size:
            raise InvalidRequestError(
                f"A token id is {max(token_ids)}; the model's vocabulary ends at {facts.vocab_size - 1}.", param=param
            )
        context, length = facts.max_model_len, len(token_ids)
        if length >= context:
            raise ContextTooLongError(
                f"The prompt has {length} tokens; the model's context is {context} tokens, prompt and answer together.",
                hint="Shorten the messages or the prompt.",
                param=param,
            )
        if limit is not None and length + limit[1] > context:
            raise ContextTooLongError(
                f"The prompt has {length} tokens and {limit[0]} is {limit[1]}; together they are more than the model's "
                f"context of {context} tokens.",
                hint=f"Shorten the prompt, or set {limit[0]} to at most {context - length}.",
                param=limit[0],
            )

    async def encode(self, work: Callable[[], T]) -> T:
        """Return what `work`, an encoding, returns; it runs in a thread, and at most `MAX_ENCODES` run at once.

        Cancelled, it stops waiting; work that has not begun then never does.
        """
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work)

    async def render_metrics(self) -> bytes:
        """Return what `/metrics` says now."""
        stats = await self.engine.stats()
        return self.metrics.render(self.model_name(), stats, self._facts, self.admission.load(), self.num_active)

    async def generate(self, request: Request, *, shape_param: str | None = None) -> AsyncGenerator[Chunk, None]:
        """Yield the engine's chunks of one request, once admission lets it begin; observed for metrics.

        A request for an embedding is one of many texts: its tokens are taken from the key's limits by who asks for all.

        Args:
            request: what is asked of the engine.
            shape_param: the field that the answer's shape came from: `param` of the error that refuses its grammar.

        Raises:
            QuotaError: the caller's key has not that many tokens left.
            CapacityError: the queue is full, or the caller's time was over.
            UnauthenticatedError: the caller's key ended meanwhile.
            SeamountError: the engine failed, or was closed, before the end.
        """
        call = current_call()
        timer = self.metrics.timer(self.model_name(), request)
        ticket = await self._enter(call, request)
        timer.admitted()
        num_prompt, num_output = len(request.prompt_token_ids), 0
        code = "client_gone"  # stays so when the generator is closed early
        try:
            salted = dataclasses.replace(
                request, priority=call.caller.priority, cache_salt=self._salt(call.caller.tenant)
            )
            async with aclosing(call.until_its_end(self.engine.generate(salted))) as chunks:
                async for chunk in chunks:
                    timer.observe(chunk)
                    self.admission.progress(len(chunk.token_ids) + (0 if num_output else num_prompt))
                    num_output += len(chunk.token_ids)
                    if chunk.finish_reason == "error":
                        raise error_from_fields(chunk.error or {})
                    if chunk.finish_reason == "abort":
                        raise self.not_ready() or EngineError("The engine gave the request up.", code="aborted")
                    yield chunk
            code = ""
        except SeamountError as error:
            code = error.code
            if code == "invalid_grammar" and error.param is None:
                error.param = shape_param
            raise
        finally:
            self.admission.leave(ticket, num_tokens=num_prompt + num_output)
            if request.embedding is None:
                call.settle(ticket.num_tokens, num_prompt + num_output)
            if code:
                timer.fail(code)
            else:
                if request.embedding is None:  # which has no output to learn the usual length of
                    self.admission.learn(num_output, request.sampling.n)
                timer.finish()

    async def _enter(self, call: Call, request: Request) -> Ticket:
        """Return when the request may begin, with what is to be given back at its end.

        Raises:
            QuotaError, CapacityError, UnauthenticatedError: see `generate`.
        """
        num_prompt, n = len(request.prompt_token_ids), request.sampling.n
        room = max(self.facts().max_model_len - num_prompt, 1) if request.embedding is None else 0
        num_tokens = self.admission.guess(num_prompt, n, min(request.sampling.max_tokens or room, room))
        ticket = Ticket(
            tenant=call.caller.tenant,
            priority=call.caller.priority,
            num_sequences=n,
            num_tokens=num_tokens,
            deadline_s=call.begin_by_s,
        )
        try:
            call.begin()  # done by `admit` already, but for a route that forgot it
            if request.embedding is None:
                call.reserve(num_tokens)
        except QuotaError as error:
            self.metrics.reject(self.model_name(), error.code)
            raise
        try:
            await call.wait_for(lambda: self.admission.enter(ticket))
        except BaseException as error:
            if request.embedding is None:
                call.settle(num_tokens, 0)
            code = error.code if isinstance(error, SeamountError) else "client_gone"
            self.metrics.reject(self.model_name(), code)
            raise
        return ticket

    def _salt(self, tenant: str) -> str:
        """Return what keeps a tenant's cached prefixes from others; nobody outside can compute it."""
        return hashlib.blake2b(tenant.encode(), key=self._salt_key, digest_size=16).hexdigest() if tenant else ""
