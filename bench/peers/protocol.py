"""What every runner speaks: one JSON object per line, requests on standard input, answers on standard output.

A runner is started as `python run_NAME.py OPTIONS`, where OPTIONS is a JSON object (see `Options`). It loads the model,
answers `{"ready": true}`, then answers each `{"prompts": [[token ids]], "new_tokens": n}` with
`{"seconds": s, "tokens": [n, ...]}`, or with `{"error": "..."}`. All prompts of a request are handed to the engine at
once; greedy, no end token, no text. Standard library only: it is imported inside every peer's environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], Sequence[int]]


@dataclass(frozen=True)
class Options:
    """How a runner loads its model.

    Attributes:
        model: folder or file that the peer reads.
        threads: threads to compute with.
        max_concurrency: most prompts in one request.
        max_tokens: most tokens, prompt and output together, of one prompt.
        prefix_cache: whether equal prompt prefixes are reused.
        extra: what only this peer knows, by name.
    """

    model: str
    threads: int
    max_concurrency: int
    max_tokens: int
    prefix_cache: bool
    extra: dict[str, str]


def serve(load: Callable[[Options], Generate]) -> None:
    """Load and answer until standard input ends; everything else that is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, object]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    started = time.perf_counter()
    try:
        generate = load(Options(**json.loads(sys.argv[1])))
    except Exception as error:
        answer({"error": _said(error)})
        raise
    answer({"ready": True, "load_s": time.perf_counter() - started})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            started = time.perf_counter()
            tokens = list(generate(request["prompts"], request["new_tokens"]))
            answer({"seconds": time.perf_counter() - started, "tokens": tokens})
        except Exception as error:  # noqa: BLE001 - the process edge, as above
            answer({"error": _said(error)})


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
