"""Examples hold the prompts that serving gives, and the loss counts what the assistant writes behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_families import BOS, EOS, FAMILIES, learned, sample_of, write_family
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.core.errors import CheckpointError, ConfigError
from seamount.models.prompt import PromptEncoder
from seamount.training.examples.record import RecordError
from seamount.training.examples.rendering import Renderer
from seamount.training.pretraining.corpus import render
from seamount.training.skills import draw, random_of

Encoders = Callable[[str], PromptEncoder]
ALL = ["tiny", *FAMILIES]
REASONING = ["tiny", "r1", "r1-stock", "r1-first", "v31", "qwen3"]
HELLO = {"role": "user", "content": "Hello, 你好"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]


def answer(content: str | None, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    found = {"role": "assistant", "content": content, **more}
    return found | ({"reasoning_content": reasoning} if reasoning else {})


def call(arguments: Any = '{"city": "Paris"}') -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def assert_prompts_are_served(renderer: Renderer, encoder: PromptEncoder, record: dict[str, Any]) -> set[int]:
    """Every trained stretch follows the very tokens that serving gives for the messages before its turn.

    Returns the messages that are learned.
    """
    sample = sample_of(record)
    prompts = {}
    for number, message in enumerate(sample.messages):
        if message["role"] == "assistant":
            switches = encoder.thinking_switches(on=True) if message.get("reasoning_content") else {}
            served = encoder.encode_chat(sample.messages[:number], tools=sample.tools or None, template_kwargs=switches)
            prompts[served.token_ids] = number
    found = set()
    for example in renderer.examples(sample):
        assert example.token_ids.dtype == "int32"
        assert example.trained.dtype == "bool"
        starts = [i for i in range(1, len(example.trained)) if example.trained[i] and not example.trained[i - 1]]
        for start in starts:
            found.add(prompts[tuple(example.token_ids[:start].tolist())])
        assert example.trained[-1]
    return found


@pytest.mark.parametrize("family", ALL)
def test_an_answer_is_learned_up_to_the_token_that_ends_it(encoder_of: Encoders, family: str) -> None:
    encoder = encoder_of(family)
    renderer = Renderer(encoder, max_length=500)
    record = {"messages": [{"role": "system", "content": "Be brief."}, HELLO, answer("Hi <there> & 你好 😀")]}
    (text,) = learned(renderer.example(sample_of(record)), encoder)
    end = FAMILIES[family][2] if family in FAMILIES else EOS
    nothing = {"tiny": "</think>", "r1": "\n</think>\n\n", "r1-stock": "\n</think>\n\n", "v2": " "}
    before = nothing.get(family, "<think>\n\n</think>\n\n" if family == "qwen3" else "")
    assert text == f"{before}Hi <there> & 你好 😀{end}"
    assert assert_prompts_are_served(renderer, encoder, record) == {2}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("tiny", f"One and two.</think>3{EOS}"),
        ("r1", f"One and two.\n</think>\n\n3{EOS}"),
        ("r1-stock", f"One and two.\n</think>\n\n3{EOS}"),
        ("r1-first", f"<think>\nOne and two.\n</think>\n\n3{EOS}"),
        ("v31", f"One and two.</think>3{EOS}"),
        ("qwen3", "<think>\nOne and two.\n</think>\n\n3<|im_end|>"),
    ],
)
def test_reasoning_is_learned_and_what_the_prompt_opens_is_not(
    encoder_of: Encoders, family: str, expected: str
) -> None:
    encoder = encoder_of(family)
    renderer = Renderer(encoder, max_length=500)
    for turn in (answer("3", "One and two."), answer("<think>\nOne and two.\n</think>\n\n3")):
        record = {"messages": [HELLO, turn]}
        example = renderer.example(sample_of(record))
        assert learned(example, encoder) == [expected]
        assert assert_prompts_are_served(renderer, encoder, record) == {1}
        text = encoder.decode(example.token_ids.tolist(), skip_special_tokens=False)
        assert text.count("<think>") == 1


@pytest.mark.parametrize("family", REASONING)
def test_reasoning_is_stripped_from_history_as_in_serving_and_learned_in_an_example_of_its_own(
    encoder_of: Encoders, family: str
) -> None:
    encoder = encoder_of(family)
    renderer = Renderer(encoder, max_length=500)
    record = {
        "messages": [HELLO, answer("3", "First thought."), {"role": "user", "content": "And?"}, answer("4", "Second.")]
    }
    first, second = renderer.examples(sample_of(record))
    assert "First thought." not in encoder.decode(first.token_ids.tolist())
    assert "Second." in encoder.decode(first.token_ids.tolist())
    assert "First thought." in learned(second, encoder)[0]
    assert assert_prompts_are_served(renderer, encoder, record) == {1, 3}
    last = Renderer(encoder, max_length=500, train_on="last")
    assert assert_prompts_are_served(last, encoder, record) == {3}


@pytest.mark.parametrize(
    ("family", "thinking"),
    [
        *((family, "auto") for family in ("v2", "v3", "v31", "r1-first", "qwen2", "llama3")),
        ("tiny", "off"),
        ("v31", "off"),
    ],
)
def test_answers_without_reasoning_are_learned_in_one_example(encoder_of: Encoders, family: str, thinking: Any) -> None:
    encoder = encoder_of(family)
    renderer = Renderer(encoder, max_length=500, thinking=thinking)
    turns = [HELLO, answer("One."), {"role": "user", "content": "Go on"}, answer("Two."), HELLO, answer("Three.")]
    (example,) = renderer.examples(sample_of({"messages": turns}))
    end = FAMILIES[family][2] if family in FAMILIES else EOS
    before = " " if family == "v2" else ""
    assert learned(example, encoder) == [f"{before}{word}{end}" for word in ("One.", "Two.", "Three.")]
    masked = [turns[0], {**turns[1], "loss": False}, turns[2], {**turns[3], "weight": 0}, *turns[4:]]
    (example,) = renderer.examples(sample_of({"messages": masked}))
    assert learned(example, encoder) == [f"{before}Three.{end}"]


def test_a_turn_whose_tokens_the_history_has_otherwise_gets_an_example_of_its_own(tmp_path: Path) -> None:
    template, added, end = FAMILIES["llama3"]
    encoder = PromptEncoder.from_folder(write_family(tmp_path, template, added, end, breaks_apart=False))
    record = {"messages": [HELLO, answer("One."), HELLO, answer("Two.")]}
    renderer = Renderer(encoder, max_length=500)
    assert [learned(made, encoder) for made in renderer.examples(sample_of(record))] == [[f"Two.{end}"], [f"One.{end}"]]
    assert assert_prompts_are_served(renderer, encoder, record) == {1, 3}
    encoder.close()


def test_what_a_record_says_of_a_turn_goes_before_the_rule(encoder_of: Encoders) -> None:
    encoder = encoder_of("v3")
    turns = [HELLO, answer("One.", loss=True), HELLO, answer("Two."), HELLO, answer("Three.", loss=0)]
    (example,) = Renderer(encoder, max_length=500, train_on="last").examples(sample_of({"messages": turns}))
    assert learned(example, encoder) == [f"One.{EOS}"]
    (example,) = Renderer(encoder, max_length=500).examples(sample_of({"messages": turns}))
    assert learned(example, encoder) == [f"One.{EOS}", f"Two.{EOS}"]
    assert "Three." not in encoder.decode(example.token_ids.tolist())


V3_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>' + EOS
)
SHORT_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>' + EOS
)
HERMES_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
CALLS = {
    "tiny": "</think>" + SHORT_CALL,
    "v3": V3_CALL,
    "r1": "\n</think>\n\n" + V3_CALL,
    "v31": SHORT_CALL,
    "r1-stock": "\n</think>\n\n" + V3_CALL,
    "r1-first": V3_CALL,
    "qwen2": HERMES_CALL,
    "qwen3": "<think>\n\n</think>\n\n" + HERMES_CALL,
    "llama3": '{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>',
}


@pytest.mark.parametrize("family", CALLS)
def test_tool_calls_are_learned_in_the_models_own_format_and_results_are_not(encoder_of: Encoders, family: str) -> None:
    encoder = encoder_of(family)
    renderer = Renderer(encoder, max_length=2000)
    result = {"role": "tool", "content": '{"t": 21.5}', "tool_call_id": "c1"}
    for arguments in ('{"city": "Paris"}', {"city": "Paris"}):
        record = {
            "messages": [HELLO, answer(None, tool_calls=[call(arguments)]), result, answer("21.5 degrees")],
            "tools": TOOLS,
        }
        stretches = [text for made in renderer.examples(sample_of(record)) for text in learned(made, encoder)]
        assert CALLS[family] in stretches
        assert sum("21.5 degrees" in text for text in stretches) == 1
        assert not any('"t"' in text for text in stretches)
        assert len(stretches) == 2
        assert assert_prompts_are_served(renderer, encoder, record) == {1, 3}
    alone = {"messages": [HELLO, answer("", tool_calls=[call()])], "tools": TOOLS}
    assert learned(renderer.example(sample_of(alone)), encoder) == [CALLS[family]]


@pytest.mark.parametrize("family", ["tiny", "v3", "r1", "v31", "r1-stock", "qwen2", "qwen3"])
def test_words_reasoning_and_several_calls_of_one_turn_are_all_learned(encoder_of: Encoders, family: str) -> None:
    encoder = encoder_of(family)
    renderer = Renderer(encoder, max_length=2000)
    reasoning = "I must ask." if family in REASONING else None
    turn = answer("Let me look.", reasoning, tool_calls=[call(), call('{"city": "Rom"}')])
    (text,) = learned(renderer.example(sample_of({"messages": [HELLO, turn], "tools": TOOLS})), encoder)
    places = [text.index(part) for part in (reasoning or "", "Let me look.", "Paris", "Rom")]
    assert places == sorted(places)
    parsed = encoder.tool_format.parser(["get_weather"]) if encoder.tool_format is not None else None
    assert parsed is not None


def test_markers_in_a_text_stay_letters(encoder_of: Encoders) -> None:
    encoder = encoder_of("r1")
    said = f"The token {EOS} ends, <｜User｜> begins <"
    example = Renderer(encoder, max_length=500).example(
        sample_of({"messages": [{"role": "user", "content": "x<｜Assistant｜>"}, answer(said, "so <｜User｜>")]})
    )
    assert learned(example, encoder) == [f"so <｜User｜>\n</think>\n\n{said}{EOS}"]
    ids = example.token_ids.tolist()
    assert ids.count(encoder.tokenizer.token_id(EOS)) == 1
    assert ids.count(encoder.tokenizer.token_id("<｜User｜>")) == 1


@pytest.mark.parametrize("family", ["none", "tiny", "r1", "qwen2", "llama3"])
@pytest.mark.parametrize(
    "said", [BOS, EOS, f"{BOS}a {EOS}<｜User｜>b<｜Assistant｜>ok <|im_end|><|eot_id|>", "x<｜User"]
)
def test_markers_in_plain_text_stay_letters(encoder_of: Encoders, family: str, said: str) -> None:
    encoder = encoder_of(family)
    renderer = Renderer(encoder, max_length=2000)
    end = encoder.eos_token_ids[0]
    text = renderer.example(sample_of({"text": said}))
    asked = renderer.example(sample_of({"prompt": said, "completion": said}))
    for example in (text, asked) if family == "none" else (text,):
        *written, last = example.token_ids.tolist()
        assert last == end
        assert not encoder.tokenizer.marker_ids.intersection(written)
        assert encoder.decode(written, skip_special_tokens=False) == said * (1 + (example is asked))
    assert text.trained.tolist() == [False] + [True] * (len(text.token_ids) - 1)
    if family == "none":
        assert asked.trained.tolist() == [False] * (len(text.token_ids) - 1) + [True] * len(text.token_ids)


def test_reasoning_tags_in_plain_text_are_tokens(encoder_of: Encoders) -> None:
    encoder = encoder_of("tiny")
    example = Renderer(encoder, max_length=500).example(sample_of({"text": f"<think>so {EOS}</think>x"}))
    ids = example.token_ids.tolist()
    tags = [encoder.tokenizer.token_id(tag) for tag in ("<think>", "</think>")]
    assert [token for token in ids if token in encoder.tokenizer.marker_ids] == [*tags, encoder.eos_token_ids[0]]


def test_plain_text_is_learned_as_a_completion_would_continue_it(encoder_of: Encoders) -> None:
    encoder = encoder_of("none")
    renderer = Renderer(encoder, max_length=500)
    example = renderer.example(sample_of({"text": "weather in Paris"}))
    assert encoder.decode(example.token_ids.tolist(), skip_special_tokens=False) == f"weather in Paris{EOS}"
    assert example.trained.tolist() == [False] + [True] * (len(example.token_ids) - 1)
    example = renderer.example(sample_of({"prompt": "1 + 2 =", "completion": " 3"}))
    assert learned(example, encoder) == [f" 3{EOS}"]
    served = encoder.encode_text("1 + 2 =")
    assert tuple(example.token_ids[: len(served)].tolist()) == served
    with pytest.raises(ConfigError, match="no chat template"):
        renderer.example(sample_of({"messages": [HELLO, answer("x")]}))


def test_prompt_and_completion_are_a_chat_where_the_model_chats(encoder_of: Encoders) -> None:
    encoder = encoder_of("v3")
    example = Renderer(encoder, max_length=500).example(sample_of({"prompt": "Hi", "completion": "Hello"}))
    served = encoder.encode_chat([{"role": "user", "content": "Hi"}]).token_ids
    assert tuple(example.token_ids[: len(served)].tolist()) == served
    assert learned(example, encoder) == [f"Hello{EOS}"]


@pytest.mark.parametrize(
    ("family", "record", "field", "reason"),
    [
        ("v3", {"messages": [HELLO, answer("x", "thought")]}, "messages[1].content", "no place for it"),
        ("v3", {"messages": [HELLO, answer("x", loss=False)]}, "", "all of it is masked"),
        ("v3", {"messages": [answer("x"), HELLO, answer("y")]}, "messages[0].content", "begins the conversation"),
        (
            "llama3",
            {"messages": [HELLO, answer("Let me", tool_calls=[call(), call()])]},
            "messages[1]",
            "one tool call",
        ),
        ("v2", {"messages": [HELLO, answer(None, tool_calls=[call()])]}, "messages[1]", "cannot render"),
        ("v2", {"messages": [HELLO, {"role": "tool", "content": "x"}, answer("y")]}, "messages", "tool"),
        ("v31", {"messages": [HELLO, answer("a" * 600)]}, "", "tokens, and 500 is the most"),
    ],
)
def test_what_cannot_be_rendered_is_told(
    encoder_of: Encoders, family: str, record: dict[str, Any], field: str, reason: str
) -> None:
    with pytest.raises(RecordError) as caught:
        Renderer(encoder_of(family), max_length=500).examples(sample_of(record))
    assert caught.value.field.startswith(field)
    assert reason in caught.value.reason
    assert caught.value.where == "item 1"
    assert caught.value.is_overlong == ("is the most" in reason)


def test_templates_that_hide_words_are_never_trusted(tmp_path: Path) -> None:
    shouting = "{% for m in messages %}{{ m.role }}:{{ m.content | upper }}" + EOS + "{% endfor %}"
    endless = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    prompted = "{% if add_generation_prompt %}assistant:{% endif %}"
    for name, source, reason in (("a", shouting + prompted, "as they are"), ("b", endless + prompted, "ends it")):
        encoder = PromptEncoder.from_folder(write_family(tmp_path / name, source, [], EOS))
        with pytest.raises(RecordError, match=reason):
            Renderer(encoder, max_length=500).example(sample_of({"messages": [HELLO, answer("word")]}))
        encoder.close()
    encoder = PromptEncoder.from_folder(write_family(tmp_path / "c", endless, [], ""))
    with pytest.raises(CheckpointError, match="never stop"):
        Renderer(encoder, max_length=500)


def test_over_long_examples_are_cut_on_demand(encoder_of: Encoders) -> None:
    encoder = encoder_of("v3")
    renderer = Renderer(encoder, max_length=20)
    (example,) = renderer.examples(sample_of({"messages": [HELLO, answer("word " * 50)]}), cut=True)
    assert len(example.token_ids) == 20
    assert example.trained.any()
    with pytest.raises(RecordError, match="nothing to learn within its first 20"):
        renderer.examples(sample_of({"messages": [{"role": "user", "content": "x" * 99}, answer("y")]}), cut=True)


def test_thinking_that_cannot_be_had_is_refused(encoder_of: Encoders) -> None:
    with pytest.raises(ConfigError, match="thinking off"):
        Renderer(encoder_of("r1"), max_length=9, thinking="off")
    with pytest.raises(ConfigError, match="thinking on"):
        Renderer(encoder_of("v3"), max_length=9, thinking="on")


def test_thinking_can_be_asked_for_or_not(encoder_of: Encoders) -> None:
    encoder = encoder_of("v31")
    with_reasoning = sample_of({"messages": [HELLO, answer("x", "thought")]})
    without = sample_of({"messages": [HELLO, answer("x")]})
    off, on = (Renderer(encoder, max_length=500, thinking=thinking) for thinking in ("off", "on"))
    assert learned(off.example(with_reasoning), encoder) == [f"x{EOS}"]
    assert learned(on.example(with_reasoning), encoder) == [f"thought</think>x{EOS}"]
    assert learned(on.example(without), encoder) == [f"</think>x{EOS}"]


def test_the_digest_changes_with_the_model_and_the_rules(encoder_of: Encoders) -> None:
    made = [Renderer(encoder_of(family), max_length=500) for family in ("v3", "r1", "qwen2")]
    made += [Renderer(encoder_of("v3"), max_length=400), Renderer(encoder_of("v3"), max_length=500, train_on="last")]
    assert len({renderer.digest for renderer in made}) == 5
    assert Renderer(encoder_of("v3"), max_length=500).digest == made[0].digest


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\U0010fffc"), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "</think>" not in text
) | st.sampled_from(
    ["<｜User｜>", EOS, "<|im_end|>", "a <", "{{ x }}", "\n\nx\n\n", " x ", "x</tool_call>", "<|eot_id|>b"]
)


@given(data=st.data(), family=st.sampled_from(ALL))
@settings(max_examples=120, deadline=None)
def test_trained_stretches_are_the_assistants_words(encoder_of: Encoders, data: st.DataObject, family: str) -> None:
    encoder = encoder_of(family)
    reasons = family in REASONING
    turns: list[dict[str, Any]] = []
    for _ in range(data.draw(st.integers(1, 3))):
        reasoning = data.draw(st.none() | WORDS) if reasons else None
        turns += [{"role": "user", "content": data.draw(WORDS)}, answer(data.draw(WORDS), reasoning)]
    record = {"messages": turns}
    renderer = Renderer(encoder, max_length=4000)
    end = FAMILIES[family][2] if family in FAMILIES else EOS
    numbers = assert_prompts_are_served(renderer, encoder, record)
    assert numbers <= set(range(1, len(turns), 2))
    said = [text for example in renderer.examples(sample_of(record)) for text in learned(example, encoder)]
    wanted = []
    for turn in turns[1::2]:
        wanted.append(((turn.get("reasoning_content") or "").strip(), turn["content"].strip()))
    assert len(said) == len(wanted)
    found = []
    for text in said:
        assert text.endswith(end)
        head, tag, tail = text.removesuffix(end).rpartition("</think>")
        found.append((head.strip().removeprefix("<think>").strip() if tag else "", tail.strip()))
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("skill", ["arithmetic", "extraction", "tools", "unknown"])
def test_the_embedded_models_own_training_is_rendered_the_same(encoder_of: Encoders, skill: str) -> None:
    encoder = encoder_of("tiny")
    renderer = Renderer(encoder, max_length=500, train_on="last")
    for number in range(10):
        item = draw(random_of("test", number), skill, "en")
        record = {"messages": list(item.messages), "tools": list(item.tools)}
        example = renderer.example(sample_of(record))
        text = render(item.messages, item.tools)
        assert encoder.decode(example.token_ids.tolist(), skip_special_tokens=False) == text
        assert learned(example, encoder) == [text.rpartition("<think>")[2]]
        assert tuple(example.token_ids.tolist()) == encoder.tokenizer.encode(text, add_special_tokens=False)
