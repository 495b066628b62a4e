"""Tool calls are found in each family's text, however it comes; what is no call stays text."""

from __future__ import annotations

import json
from itertools import count

import pytest

from seamount.models.builtin_templates import DEEPSEEK_R1, DEEPSEEK_V3, DEEPSEEK_V31, LLAMA3, QWEN2, QWEN3
from seamount.models.tools import ArgumentDelta, CallEnded, CallStarted, ContentDelta, ToolEvent, choose_format
from seamount.models.tools_formats import DEEPSEEK, HERMES, LLAMA, CallSyntax
from seamount.models.tools_parser import ToolCallParser
from seamount.models.tools_syntax import JSON_SPACE

NAMES = {"f", "get_weather"}
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def parse(
    syntax: CallSyntax, text: str, size: int = 1 << 20, *, cut: bool = False, must_call: bool = False
) -> list[ToolEvent]:
    numbers = count()
    parser = ToolCallParser(syntax, NAMES, must_call=must_call, new_id=lambda: f"call_{next(numbers)}")
    events: list[ToolEvent] = []
    for start in range(0, len(text), size):
        events += parser.push(text[start : start + size])
    return events + parser.flush(cut=cut)


def told(events: list[ToolEvent]) -> tuple[str, list[tuple[str, str]]]:
    """Return content and calls, having checked that the events come in a call's order."""
    content, calls, is_open = "", [], False
    for event in events:
        match event:
            case ContentDelta(text):
                assert not is_open
                content += text
            case CallStarted(index, call_id, name):
                assert not is_open
                assert (index, call_id) == (len(calls), f"call_{index}")
                calls.append((name, ""))
                is_open = True
            case ArgumentDelta(index, text):
                assert is_open
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + text)
            case CallEnded(index):
                assert is_open
                assert index == len(calls) - 1
                is_open = False
    assert not is_open
    return content, calls


def v3(*calls: tuple[str, str]) -> str:
    return BEGIN + "\n".join(f"{CALL}function{SEP}{n}\n```json\n{a}\n```{CALL_END}" for n, a in calls) + END


def v31(*calls: tuple[str, str]) -> str:
    return BEGIN + "".join(f"{CALL}{n}{SEP}{a}{CALL_END}" for n, a in calls) + END


def hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls)


def llama(*calls: tuple[str, str]) -> str:
    return "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls)


WRITERS = {"v3": (DEEPSEEK, v3), "v31": (DEEPSEEK, v31), "hermes": (HERMES, hermes), "llama": (LLAMA, llama)}
ONE = ("f", '{"a": 1}')
ARGUMENTS = [
    "{}",
    '{"a": 1}',
    '{"a": -1.5e3}',
    '{"a": true}',
    '{"a": null}',
    '{"a": [1, [2, "]"]]}',
    '{"a": {"b": {}}}',
    '{"a": "quote \\" brace } tag </tool_call> ``` 你"}',
    '{\n  "a": "x",\n  "b": 2\n}',
    '{"a":"é","b":[true,false]}',
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("family", WRITERS)
def test_arguments_come_as_they_were_written(family, arguments):
    syntax, write = WRITERS[family]
    text = write(("get_weather", arguments))
    for size in (1, 3, len(text)):
        assert told(parse(syntax, text, size)) == ("", [("get_weather", arguments)])


@pytest.mark.parametrize("family", WRITERS)
def test_several_calls_are_numbered_in_order(family):
    syntax, write = WRITERS[family]
    calls = [ONE, ("get_weather", '{"city": "Köln"}'), ("f", "{}")]
    for size in (1, 4, 1 << 20):
        assert told(parse(syntax, write(*calls), size)) == ("", calls)


@pytest.mark.parametrize("family", ["v3", "v31", "hermes"])
def test_text_in_front_and_behind_is_content_without_the_space_between(family):
    syntax, write = WRITERS[family]
    text = "Let me look.\n\n" + write(ONE) + "\nDone."
    assert told(parse(syntax, text)) == told(parse(syntax, text, 1)) == ("Let me look.\nDone.", [ONE])


@pytest.mark.parametrize("family", WRITERS)
def test_space_alone_round_calls_is_no_content(family):
    syntax, write = WRITERS[family]
    assert told(parse(syntax, f"\n\n{write(ONE)}\n\n", 1)) == ("", [ONE])


@pytest.mark.parametrize(
    ("syntax", "text", "call"),
    [
        (DEEPSEEK, f'{BEGIN}{CALL}f{SEP}{{"a": "b', ("f", '{"a": "b')),
        (DEEPSEEK, f'{BEGIN}{CALL}f{SEP}{{"a": 1}}', ("f", '{"a": 1}')),
        (DEEPSEEK, f'{BEGIN}{CALL}function{SEP}f\n```json\n{{"a": 1}}\n``', ("f", '{"a": 1}')),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": [1, ', ("f", '{"a": [1, ')),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_c', ("f", "{}")),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}', ("f", '{"a": 1}')),
    ],
)
def test_a_call_that_the_answers_end_cuts_off_ends_there(syntax, text, call):
    assert told(parse(syntax, text)) == told(parse(syntax, text, 1)) == ("", [call])


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (DEEPSEEK, BEGIN),
        (DEEPSEEK, f"a {BEGIN}{CALL}"),
        (DEEPSEEK, f"{BEGIN}{CALL}f{SEP}"),
        (DEEPSEEK, f"{BEGIN}{CALL}f{SEP}5{CALL_END}{END}"),
        (DEEPSEEK, f"{BEGIN}{CALL}two words{SEP}{{}}{CALL_END}{END}"),
        (DEEPSEEK, f"{BEGIN}{CALL}{SEP}{{}}{CALL_END}{END}"),
        (DEEPSEEK, f"{BEGIN} nothing {END}"),
        (DEEPSEEK, f"{END} {CALL_END} {SEP}"),
        (DEEPSEEK, f"{BEGIN}{CALL}{'n' * 65}{SEP}{{}}{CALL_END}{END}"),
        (HERMES, "<tool_call>"),
        (HERMES, "<tool_call>f(1)</tool_call>"),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": 5}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": "{}"}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"arguments": {}}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "f", "other": {}}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "f"'),
        (HERMES, "a < b <tool b"),
        (LLAMA, '{"name": "unknown", "parameters": {}}'),
        (LLAMA, '{"answer": 42}'),
        (LLAMA, 'Here: {"name": "f", "parameters": {}}'),
        (LLAMA, "{not json}; either"),
        (LLAMA, ""),
    ],
)
def test_what_is_no_call_is_content_to_the_last_letter(syntax, text):
    assert told(parse(syntax, text)) == told(parse(syntax, text, 1)) == (text, [])


@pytest.mark.parametrize(
    ("syntax", "text", "content"),
    [
        (DEEPSEEK, BEGIN, ""),
        (DEEPSEEK, f"{BEGIN}{CALL}get_weather", ""),
        (DEEPSEEK, f"{BEGIN}{CALL}function{SEP}get_w", ""),
        (DEEPSEEK, f"{BEGIN}{CALL}f{SEP}", ""),
        (DEEPSEEK, f"Let me look.\n\n{BEGIN}{CALL}", "Let me look."),
        (DEEPSEEK, f"{BEGIN}{CALL}two wor", f"{BEGIN}{CALL}two wor"),
        (DEEPSEEK, f"{BEGIN} nothing", f"{BEGIN} nothing"),
        (HERMES, '<tool_call>\n{"name": "f', ""),
        (HERMES, '<tool_call>\n{"arguments": {"a": 1', ""),
        (HERMES, "<tool_call> is the tag", "<tool_call> is the tag"),
        # Any text may go on so: it says too little.
        (HERMES, "a < b or <tool", "a < b or <tool"),
        (LLAMA, '<|python_tag|>{"na', ""),
        (LLAMA, '{"name": "f', '{"name": "f'),
    ],
)
def test_the_head_of_a_call_that_the_answers_length_cuts_off_is_dropped(syntax, text, content):
    for size in (1, 3, len(text)):
        assert told(parse(syntax, text, size, cut=True)) == (content, [])


@pytest.mark.parametrize("family", WRITERS)
def test_an_answer_that_must_call_has_no_content_wherever_it_is_cut(family):
    syntax, write = WRITERS[family]
    text = "\n\n" + write(ONE, *([("get_weather", '{"city": "Köln"}')] if family != "llama" else []))
    for end in range(len(text) + 1):
        whole = told(parse(syntax, text[:end], cut=True, must_call=True))
        assert whole == told(parse(syntax, text[:end], 1, cut=True, must_call=True))
        assert not whole[0].strip()


def test_a_real_call_behind_a_false_one_is_found():
    text = f"<tool_call> is the tag. <tool_call>{{'bad'}}</tool_call>{hermes(ONE)}"
    assert told(parse(HERMES, text, 1)) == ("<tool_call> is the tag. <tool_call>{'bad'}</tool_call>", [ONE])


@pytest.mark.parametrize(
    ("syntax", "text", "arguments", "content"),
    [
        (DEEPSEEK, f"{BEGIN}{CALL}f{SEP}{{\"a\": 'x'}}{CALL_END}{END}", "{\"a\": 'x'}", ""),
        (DEEPSEEK, f'{BEGIN}{CALL}f{SEP}{{"a": 1{CALL_END}{END}ok', '{"a": 1', "ok"),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": x}}\n</tool_call> ok', '{"a": x}}\n', " ok"),
        (LLAMA, '{"name": "f", "parameters": {"a": x}} on', '{"a": x}} on', ""),
    ],
)
def test_arguments_that_are_no_json_go_to_the_closing_mark(syntax, text, arguments, content):
    assert told(parse(syntax, text)) == told(parse(syntax, text, 1)) == (content, [("f", arguments)])


@pytest.mark.parametrize(
    ("syntax", "text", "call"),
    [
        # without the mark of the whole section, and with a fence that is missing
        (DEEPSEEK, f"{CALL}f{SEP}{{}}{CALL_END}", ("f", "{}")),
        (DEEPSEEK, f"{BEGIN}\n{CALL}function{SEP}f\n{{}}{CALL_END}\n{END}", ("f", "{}")),
        # a function whose name is the word that V3 writes first
        (DEEPSEEK, f"{BEGIN}{CALL}function{SEP}{{}}{CALL_END}{END}", ("function", "{}")),
        # another order of members, more of them, none of the arguments
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', ONE),
        (HERMES, '<tool_call>{"type": "function", "name": "f", "parameters": {"a": 1}}</tool_call>', ONE),
        (HERMES, '<tool_call>{"id": "1", "name": "f", "arguments": {"a": 1}}</tool_call>', ONE),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', ("f", "{}")),
        (LLAMA, '<|python_tag|>{"name": "unheard_of", "parameters": {}}', ("unheard_of", "{}")),
        (LLAMA, '{"type": "function", "name": "f", "parameters": {"a": 1}}', ONE),
        (LLAMA, '{"parameters": {"a": 1}, "name": "f"}', ONE),
    ],
)
def test_other_spellings_that_models_use(syntax, text, call):
    assert told(parse(syntax, text)) == told(parse(syntax, text, 1)) == ("", [call])


def test_what_is_certain_is_not_held_back():
    parser = ToolCallParser(HERMES, NAMES, new_id=lambda: "id")
    assert parser.push("Look: <") == [ContentDelta("Look:")]
    assert parser.push("b") == [ContentDelta(" <b")]
    assert parser.push('<tool_call>\n{"name": "f", "arguments": ') == []
    assert parser.push('{"a') == [CallStarted(0, "id", "f"), ArgumentDelta(0, '{"a')]
    assert parser.push('": [1') == [ArgumentDelta(0, '": [1')]
    assert parser.push("]}") == [ArgumentDelta(0, "]}"), CallEnded(0)]
    assert parser.push("}\n</tool_call>") == []


def test_ids_differ():
    parser = ToolCallParser(HERMES, NAMES)
    started = [event for event in parser.push(hermes(ONE, ONE)) if isinstance(event, CallStarted)]
    assert len({event.id for event in started}) == 2
    assert all(event.id.startswith("call_") for event in started)


@pytest.mark.parametrize(
    ("template", "markers", "name"),
    [
        (DEEPSEEK_V3, (), "deepseek_v3"),
        (DEEPSEEK_R1, (BEGIN,), "deepseek_v3"),
        (DEEPSEEK_V31, (BEGIN,), "deepseek_v31"),
        (QWEN2, (), "hermes"),
        (QWEN3, ("<tool_call>",), "hermes"),
        (LLAMA3, ("<|python_tag|>",), "llama3"),
        (LLAMA3, (), "llama3"),
        # R1's distill: a Qwen tokenizer, R1's template
        (DEEPSEEK_R1, ("<tool_call>", "</tool_call>"), "deepseek_v3"),
        ("{{ messages }}", (BEGIN,), "deepseek_v3"),
        ("{{ messages }}", ("<tool_call>",), "hermes"),
        ("{{ messages }}", ("<|im_start|>",), None),
        ("<tool_call>\n<function=f>", ("<tool_call>",), None),
    ],
)
def test_the_template_shows_the_format_else_the_tokenizer(template, markers, name):
    found = choose_format(template, markers)
    assert (found and found.name) == name


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def test_a_grammar_names_markers_and_quotes_letters():
    markers = (BEGIN, END, CALL, SEP, CALL_END)
    form = choose_format(DEEPSEEK_V31, markers)
    assert form is not None
    lines = form.grammar({"f": SCHEMA, "g": {"type": "object"}}).split("\n")
    assert lines[0] == "start: NEWLINES? calls"
    assert lines[2] == f"calls: {BEGIN} call ( call)* {END}"
    assert lines[3] == "call: call_0 | call_1"
    assert lines[4] == f'call_0: {CALL} "f" {SEP} arguments_0 {CALL_END}'
    rule, _, schema = lines[5].partition(" %json ")
    assert rule == "arguments_0:"
    assert json.loads(schema) == {**SCHEMA, "x-guidance": {"whitespace_pattern": JSON_SPACE}}


def test_a_grammar_for_a_tokenizer_without_the_markers_is_letters():
    form = choose_format(QWEN2, ())
    assert form is not None
    assert not form.begins_with_marker
    assert '"<tool_call>\\n{\\"name\\": \\"f\\", \\"arguments\\": " arguments_0 "}\\n</tool_call>"' in form.grammar(
        {"f": {}}
    )


def test_one_call_or_another_answer():
    form = choose_format(QWEN3, ("<tool_call>", "</tool_call>"))
    assert form is not None
    assert form.begins_with_marker
    text = form.grammar({"f": SCHEMA}, several=False, answer={"type": "object"})
    assert "start: NEWLINES? (calls | answer)" in text
    assert "*" not in text.replace("%json", "")
    assert text.split("\n")[-1].startswith("answer: %json {")


def test_tools_are_told_as_the_model_card_tells_them():
    form = choose_format(DEEPSEEK_V31, ())
    assert form is not None
    tool = {"type": "function", "function": {"name": "f", "description": "Does it.", "parameters": SCHEMA}}
    text = form.system_text([tool])
    assert "### f\nDescription: Does it.\n\nParameters: " + json.dumps(SCHEMA) in text
    assert (
        f"{BEGIN}{CALL}tool_call_name{SEP}tool_call_arguments{CALL_END}" + "{additional_tool_calls}" + END + "\n"
    ) in text
    assert text.endswith("without separators or spaces")
