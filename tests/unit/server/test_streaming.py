"""Merging of streams and the counting of tokens."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from seamount.core.requests import Chunk
from seamount.server.streaming import merge
from seamount.server.usage import ReasoningCount, UsageCounter


class Source:
    """A stream that notes its closing."""

    def __init__(self, items, fail=None, hang=False):
        self.items, self.fail, self.hang, self.closed = items, fail, hang, False

    async def stream(self):
        try:
            for item in self.items:
                await asyncio.sleep(0)
                yield item
            if self.fail:
                raise self.fail
            if self.hang:
                await asyncio.Event().wait()
        finally:
            self.closed = True


async def test_merge_gives_everything_in_each_streams_order():
    sources = [Source(range(50)), Source([]), Source(range(7)), Source(range(20))]
    got = [item async for item in merge([source.stream() for source in sources])]
    for which, source in enumerate(sources):
        assert [item for number, item in got if number == which] == list(source.items)
    assert all(source.closed for source in sources)


async def test_merge_raises_what_a_stream_raises_and_closes_the_others():
    sources = [Source([1, 2, 3], hang=True), Source([1], fail=ValueError("broken")), Source([], hang=True)]
    with pytest.raises(ValueError, match="broken"):
        async for _ in merge([source.stream() for source in sources]):
            pass
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_the_merge_closes_the_streams(count):
    sources = [Source(range(5), hang=True) for _ in range(count)]
    async with aclosing(merge([source.stream() for source in sources])) as merged:
        await anext(merged)
    assert all(source.closed for source in sources)


def test_reasoning_tokens_are_those_up_to_the_closing_mark():
    count = ReasoningCount()
    steps = [
        (1, False, False),
        (3, True, False),
        (1, False, False),
        (1, False, True),
        (4, False, True),
        (1, False, False),
    ]
    total = sum(count.add(tokens, reasoning=reasoning, content=content) for tokens, reasoning, content in steps)
    assert total + count.end() == 5


def test_an_answer_without_reasoning_counts_none():
    count = ReasoningCount()
    assert [count.add(2, reasoning=False, content=False), count.add(1, reasoning=False, content=True), count.end()] == [
        0
    ] * 3


def test_an_answer_cut_off_in_its_reasoning_is_all_reasoning():
    count = ReasoningCount()
    assert count.add(3, reasoning=True, content=False) + count.add(2, reasoning=False, content=False) + count.end() == 5


def test_cached_tokens_are_the_first_sequences_of_each_prompt():
    counter = UsageCounter(30)
    for prompt, cached in ((0, 4), (0, 16), (1, 8)):
        counter.add(Chunk(request_id="r", token_ids=(1,), num_cached_tokens=cached), prompt)
    usage = counter.usage()
    assert usage.prompt_tokens_details.cached_tokens == 12
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (30, 3, 33)
    assert usage.completion_tokens_details is None
