"""Structured outputs hold under everything: random schemas, traffic, guesses, preemption, shared prefixes, thoughts.

The embedded model knows nothing of these schemas, and at temperature 1 and above it says what comes: what the grammar
does not enforce would show at once.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount import LLM, SamplingParams, kernels
from seamount.core.requests import Chunk, Request
from seamount.core.sampling import Grammar
from seamount.core.settings import EngineConfig
from seamount.engine.build import build_engine
from seamount.engine.engine import EngineCore
from seamount.engine.grammar import LIMITS, Grammars
from seamount.models.prompt import PromptEncoder

# Its check of `time` is that of an early draft, without the offset that RFC 3339 asks for.
FORMATS = jsonschema.FormatChecker(set(jsonschema.FormatChecker.checkers) - {"time"})
THINKING = "<｜User｜>Count from 1 to 3.<｜Assistant｜><think>"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    yield LLM("seamount-tiny", num_threads=1, max_model_len=512)


# Bounded, so that most answers end; the model would fill unbounded strings and lists for as long as it may.
words = st.text('abcxyz"\\é \n', max_size=4)
bounds = st.tuples(st.integers(-50, 50), st.integers(0, 99)).map(lambda pair: (pair[0], pair[0] + pair[1]))
leaves = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    bounds.map(lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[1]}),
    bounds.map(lambda pair: {"type": "number", "minimum": pair[0], "exclusiveMaximum": pair[1] + 1, "multipleOf": 0.5}),
    st.integers(1, 6).map(lambda n: {"type": "string", "minLength": n // 2, "maxLength": n}),
    st.sampled_from(["^[ab]{2}$", "^x?y+z{1,2}$", r"^\d{1,3}-\w$"]).map(
        lambda p: {"type": "string", "pattern": p, "maxLength": 6}
    ),
    st.sampled_from(["date", "ipv4", "uuid", "time"]).map(lambda name: {"type": "string", "format": name}),
    st.lists(st.none() | st.booleans() | st.integers(-99, 99) | words, min_size=1, max_size=3).map(
        lambda v: {"enum": v}
    ),
    words.map(lambda value: {"const": {"k": [value]}}),
    st.just({"type": ["null", "boolean"]}),
    st.just({"$ref": "#/$defs/pair"}),
)


def _branches(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def array(drawn: tuple[Any, int, int]) -> dict[str, Any]:
        items, least, more = drawn
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}

    def thing(drawn: tuple[dict[str, Any], set[str], bool]) -> dict[str, Any]:
        properties, optional, closed = drawn
        required = [name for name in properties if name not in optional]
        made: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
        return (
            made | {"additionalProperties": False if closed else {"type": "null"}, "maxProperties": len(properties) + 1}
            if not (optional or closed)
            else made | {"additionalProperties": False}
        )

    return st.one_of(
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(array),
        st.lists(inner, min_size=1, max_size=2).map(
            lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        ),
        st.tuples(
            st.dictionaries(st.text('abc"é', min_size=1, max_size=3), inner, max_size=3),
            st.sets(st.text('abc"é', min_size=1, max_size=1), max_size=2),
            st.booleans(),
        ).map(thing),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    )


schemas = st.recursive(leaves, _branches, max_leaves=5).map(
    lambda schema: {
        "title": "a random one",
        "type": "object",
        "properties": {"v": schema},
        "required": ["v"],
        "additionalProperties": False,
        "$defs": {"pair": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}},
    }
)


@settings(max_examples=25)
@given(schema=schemas, seed=st.integers(0, 2**31), temperature=st.sampled_from([0.0, 1.0, 1.0, 2.0]))
def test_what_is_sampled_is_valid(llm: LLM, schema: dict[str, Any], seed: int, temperature: float) -> None:
    sampling = SamplingParams(
        temperature=temperature, seed=seed, n=1 if temperature == 0 else 2, max_tokens=120,
        grammar=Grammar("json_schema", json.dumps(schema)),
    )  # fmt: skip
    answers = llm.generate("Extract: Ada, 36.\n", sampling)
    for answer in answers:
        if answer.finish_reason == "stop":
            value = json.loads(answer.text)
            jsonschema.validate(value, schema, format_checker=FORMATS)
        else:
            assert answer.finish_reason == "length"


def test_most_answers_end_by_themselves(llm: LLM) -> None:
    """So that the test above has something to look at."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 8}, "b": {"type": "boolean"}}}
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    sampling = SamplingParams(temperature=1.0, n=20, max_tokens=200, grammar=Grammar("json_schema", json.dumps(schema)))
    answers = llm.generate("A person:\n", sampling)
    assert sum(answer.finish_reason == "stop" for answer in answers) >= 18
    assert len({answer.text for answer in answers}) > 10


GRAMMARS = (
    None,
    None,
    Grammar("json_object"),
    Grammar("json_schema", json.dumps({"type": "array", "items": {"enum": ["one", 2, None]}, "maxItems": 4})),
    Grammar("regex", "[a-z]{1,6}( [0-9]{1,3}){0,4}"),
    Grammar("ebnf", 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]?/'),
)
CHOICES: dict[str, tuple[Any, ...]] = {
    "grammar": GRAMMARS,
    "temperature": (0.0, 0.7, 1.5),
    "top_p": (1.0, 0.9),
    "top_k": (0, 0, 20),
    "max_tokens": (1, 3, 12, 40),
    "min_tokens": (0, 0, 1),
    "ignore_eos": (False, False, True),
    "stop": ((), (), ("1",)),
    "repetition_penalty": (1.0, 1.2),
    "logit_bias": ({}, {}, {5: 4.0, 250: -100.0}),
    "logprobs": (None, 2),
    "n": (1, 1, 3),
}
PROMPTS = (THINKING, "<｜User｜>Count from 1 to 12.<｜Assistant｜></think>", "12 + 30 = 42\n12 + 31 = 43\n12 + 32 =")
Outcomes = dict[tuple[str, int], list[Chunk]]


def config(speculation: Any, **options: Any) -> EngineConfig:
    return EngineConfig(num_threads=1, max_model_len=96, speculation=speculation, **options)


def run(engine: EngineCore, requests: list[Request], arrivals: list[int]) -> Outcomes:
    found: Outcomes = {}
    waiting = sorted(zip(arrivals, requests, strict=True), key=lambda pair: pair[0])
    step = 0
    while waiting or not engine.idle:
        while waiting and waiting[0][0] <= step:
            engine.add(waiting.pop(0)[1])
        for chunk in engine.step():
            found.setdefault((chunk.request_id, chunk.index), []).append(chunk)
        step += 1
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    return found


def seen(chunks: list[Chunk]) -> tuple[Any, ...]:
    """All that a caller sees of a sequence, however it was cut into chunks."""
    return (
        [token_id for chunk in chunks for token_id in chunk.token_ids],
        [entry for chunk in chunks for entry in chunk.logprobs],
        "".join(chunk.text for chunk in chunks),
        chunks[-1].finish_reason,
        chunks[-1].stop_reason,
        chunks[-1].error,
    )


def random_requests(chance: random.Random, encoder: PromptEncoder, count: int) -> list[Request]:
    made = []
    for number in range(count):
        sampling = {name: chance.choice(values) for name, values in CHOICES.items()}
        prompt = encoder.encode_text(chance.choice(PROMPTS))
        params = SamplingParams(seed=chance.randrange(1000), **sampling)
        made.append(Request(id=f"{number}", prompt_token_ids=prompt, sampling=params))
    return made


TIGHT = {"block_size": 4, "max_step_tokens": 24, "cache_memory_bytes": 116 * 6 * 112 * 2}


@pytest.mark.skipif(kernels.library() is None, reason="only compiled kernels give every row its own bits")
def test_traffic_with_grammars_and_without_gives_each_its_own_bits() -> None:
    by_itself, encoder = build_engine(config("off", enable_prefix_cache=False))
    crowd, _ = build_engine(config("mtp", **TIGHT))
    for seed in range(4):
        chance = random.Random(seed)
        requests = random_requests(chance, encoder, 10)
        expected: Outcomes = {}
        for request in requests:
            expected |= run(by_itself, [request], [0])
        found = run(crowd, requests, [chance.randrange(12) for _ in requests])
        assert {key: seen(chunks) for key, chunks in found.items()} == {
            key: seen(chunks) for key, chunks in expected.items()
        }
    stats = crowd.stats()
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hit_tokens > 0
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens


@pytest.mark.parametrize("speculation", ["off", "mtp"])
def test_grammars_hold_whatever_else_is_asked(speculation: str) -> None:
    engine, encoder = build_engine(config(speculation))
    requests = random_requests(random.Random(7), encoder, 40)
    shapes = {GRAMMARS[3]: r"\[.*\]", GRAMMARS[4]: GRAMMARS[4].text, GRAMMARS[5]: r"[1-9][0-9]?(\+[1-9][0-9]?)*"}
    num_checked = 0
    by_id = {request.id: request for request in requests}
    for (request_id, _), chunks in run(engine, requests, [0] * len(requests)).items():
        sampling = by_id[request_id].sampling
        _, _, text, finish_reason, stop_reason, _ = seen(chunks)
        thinks = by_id[request_id].prompt_token_ids == encoder.encode_text(THINKING)
        if sampling.grammar not in shapes or finish_reason != "stop" or stop_reason is not None:
            continue
        answer = text.partition("</think>")[2] if thinks else text
        assert re.fullmatch(shapes[sampling.grammar], answer, re.DOTALL), text
        num_checked += 1
    assert num_checked > 5


def test_an_answer_after_thoughts_is_parsed_apart(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=300, grammar=Grammar("json_object"))
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    (thoughtful,) = llm.chat(messages, sampling, chat_template_kwargs={"thinking": True})
    (quick,) = llm.chat(messages, sampling, chat_template_kwargs={"thinking": False})
    assert thoughtful.reasoning and not thoughtful.reasoning.startswith("{")
    assert thoughtful.content.startswith("{") and quick.content.startswith("{")
    assert quick.reasoning is None


def one(llm: LLM, text: str, **sampling: Any) -> Any:
    grammar = Grammar("regex", text)
    return llm.generate(
        "abc", SamplingParams(**{"temperature": 1.0, "seed": 3, "max_tokens": 60, "grammar": grammar, **sampling})
    )[0]


def test_a_complete_answer_ends_with_stop_whatever_asks_for_more(llm: LLM) -> None:
    assert one(llm, "ab").text == "ab"
    for more in ({"min_tokens": 50}, {"ignore_eos": True}, {"logit_bias": {1: -100.0}}):
        answer = one(llm, "ab|cd", **more)
        assert (answer.text in ("ab", "cd"), answer.finish_reason, answer.stop_reason) == (True, "stop", None)


@pytest.mark.parametrize("more", [{"min_tokens": 40}, {"ignore_eos": True, "max_tokens": 40}])
def test_what_may_end_goes_on_where_more_is_asked(llm: LLM, more: dict[str, Any]) -> None:
    answer = one(llm, "[a-z]+", **more)
    assert len(answer.token_ids) >= 40
    assert re.fullmatch("[a-z]+", answer.text)


def test_stop_strings_and_limits_cut_an_answer_short(llm: LLM) -> None:
    cut = one(llm, "[0-9]{30}x", stop=("x", "77777"), max_tokens=3)
    assert (cut.finish_reason, cut.text.isdigit()) == ("length", True)
    stopped = one(llm, "[ab]{9}!end", stop=("!",))
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "!")
    assert re.fullmatch("[ab]{9}", stopped.text)


def test_bias_opens_no_way_and_closes_not_the_last(llm: LLM) -> None:
    (a,) = llm.prompt_encoder.tokenizer.encode_inside("a")
    (b,) = llm.prompt_encoder.tokenizer.encode_inside("b")
    assert one(llm, "b", logit_bias={a: 100.0, b: -100.0}).text == "b"
    assert one(llm, "a|b", logit_bias={a: 100.0}, temperature=0).text == "a"


def test_logprobs_are_those_of_the_raw_logits(llm: LLM) -> None:
    """The model's own opinion of a token that it was made to take."""
    forced = one(llm, "qx", logprobs=3)
    free = llm.generate("abc", SamplingParams(temperature=0, max_tokens=1, logprobs=3))[0]
    assert forced.logprobs[0].top == free.logprobs[0].top
    assert forced.logprobs[0].chosen.logprob < free.logprobs[0].top[0].logprob


def test_a_bad_grammar_fails_its_own_request_only() -> None:
    engine, encoder = build_engine(config("off"))
    prompt = encoder.encode_text("abc")
    plain = Request(id="plain", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=5, ignore_eos=True))
    bad = Request(id="bad", prompt_token_ids=prompt, sampling=SamplingParams(n=3, grammar=Grammar("regex", "(")))
    found = run(engine, [plain, bad], [0, 0])
    assert len(seen(found["plain", 0])[0]) == 5
    (chunk,) = found["bad", 0]
    assert chunk.finish_reason == "error" and chunk.error is not None and chunk.error["kind"] == "InvalidRequestError"


def test_a_grammar_without_end_keeps_nobody_else_waiting() -> None:
    """Its compilation is given a second of processor time, in which the others' tokens come."""
    engine, encoder = build_engine(config("off"))
    engine._grammars = Grammars(encoder, engine.facts.vocab_size, cpu_limit_s=1.0)
    patterns = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(5, 60)]
    bomb = SamplingParams(grammar=Grammar("json_schema", json.dumps({"allOf": patterns})))
    prompt = encoder.encode_text("abc")
    engine.add(Request(id="bomb", prompt_token_ids=prompt, sampling=bomb))
    engine.add(Request(id="plain", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=20, ignore_eos=True)))
    order = []
    while not engine.idle:
        order += [chunk.request_id for chunk in engine.step()]
    assert order == ["plain"] * 20 + ["bomb"]


def test_one_answer_that_fails_gives_its_request_up_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "max_lexer_states", 40)
    engine, encoder = build_engine(config("mtp"))
    prompt = encoder.encode_text("abc")
    sampling = SamplingParams(n=3, seed=1, temperature=1.0, grammar=Grammar("regex", "[ab]{900}c"))
    plain = Request(id="plain", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=60, ignore_eos=True))
    found = run(engine, [plain, Request(id="bad", prompt_token_ids=prompt, sampling=sampling)], [0, 0])
    assert len(seen(found["plain", 0])[0]) == 60
    ends = {found["bad", index][-1].finish_reason for index in range(3)}
    assert "error" in ends and ends <= {"abort", "error"}


def test_a_request_that_waits_for_its_grammar_can_be_aborted() -> None:
    engine, encoder = build_engine(config("off"))
    sampling = SamplingParams(n=2, grammar=Grammar("regex", "a{3}"))
    engine.add(Request(id="r", prompt_token_ids=encoder.encode_text("abc"), sampling=sampling))
    assert engine.stats().num_waiting == 2 and not engine.idle
    chunks = engine.abort("r")
    assert [(chunk.index, chunk.finish_reason) for chunk in chunks] == [(0, "abort"), (1, "abort")]
    assert engine.idle and engine.step() == []
