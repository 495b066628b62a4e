"""The official client against a real server: the answers it reads are the ones that were meant."""

from __future__ import annotations

import asyncio

import openai
import pytest

from seamount.core.errors import EngineError, QueueFullError
from seamount.core.requests import Request
from seamount.engine.fake import FakeEngine, say

THOUGHT = "<think>\nzwei und zwei\n</think>\n\nVier. 四。"
ASK = [{"role": "user", "content": "2+2?"}]


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


async def test_sync_client_chats_and_streams(serve):
    running = await serve(FakeEngine(say(THOUGHT)))

    def use() -> tuple[str, str, str]:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as api:
            whole = api.chat.completions.create(model="fake", messages=ASK)
            message = whole.choices[0].message
            stream = api.chat.completions.create(model="fake", messages=ASK, stream=True)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return message.content, message.reasoning_content, streamed

    content, reasoning, streamed = await asyncio.to_thread(use)
    assert content == streamed == "Vier. 四。"
    assert reasoning == "zwei und zwei"


async def test_async_client_gets_reasoning_usage_and_one_constant_id(serve):
    running = await serve(FakeEngine(say(THOUGHT), num_cached_tokens=3))
    async with client(running.url) as api:
        stream = await api.chat.completions.create(
            model="fake", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert len({(chunk.id, chunk.model, chunk.created, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "zwei und zwei"
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "zwei und zwei"
    assert "".join(delta.content or "" for delta in deltas) == "Vier. 四。"
    assert chunks[-2].choices[0].finish_reason == "stop"
    usage = chunks[-1].usage
    assert chunks[-1].choices == []
    # The two marks and the end of the answer are a token each, all else is bytes.
    reasoning_tokens = len(b"\nzwei und zwei\n") + 2 + 2
    assert usage.completion_tokens == reasoning_tokens + len("Vier. 四。".encode()) + 1
    assert usage.completion_tokens_details.reasoning_tokens == reasoning_tokens
    assert usage.prompt_tokens == len("user: 2+2?\n") + 2
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 3


async def test_no_usage_chunk_unless_asked(serve):
    running = await serve(FakeEngine(say("ok")))
    async with client(running.url) as api:
        stream = await api.chat.completions.create(model="fake", messages=ASK, stream=True)
        chunks = [chunk async for chunk in stream]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


async def test_thinking_switch_starts_the_answer_in_reasoning(serve):
    running = await serve(FakeEngine(say("hm</think>ja")))
    async with client(running.url) as api:
        whole = await api.chat.completions.create(
            model="fake", messages=ASK, extra_body={"chat_template_kwargs": {"thinking": True}}
        )
    assert (whole.choices[0].message.reasoning_content, whole.choices[0].message.content) == ("hm", "ja")


async def test_n_answers_stay_apart(serve):
    running = await serve(FakeEngine(say("eins", "zwei", "drei")))
    async with client(running.url) as api:
        whole = await api.chat.completions.create(model="fake", messages=ASK, n=3)
        texts = ["", "", ""]
        async for chunk in await api.chat.completions.create(model="fake", messages=ASK, n=3, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [choice.message.content for choice in whole.choices] == texts == ["eins", "zwei", "drei"]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]


async def test_sampling_reaches_the_engine_as_sent(serve):
    seen: list[Request] = []

    def reply(request: Request, index: int) -> tuple[int, ...]:
        seen.append(request)
        return (65,)

    running = await serve(FakeEngine(reply))
    async with client(running.url) as api:
        await api.chat.completions.create(
            model="fake",
            messages=ASK,
            temperature=0.25,
            top_p=0.5,
            seed=-7,
            max_completion_tokens=9,
            max_tokens=11,
            presence_penalty=1,
            frequency_penalty=-1,
            logit_bias={"65": 2},
            stop=["x", "y"],
            extra_body={
                "top_k": 4,
                "min_p": 0.125,
                "repetition_penalty": 1.5,
                "min_tokens": 2,
                "stop_token_ids": [7],
                "ignore_eos": True,
                "skip_special_tokens": False,
            },
        )
    sampling = seen[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 4, 0.125)
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (-7, 9, 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert (sampling.logit_bias, sampling.stop, sampling.stop_token_ids) == ({65: 2.0}, ("x", "y"), (7,))
    assert sampling.ignore_eos
    assert not seen[0].skip_special_tokens


async def test_stop_string_is_cut_off_and_named(serve):
    running = await serve(FakeEngine(say("one END two")))
    async with client(running.url) as api:
        whole = await api.chat.completions.create(model="fake", messages=ASK, stop="END")
        stream = await api.chat.completions.create(model="fake", messages=ASK, stop="END", stream=True)
        streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert whole.choices[0].message.content == streamed == "one "
    assert whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].stop_reason == "END"


async def test_chat_logprobs_cover_every_token_streamed_or_not(serve):
    running = await serve(FakeEngine(say("é!")))
    async with client(running.url) as api:
        whole = await api.chat.completions.create(model="fake", messages=ASK, logprobs=True, top_logprobs=2)
        stream = await api.chat.completions.create(
            model="fake", messages=ASK, logprobs=True, top_logprobs=2, stream=True
        )
        streamed = [
            entry async for chunk in stream if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
        ]
    content = whole.choices[0].logprobs.content
    assert content == streamed
    assert bytes(content[0].bytes + content[1].bytes).decode() == "é"
    assert content[0].token == "\ufffd"
    assert [len(entry.top_logprobs) for entry in content] == [2] * len(content)
    assert len(content) == whole.usage.completion_tokens


async def test_completions_take_all_four_prompt_forms(serve):
    running = await serve(FakeEngine())  # echo
    async with client(running.url) as api:
        answers = [
            (await api.completions.create(model="fake", prompt=prompt, max_tokens=50)).choices
            for prompt in ("ab", ["ab", "cd"], [97, 98], [[97, 98], [99, 100]])
        ]
    assert [[choice.text for choice in choices] for choices in answers] == [["ab"], ["ab", "cd"], ["ab"], ["ab", "cd"]]


async def test_completions_stream_several_prompts_side_by_side(serve):
    running = await serve(FakeEngine())
    async with client(running.url) as api:
        stream = await api.completions.create(
            model="fake", prompt=["left", "right"], n=2, max_tokens=50, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        texts = [""] * 4
        usage = None
        async for chunk in stream:
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts == ["left", "left", "right", "right"]
    assert usage.prompt_tokens == len("left") + len("right") + 2


async def test_completion_logprobs_are_columns(serve):
    running = await serve(FakeEngine())
    async with client(running.url) as api:
        whole = await api.completions.create(model="fake", prompt=[97, 98], max_tokens=2, logprobs=2)
    logprobs = whole.choices[0].logprobs
    assert logprobs.tokens == ["a", "b"]
    assert logprobs.text_offset == [0, 1]
    assert logprobs.token_logprobs == [-0.5, -0.5]
    assert logprobs.top_logprobs == [{"a": -0.5, "b": -1.5}, {"b": -0.5, "c": -1.5}]


async def test_completions_default_to_sixteen_tokens_and_say_so(serve):
    running = await serve(FakeEngine(say("x" * 40)))
    async with client(running.url) as api:
        choice = (await api.completions.create(model="fake", prompt="a")).choices[0]
    assert (choice.text, choice.finish_reason) == ("x" * 16, "length")


async def test_models_are_listed(serve):
    running = await serve(FakeEngine(), served_model_name="org/mine")
    async with client(running.url) as api:
        listed = [model async for model in api.models.list()]
        one = await api.models.retrieve("org/mine")
        with pytest.raises(openai.NotFoundError) as missing:
            await api.chat.completions.create(model="other", messages=ASK)
    assert [model.id for model in listed] == [one.id] == ["org/mine"]
    assert (one.owned_by, one.root, one.max_model_len) == ("seamount", "fake", 4096)
    assert missing.value.code == "model_not_found"


async def test_failure_midway_is_an_error_chunk_and_no_done(serve):
    running = await serve(FakeEngine(say("abcdef"), fail_after_tokens=2, failure=EngineError("The engine broke.")))
    async with client(running.url) as api:
        text = ""
        with pytest.raises(openai.APIError, match="The engine broke"):
            async for chunk in await api.chat.completions.create(model="fake", messages=ASK, stream=True):
                text += chunk.choices[0].delta.content or ""
        with pytest.raises(openai.InternalServerError, match="The engine broke"):
            await api.chat.completions.create(model="fake", messages=ASK)
    assert text == "ab"


async def test_failure_before_the_first_token_keeps_its_status(serve):
    full = QueueFullError("The queue is full.", retry_after=2.5)
    running = await serve(FakeEngine(fail_after_tokens=0, failure=full))
    async with client(running.url) as api:
        with pytest.raises(openai.InternalServerError) as caught:
            await api.chat.completions.create(model="fake", messages=ASK, stream=True)
    assert caught.value.status_code == 503
    assert caught.value.code == "queue_full"
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.response.headers["retry-after-ms"] == "2500"


async def test_a_dead_worker_gives_an_error_chunk_and_the_next_request_succeeds(serve):
    half = asyncio.Event()
    count = 0

    async def pause() -> None:
        nonlocal count
        count += 1
        if count == 3:
            half.set()
            await asyncio.Event().wait()

    engine = FakeEngine(say("abcdef"), pause=pause)
    running = await serve(engine)
    async with client(running.url) as api:
        stream = await api.chat.completions.create(model="fake", messages=ASK, stream=True)
        await half.wait()
        engine.kill_worker()
        with pytest.raises(openai.APIError, match="worker"):
            async for _ in stream:
                pass
        following = asyncio.create_task(api.chat.completions.create(model="fake", messages=ASK))
        await asyncio.sleep(0)
        engine.restart_worker()
        assert (await following).choices[0].message.content == "abcdef"
