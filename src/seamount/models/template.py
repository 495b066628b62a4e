"""Renders chat templates, which are programs from strangers' checkpoints, at arm's length.

Called by `models.prompt`. Knows nothing of tokens or of message schemas.

Why a child process: Jinja's sandbox stops attribute escapes but neither endless loops nor huge strings, and no
thread of a Python process can be stopped from outside. A small child (`_template_sandbox`), started with the first
render and kept, is limited by the kernel (processor time, memory, no files, no processes) and can simply be
ended. It costs about a tenth of a second once, a few MB, and well under a millisecond per render.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from seamount.core.errors import CapacityError, CheckpointError, InvalidRequestError, SeamountError

from .sandbox import WALL_LIMIT_S, SandboxProcess

CPU_LIMIT_S = 2.0
MEMORY_LIMIT_BYTES = 1 << 30
MAX_TEXT_CHARS = 32 << 20
MAX_TEMPLATE_CHARS = 1 << 20
_SANDBOX = Path(__file__).with_name("_template_sandbox.py")
# What one message to the child holds at most, so that a batch ends long before the wall clock runs out.
_MESSAGE_RENDERS, _MESSAGE_CHARS = 64, 1 << 20


class ChatTemplate:
    """One chat template and the child that renders it. Safe to call from any thread; renders take turns.

    Args:
        source: the Jinja text.
        name: where it comes from, for error messages ("tokenizer_config.json of ...").
        cpu_limit_s, memory_limit_bytes: per render, and for the child.
    """

    def __init__(
        self,
        source: str,
        name: str,
        *,
        cpu_limit_s: float = CPU_LIMIT_S,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"The chat template in {name} has {len(source)} characters, over {MAX_TEMPLATE_CHARS}."
            )
        self.source = source
        self.name = name
        self._cpu_limit_s = cpu_limit_s
        self._memory_limit_bytes = memory_limit_bytes
        self._lock = threading.Lock()
        self._child: SandboxProcess | None = None

    def check(self) -> None:
        """Compile the template, starting the child.

        Raises:
            CheckpointError: it is no valid template, or compiling it breaks the limits.
            CapacityError: as for `render`.
        """
        with self._turn():
            self._ready_child()

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the template's text for these variables (JSON values only).

        Raises:
            InvalidRequestError: the template refuses the messages (`raise_exception`), or fails on them.
            CheckpointError: the template is broken, reaches for what the sandbox forbids, or breaks its
                limits.
            CapacityError: other renders have not ended within WALL_LIMIT_S.
        """
        return self._text(self._answers([_as_json(variables)])[0])

    def render_many(self, batch: Sequence[Mapping[str, Any]]) -> list[str | SeamountError]:
        """Return what `render` gives or raises for each of these variables; a message to the child for many of them.

        Raises:
            CheckpointError: the template does not compile.
            CapacityError: as for `render`.
        """
        jobs = [_result_of(_as_json, variables) for variables in batch]
        texts: list[str | SeamountError] = []
        for message in _messages([job for job in jobs if isinstance(job, str)]):
            answers = self._answers(message)
            if len(message) > 1 and answers[0].get("error") == "ended":  # each by itself shows whose fault it is
                answers = [self._answers([job])[0] for job in message]
            texts += [_result_of(self._text, answer) for answer in answers]
        rendered = iter(texts)
        return [next(rendered) if isinstance(job, str) else job for job in jobs]

    def _answers(self, jobs: Sequence[str]) -> list[dict[str, str]]:
        message = f'{{"now": "{datetime.now().isoformat()}", "batch": [{", ".join(jobs)}]}}'.encode()
        with self._turn():
            answer = self._ready_child().ask(message)
            if answer is None:
                self._drop_child()
                ended = f"it did not finish in {self._cpu_limit_s:g} s or ended its process"
                return [{"error": "ended", "message": ended}] * len(jobs)
        answers: list[dict[str, str]] = answer["answers"]
        return answers

    def close(self) -> None:
        """End the child. The template can still be used; it starts another. Idempotent."""
        with self._lock:
            self._drop_child()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=WALL_LIMIT_S):
            raise CapacityError(
                "Other chat prompts hold up the template; this one did not get its turn.", retry_after=1
            )
        try:
            yield
        finally:
            self._lock.release()

    def _ready_child(self) -> SandboxProcess:
        if self._child is not None and self._child.is_usable():
            return self._child
        self._drop_child()
        child = SandboxProcess(_SANDBOX)
        order = {
            "template": self.source,
            "cpu_s": self._cpu_limit_s,
            "memory": self._memory_limit_bytes,
            "max_chars": MAX_TEXT_CHARS,
        }
        answer = child.ask(json.dumps(order).encode())
        if answer is None or "error" in answer:
            child.close()
        if answer is None:
            raise self._limit_error(f"it did not compile in {self._cpu_limit_s:g} s or ended its process")
        self._text(answer)
        self._child = child
        return child

    def _drop_child(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _text(self, answer: dict[str, str]) -> str:
        kind = answer.get("error")
        if kind is None:
            return answer["text"]
        message = answer["message"].rstrip(".")
        if kind == "raised":
            raise InvalidRequestError(f"The chat template refuses the messages: {message}.", param="messages")
        if kind == "render":
            raise InvalidRequestError(
                f"The chat template cannot render these messages ({message}).",
                hint="Check roles, content and tool calls; the model's template may not support one of them.",
                param="messages",
            )
        if kind in ("limit", "ended"):
            raise self._limit_error(message)
        if kind == "security":
            raise CheckpointError(
                f"The chat template in {self.name} reaches for what the sandbox forbids ({message}).",
                hint="Do not use this checkpoint's template; it may be hostile.",
            )
        raise CheckpointError(f"The chat template in {self.name} is not valid Jinja ({message}).")

    def _limit_error(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"The chat template in {self.name} broke its limits: {problem}.",
            hint="It loops or writes without end for this input; mend or replace it.",
        )


def _as_json(variables: Mapping[str, Any]) -> str:
    try:
        return json.dumps(variables)
    except (TypeError, ValueError, RecursionError) as cause:
        raise InvalidRequestError(f"Messages, tools and template arguments must be JSON: {cause}.") from cause


def _result_of(function: Callable[[Any], str], value: Any) -> str | SeamountError:
    try:
        return function(value)
    except SeamountError as error:
        return error


def _messages(jobs: Sequence[str]) -> Iterator[list[str]]:
    """Cut jobs into messages: one, or as many as stay small together."""
    held: list[str] = []
    for job in jobs:
        if held and (len(held) == _MESSAGE_RENDERS or sum(map(len, held)) + len(job) > _MESSAGE_CHARS):
            yield held
            held = []
        held.append(job)
    if held:
        yield held
