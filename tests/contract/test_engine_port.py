"""The contract of `core.ports.Engine`, run over every implementation.

An entry of `ENGINES` makes a fresh, unstarted engine whose greedy answers to `PROMPT` are longer than three tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest
import pytest_asyncio

from seamount.core.errors import ContextTooLongError, InvalidRequestError, SeamountError
from seamount.core.ports import Engine
from seamount.core.requests import Chunk, Request
from seamount.core.sampling import SamplingParams
from seamount.core.settings import EngineConfig
from seamount.engine.client import WorkerEngine
from seamount.engine.fake import FakeEngine, say

ENGINES: dict[str, Callable[[], Engine]] = {
    "fake": lambda: FakeEngine(say("a long enough answer")),
    "worker": lambda: WorkerEngine(EngineConfig(model="seamount-tiny", num_threads=1, max_model_len=256)),
}
PROMPT = (5, 6, 7, 8, 9)


@pytest_asyncio.fixture(params=ENGINES)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    made = ENGINES[request.param]()
    yield made
    await made.close()


def ask(name: str = "r", prompt: tuple[int, ...] = PROMPT, **sampling: object) -> Request:
    fields = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling}
    return Request(id=name, prompt_token_ids=prompt, sampling=SamplingParams(**fields))


async def collect(engine: Engine, request: Request) -> list[Chunk]:
    async with aclosing(engine.generate(request)) as chunks:
        return [chunk async for chunk in chunks]


async def idle(engine: Engine) -> None:
    """Wait until the engine holds nothing; its stats may be a second old."""
    async with asyncio.timeout(10):
        while True:
            stats = await engine.stats()
            if not stats.num_running and not stats.num_waiting:
                return
            await asyncio.sleep(0.02)


async def test_start_makes_it_ready_and_tells_facts(engine):
    assert engine.state() == "starting"
    facts = await engine.start()
    assert engine.state() == "ready"
    assert facts.name
    assert facts.vocab_size > max(PROMPT)
    assert facts.max_model_len > len(PROMPT)


async def test_chunks_carry_every_token_once_and_one_finish(engine):
    await engine.start()
    chunks = await collect(engine, ask(max_tokens=4))
    assert {chunk.request_id for chunk in chunks} == {"r"}
    assert sum(len(chunk.token_ids) for chunk in chunks) == 4
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    assert chunks[-1].finish_reason == "length"
    assert chunks[0].num_cached_tokens is not None
    assert chunks[0].queue_s is not None
    assert chunks[0].prefill_s is not None
    assert all(chunk.num_cached_tokens is None for chunk in chunks[1:])


async def test_sequences_are_numbered_and_each_ends(engine):
    await engine.start()
    chunks = await collect(engine, ask(n=3, max_tokens=3))
    for index in range(3):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert sum(len(chunk.token_ids) for chunk in own) == 3
        assert [chunk.finish_reason is not None for chunk in own] == [False] * (len(own) - 1) + [True]


async def test_logprobs_come_one_per_token(engine):
    await engine.start()
    chunks = await collect(engine, ask(max_tokens=3, logprobs=2))
    for chunk in chunks:
        assert len(chunk.logprobs) == len(chunk.token_ids)
        for token_id, position in zip(chunk.token_ids, chunk.logprobs, strict=True):
            assert position.chosen.token_id == token_id
            assert len(position.top) == 2
            assert position.top[0].logprob >= position.top[1].logprob


async def test_a_stop_token_ends_and_is_named(engine):
    await engine.start()
    first = (await collect(engine, ask(max_tokens=3)))[0].token_ids[0]
    chunks = await collect(engine, ask(stop_token_ids=(first,)))
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", first)


async def test_requests_run_side_by_side(engine):
    await engine.start()
    answers = await asyncio.gather(*(collect(engine, ask(f"r{number}", max_tokens=3)) for number in range(5)))
    for number, chunks in enumerate(answers):
        assert {chunk.request_id for chunk in chunks} == {f"r{number}"}
        assert chunks[-1].finish_reason == "length"


async def test_closing_early_frees_everything(engine):
    facts = await engine.start()
    async with aclosing(engine.generate(ask(max_tokens=facts.max_model_len - len(PROMPT)))) as chunks:
        await anext(chunks)
    await idle(engine)
    assert (await collect(engine, ask(max_tokens=2)))[-1].finish_reason == "length"


async def test_cancelling_the_reader_frees_everything(engine):
    facts = await engine.start()
    reading = asyncio.create_task(collect(engine, ask(max_tokens=facts.max_model_len - len(PROMPT))))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await idle(engine)


async def test_a_prompt_over_the_context_is_refused_at_the_first_item(engine):
    facts = await engine.start()
    stream = engine.generate(ask(prompt=(5,) * facts.max_model_len))
    with pytest.raises(ContextTooLongError, match=str(facts.max_model_len)):
        await anext(stream)


@pytest.mark.parametrize("prompt", [(), (2**30,)], ids=["empty", "outside-the-vocabulary"])
async def test_wrong_prompts_are_refused_at_the_first_item(engine, prompt):
    await engine.start()
    with pytest.raises(InvalidRequestError):
        await anext(engine.generate(ask(prompt=prompt)))


async def test_stats_count_what_was_done(engine):
    await engine.start()
    await collect(engine, ask(max_tokens=4))
    await idle(engine)
    stats = await engine.stats()
    assert stats.num_generated_tokens == 4
    assert stats.num_prompt_tokens == len(PROMPT)
    assert stats.num_blocks > 0


async def test_close_ends_running_requests_and_is_idempotent(engine):
    facts = await engine.start()
    stream = engine.generate(ask(max_tokens=facts.max_model_len - len(PROMPT)))
    await anext(stream)
    await engine.close()
    await engine.close()
    assert engine.state() == "closed"
    last = None
    try:
        async for chunk in stream:
            last = chunk.finish_reason
    except SeamountError:
        last = "abort"
    assert last == "abort"
    with pytest.raises(SeamountError):
        await anext(engine.generate(ask("late")))
