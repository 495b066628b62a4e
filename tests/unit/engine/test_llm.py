"""`LLM` as a user meets it, over the embedded model: batching, streaming, limits and errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from seamount import LLM, SamplingParams
from seamount.core.errors import (
    ConfigError,
    ContextTooLongError,
    EngineError,
    InvalidRequestError,
    NotFoundError,
)

PROMPTS = ["The server listens on", "seamount serve", "你好", "12 + 30 ="]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    yield LLM("seamount-tiny", dtype="float32", max_num_seqs=8, cache_memory_bytes=4_000_000, num_threads=1)


def load(**options) -> LLM:
    return LLM("seamount-tiny", dtype="float32", num_threads=1, **options)


def assert_all_blocks_free(llm: LLM) -> None:
    stats = llm.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_running == stats.num_waiting == 0


def test_without_guesses_the_block_that_makes_them_takes_no_memory() -> None:
    guessing, plain = (load(speculation=name, cache_memory_bytes=2**23).facts for name in ("mtp", "off"))
    assert plain.weight_bytes < guessing.weight_bytes
    assert plain.num_parameters < guessing.num_parameters
    assert plain.cache_bytes_per_token < guessing.cache_bytes_per_token


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    together = llm.generate(PROMPTS, GREEDY)
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert all(len(c.token_ids) == 12 and c.finish_reason == "length" for c in together)
    assert [c.prompt_token_ids for c in together] == [llm.prompt_encoder.encode_text(p) for p in PROMPTS]
    assert_all_blocks_free(llm)


def test_token_ids_are_prompts_too(llm: LLM) -> None:
    ids = llm.prompt_encoder.encode_text(PROMPTS[0])
    by_text = llm.generate(PROMPTS[0], GREEDY)[0].token_ids
    assert llm.generate(ids, GREEDY)[0].token_ids == by_text
    assert llm.generate([ids, ids], GREEDY)[1].token_ids == by_text


def test_text_is_the_decoding_of_the_tokens(llm: LLM) -> None:
    for completion in llm.generate(PROMPTS, GREEDY):
        assert completion.text == llm.prompt_encoder.decode(completion.token_ids, skip_special_tokens=True)


def test_each_prompt_may_be_sampled_in_its_own_way(llm: LLM) -> None:
    sampling = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (3, 7, 5)]
    told: list[tuple[int, int]] = []
    found = llm.generate(PROMPTS[:3], sampling, on_progress=lambda *done: told.append(done))
    assert [len(completion.token_ids) for completion in found] == [3, 7, 5]
    assert told[-1] == (3, 3)
    with pytest.raises(InvalidRequestError, match="3 prompts and 2"):
        llm.generate(PROMPTS[:3], sampling[:2])


def test_streaming_gives_the_same_answer_in_pieces(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[1], GREEDY)[0]
    deltas = list(llm.stream(PROMPTS[1], GREEDY))
    assert "".join(d.text for d in deltas) == whole.text
    assert tuple(t for d in deltas for t in d.token_ids) == whole.token_ids
    assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert len(deltas) > 5


def test_chat_splits_reasoning_from_content(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    whole = llm.chat(messages, SamplingParams(temperature=0, max_tokens=40))[0]
    deltas = list(llm.stream_chat(messages, SamplingParams(temperature=0, max_tokens=40)))
    assert "".join(d.content for d in deltas) == whole.content
    assert "".join(d.reasoning for d in deltas) == (whole.reasoning or "")
    assert "think>" not in whole.content + (whole.reasoning or "")
    several = llm.chat([messages, messages], SamplingParams(temperature=0, max_tokens=40))
    assert [c.text for c in several] == [whole.text] * 2


def test_a_stopped_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    assert_all_blocks_free(llm)


def test_an_open_stream_keeps_others_out_and_loses_nothing(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], GREEDY)[0].text
    stream = llm.stream(PROMPTS[0], GREEDY)
    pieces = [next(stream).text]
    with pytest.raises(EngineError, match="still open"):
        llm.generate(PROMPTS[1], GREEDY)
    with pytest.raises(EngineError, match="still open"):
        next(llm.stream(PROMPTS[1], GREEDY))
    assert "".join([*pieces, *(delta.text for delta in stream)]) == whole


@pytest.mark.parametrize("prompts", [None, 5, b"abc", [None], [["a"]], [[1.5]], [[True]], [b"abc"]])
def test_a_prompt_of_a_wrong_type_is_refused(llm: LLM, prompts) -> None:
    with pytest.raises(InvalidRequestError):
        llm.generate(prompts, GREEDY)


def test_arguments_of_a_wrong_type_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError):
        llm.generate("a", {"temperature": 0})
    with pytest.raises(InvalidRequestError):
        llm.chat({"role": "user", "content": "a"})


def test_n_continuations_share_the_prompt_and_differ(llm: LLM) -> None:
    prompt = " ".join(["word"] * 60)
    completions = llm.generate(prompt, SamplingParams(n=4, seed=1, temperature=1.5, max_tokens=8, ignore_eos=True))
    assert [c.index for c in completions] == [0, 1, 2, 3]
    assert len({c.token_ids for c in completions}) > 1
    assert all(c.num_cached_tokens > 0 for c in completions[1:])


def test_a_seed_gives_the_same_answer_in_any_company(llm: LLM) -> None:
    params = SamplingParams(seed=42, temperature=1.0, max_tokens=10, ignore_eos=True)
    alone = llm.generate(PROMPTS[2], params)[0].token_ids
    assert llm.generate(PROMPTS, params)[2].token_ids == alone
    others = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True)
    assert len({llm.generate(PROMPTS[2], others)[0].token_ids for _ in range(4)}) > 1


def test_logprobs_cover_each_token(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, ignore_eos=True)
    completion = llm.generate(PROMPTS[0], params)[0]
    assert completion.logprobs is not None
    for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry.chosen.token_id == token_id == entry.top[0].token_id
        assert len(entry.top) == 3
        assert 0 >= entry.top[0].logprob >= entry.top[1].logprob >= entry.top[2].logprob
    assert llm.generate(PROMPTS[0], GREEDY)[0].logprobs is None


def test_a_stop_string_ends_and_is_cut_off(llm: LLM) -> None:
    text = llm.generate(PROMPTS[0], GREEDY)[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    completion = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop))[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_a_stop_token_ends(llm: LLM) -> None:
    tokens = llm.generate(PROMPTS[0], GREEDY)[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(tokens[4],))
    completion = llm.generate(PROMPTS[0], params)[0]
    assert completion.token_ids == tokens[: tokens.index(tokens[4]) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", tokens[4])


def test_end_of_sequence_ends_unless_ignored_or_too_early(llm: LLM) -> None:
    (eos, *_) = llm.prompt_encoder.eos_token_ids
    biased = {"temperature": 0.0, "max_tokens": 4, "logit_bias": {eos: 100.0}}
    assert llm.generate(PROMPTS[0], SamplingParams(**biased))[0].token_ids == (eos,)
    ignoring = llm.generate(PROMPTS[0], SamplingParams(**biased, ignore_eos=True))[0]
    assert (ignoring.token_ids, ignoring.finish_reason) == ((eos,) * 4, "length")
    later = llm.generate(PROMPTS[0], SamplingParams(**biased, min_tokens=2))[0]
    assert len(later.token_ids) == 3 and later.token_ids[-1] == eos
    assert later.finish_reason == "stop"


def test_few_blocks_mean_preemption_and_the_same_answers() -> None:
    roomy, tight = load(), load(max_model_len=64, block_size=4, cache_memory_bytes=80 * 2688)
    prompts = [f"{name} is a long enough prompt to fill some blocks" for name in ("one", "two", "three", "four")]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = [c.token_ids for c in roomy.generate(prompts, params)]
    assert [c.token_ids for c in tight.generate(prompts, params)] == expected
    assert tight.stats().num_preemptions > 0
    assert_all_blocks_free(tight)


def test_small_steps_give_the_same_answers(llm: LLM) -> None:
    chunked = load(max_step_tokens=16)
    prompt = [" ".join(str(i) for i in range(60)), *PROMPTS]
    assert [c.token_ids for c in chunked.generate(prompt, GREEDY)] == [
        c.token_ids for c in llm.generate(prompt, GREEDY)
    ]


def test_a_second_question_reuses_the_first_ones_cache(llm: LLM) -> None:
    prompt = "a conversation that goes on " * 8
    first = llm.generate(prompt, GREEDY)[0]
    second = llm.generate(first.prompt_token_ids + first.token_ids, GREEDY)[0]
    assert second.num_cached_tokens >= len(first.prompt_token_ids) - 16


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([], {}, InvalidRequestError),
        ([10**6], {}, InvalidRequestError),
        ([-1], {}, InvalidRequestError),
        ([5] * 10_000, {}, ContextTooLongError),
        ([5], {"max_tokens": 10_000}, ContextTooLongError),
        ([5], {"logit_bias": {10**6: 1.0}}, InvalidRequestError),
    ],
)
def test_a_bad_request_is_refused_and_leaves_nothing(llm: LLM, prompt, params, error) -> None:
    with pytest.raises(error):
        llm.generate([PROMPTS[0], prompt], SamplingParams(**params))
    assert_all_blocks_free(llm)


def test_the_refusal_of_a_long_prompt_carries_the_numbers(llm: LLM) -> None:
    with pytest.raises(ContextTooLongError, match="10000") as caught:
        llm.generate([[5] * 10_000])
    assert str(llm.facts.max_model_len) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "int3"}, ConfigError),
        ({"block_sise": 4}, ConfigError),
        ({"device": "toaster"}, ConfigError),
        ({"max_model_len": 10**6}, ConfigError),
    ],
)
def test_wrong_options_are_named(options, error) -> None:
    with pytest.raises(error):
        LLM("seamount-tiny", **options)


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(NotFoundError, match="no-such-model"):
        LLM("no-such-model")
