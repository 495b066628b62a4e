"""Guessed tokens change nothing but the number of steps: random traffic with them, and each request alone without.

The embedded model guesses right three times in four, and a random one practically never, so both ways are walked often.
Traffic runs in a cache that holds a few sequences, in small blocks and chunks: prefixes are shared, prompts are cut,
sequences are preempted.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from seamount import SamplingParams, kernels
from seamount.core.requests import Chunk, Request
from seamount.core.settings import EngineConfig
from seamount.engine.build import build_engine
from seamount.engine.engine import EngineCore

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="only compiled kernels give every row its own bits")

TEXTS = (
    "<｜User｜>Count from 1 to 30.<｜Assistant｜>",
    "<｜User｜>Count from 1 to 12 and say what Seamount is.<｜Assistant｜>",
    "<｜User｜>What is Seamount?<｜Assistant｜><think>",
    "The server listens on 127.0.0.1, port",
    "12 + 30 = 42\n12 + 31 = 43\n12 + 32 =",
)
CHOICES: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 0.0, 0.6, 1.0, 1.5),
    "top_p": (1.0, 0.9),
    "top_k": (0, 0, 20),
    "min_p": (0.0, 0.0, 0.05),
    "max_tokens": (1, 2, 3, 10, 25, 40),
    "min_tokens": (0, 0, 1),
    "ignore_eos": (False, True),
    "stop": ((), (), ("e",), (" 1", "the answer")),
    "stop_token_ids": ((), (), (17, 300)),
    "presence_penalty": (0.0, 0.0, 0.8),
    "frequency_penalty": (0.0, 0.0, 0.5),
    "repetition_penalty": (1.0, 1.0, 1.3),
    "logit_bias": ({}, {}, {5: 4.0, 250: -100.0}),
    "logprobs": (None, 0, 3),
    "n": (1, 1, 1, 3),
}


@dataclass
class Outcome:
    """All that a caller sees of one sequence, however it was cut into chunks."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Any, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, chunk: Chunk) -> None:
        assert self.finish_reason is None
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.text += chunk.text
        self.finish_reason, self.stop_reason = chunk.finish_reason, chunk.stop_reason


Outcomes = dict[tuple[str, int], Outcome]


def config(speculation: Any, **options: Any) -> EngineConfig:
    return EngineConfig(num_threads=1, max_model_len=96, speculation=speculation, **options)


def run(engine: EngineCore, requests: list[Request], arrivals: list[int]) -> Outcomes:
    """Add each request before the step that its arrival names, and step until all have ended."""
    found: Outcomes = {}
    waiting = sorted(zip(arrivals, requests, strict=True), key=lambda pair: pair[0])
    step = 0
    while waiting or not engine.idle:
        while waiting and waiting[0][0] <= step:
            request = waiting.pop(0)[1]
            engine.add(request)
            found |= {(request.id, index): Outcome() for index in range(request.sampling.n)}
        for chunk in engine.step():
            assert len(chunk.token_ids) == 1
            found[chunk.request_id, chunk.index].add(chunk)
        step += 1
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    return found


def random_requests(chance: random.Random, encode: Callable[[str], tuple[int, ...]], count: int) -> list[Request]:
    made = []
    for number in range(count):
        sampling = {name: chance.choice(values) for name, values in CHOICES.items()}
        prompt = encode(chance.choice(TEXTS))
        prompt = prompt[: chance.choice([3, len(prompt), len(prompt)])] + prompt[: chance.choice([0, 0, 9])]
        seed = chance.randrange(1000)
        made.append(Request(id=f"{number}", prompt_token_ids=prompt, sampling=SamplingParams(seed=seed, **sampling)))
    return made


class Alone:
    """Runs one request at a time, whole, without guesses and without a prefix cache; remembers what came out."""

    def __init__(self, **options: Any) -> None:
        self.engine, self.encoder = build_engine(config("off", enable_prefix_cache=False, **options))
        self._known: dict[int, tuple[list[Request], Outcomes]] = {}

    def traffic(self, seed: int, count: int = 6) -> tuple[list[Request], Outcomes]:
        """Random requests, and what each of them gives by itself."""
        if seed not in self._known:
            requests = random_requests(random.Random(seed), self.encoder.encode_text, count)
            found: Outcomes = {}
            for request in requests:
                found |= run(self.engine, [request], [0])
            self._known[seed] = requests, found
        return self._known[seed]


@pytest.fixture(scope="module")
def alone() -> Alone:
    return Alone()


BYTES_PER_TOKEN = 6 * 112 * 2
# Room for the longest request, and for not much more.
TIGHT = [
    {"block_size": 4, "max_step_tokens": 16, "cache_memory_bytes": 116 * BYTES_PER_TOKEN},
    {"block_size": 16, "max_step_tokens": 40, "cache_memory_bytes": 128 * BYTES_PER_TOKEN},
    {"block_size": 1, "max_step_tokens": 512, "cache_memory_bytes": 98 * BYTES_PER_TOKEN, "max_num_seqs": 5},
]


@pytest.mark.parametrize("options", TIGHT, ids=lambda options: f"block{options['block_size']}")
def test_random_traffic_gives_the_same_bits(options: dict[str, int], alone: Alone) -> None:
    crowd = build_engine(config("mtp", **options))[0]
    for seed in range(3):
        requests, expected = alone.traffic(seed)
        chance = random.Random(seed)
        assert run(crowd, requests, [chance.randrange(12) for _ in requests]) == expected
    stats = crowd.stats()
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hit_tokens > 0
    assert 0.3 * stats.num_draft_tokens < stats.num_accepted_tokens < stats.num_draft_tokens


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"quantization": "int8"}], ids=str)
def test_so_it_does_in_other_precisions(options: dict[str, str]) -> None:
    requests, expected = Alone(**options).traffic(7, count=4)
    crowd = build_engine(config("mtp", **options))[0]
    assert run(crowd, requests, [0, 0, 1, 2]) == expected
    assert crowd.stats().num_accepted_tokens > 0


def test_guesses_are_as_good_after_chunks_preemption_and_prefix_hits() -> None:
    """They never change the output, so only their number shows whether the block read what it should have."""
    engine, encoder = build_engine(config("mtp"))
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompt = encoder.encode_text(TEXTS[1] + TEXTS[4])
    request = Request(id="r", prompt_token_ids=prompt, sampling=sampling)

    def accepted(engine: EngineCore, *requests: Request) -> int:
        before = engine.stats().num_accepted_tokens
        run(engine, list(requests), [0] * len(requests))
        return engine.stats().num_accepted_tokens - before

    whole = accepted(engine, request)
    assert whole > 10
    assert accepted(engine, request) == whole
    assert engine.stats().num_prefix_hit_tokens > 0
    tight, _ = build_engine(config("mtp", **TIGHT[0]))
    assert accepted(tight, request) == whole
    assert accepted(tight, request, dataclasses.replace(request, id="s")) >= 2 * whole - 3
    assert tight.stats().num_preemptions > 0


def test_a_step_gives_several_tokens_and_the_counters_agree() -> None:
    engine, encoder = build_engine(config("mtp"))
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine.add(Request(id="r", prompt_token_ids=encoder.encode_text(TEXTS[0]), sampling=sampling))
    counts = []
    while not engine.idle:
        counts.append(len(engine.step()))
    assert set(counts) == {1, 2}
    assert sum(counts) == 20
    stats = engine.stats()
    assert (stats.num_steps, stats.num_accepted_tokens) == (len(counts), counts.count(2))


def test_off_guesses_nothing_and_auto_gives_the_same_as_either(alone: Alone) -> None:
    requests, expected = alone.traffic(0)
    auto = build_engine(config("auto"))[0]
    assert run(auto, requests, [0] * len(requests)) == expected
    assert auto.stats().num_draft_tokens > 0
    assert alone.engine.stats().num_draft_tokens == 0
