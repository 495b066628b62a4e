"""The child process in which a stranger's grammar is compiled for the first time, started by `grammar`.

A schema, pattern or grammar can be made to take for ever, all memory, or all of the stack, and the last of these ends
a process whatever it catches. Here that harms nobody: the process has no environment, opens no file, starts no
process, takes no more than `memory` bytes, and the kernel ends it after `cpu_s` seconds of processor time per grammar.
Its stack is smaller than that of the thread which compiles the grammar again, for use, once it has passed. Must not
import Seamount; knows only the standard library and the grammar library.

Messages as `seamount.models.sandbox` has them. In, once: {"tokens": texts whose characters are bytes, "special": ids,
"eos", "limits", "cpu_s", "memory"}; then per grammar {"grammar"}. Out: {"error"}, empty where it compiles.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from typing import Any, BinaryIO, cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_STACK_BYTES = 1 << 20


class Vocabulary:
    """What `LLTokenizer` asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, order: dict[str, Any]) -> None:
        self.tokens = [token.encode("latin-1") for token in order["tokens"]]
        self.special_token_ids = order["special"]
        self.eos_token_id = order["eos"]
        self.made: LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        """Return some tokens that spell the text: which ones does not matter here."""
        return [] if self.made is None else self.made.greedy_tokenize(text)


def _limit(memory: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's wall clock is the only limit there
        return
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)  # that of the parent's threads, too
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_STACK: _STACK_BYTES if stack == resource.RLIM_INFINITY else min(_STACK_BYTES, stack // 2),
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 0,
    }
    for kind, value in limits.items():
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # a kernel that does not know this limit; the others still hold
            continue
    os.nice(10)  # streams that are being answered come first


def _arm(cpu_s: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF's default action ends the process


def _receive(stream: BinaryIO) -> Any:
    header = stream.read(4)
    if len(header) < 4:
        sys.exit(0)
    return json.loads(stream.read(struct.unpack(">I", header)[0]))


def _send(stream: BinaryIO, error: str) -> None:
    body = json.dumps({"error": error}).encode()
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


def _compile(tokenizer: LLTokenizer, grammar: str, limits: LLParserLimits) -> str:
    """Return what is wrong with the grammar; its first mask is made too, since some limits only show there."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error() and not matcher.is_stopped():
        matcher.compute_bitmask()
    return matcher.get_error()


def main() -> None:
    """Compile grammars until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows, where a console's Ctrl-C reaches children too
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    order = _receive(source)
    vocabulary = Vocabulary(order)
    tokenizer = vocabulary.made = LLTokenizer(cast(Any, vocabulary))
    limits = LLParserLimits(**order["limits"])
    _limit(order["memory"])
    _send(sink, "")
    while True:
        job = _receive(source)
        _arm(order["cpu_s"])
        error = _compile(tokenizer, job["grammar"], limits)
        _arm(0)
        _send(sink, error)


if __name__ == "__main__":
    main()
