"""Whatever a forced call's grammar lets a model write, the parser reads as calls with arguments of the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import Grammar
from seamount.engine.grammar import Compiled, Constraint, Grammars
from seamount.engine.grammar_schema import enforceable
from seamount.models.builtin_templates import DEEPSEEK_V3, DEEPSEEK_V31, LLAMA3, QWEN3
from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder
from seamount.models.tools import ArgumentDelta, CallStarted, ContentDelta, choose_format

VOCAB_SIZE = 4096
SCHEMAS: dict[str, dict[str, Any]] = {
    "set_speed": {
        "type": "object",
        "properties": {"id": {"enum": ["a", 'b"}']}, "value": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["id", "value"],
        "additionalProperties": False,
    },
    "stop": {"type": "object", "properties": {"now": {"type": "boolean"}}, "additionalProperties": False},
}
ANSWER = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture(scope="module")
def encoder() -> Iterator[PromptEncoder]:
    made = PromptEncoder.from_folder(locate_model("seamount-tiny"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def grammars(encoder: PromptEncoder) -> Grammars:
    return Grammars(encoder, VOCAB_SIZE)


def ramble(encoder: PromptEncoder, compiled: Compiled, random: Random) -> str:
    """Say anything that is allowed, and stop when it may end, now and then."""
    constraint = Constraint(compiled, thinks=False)
    token_ids: list[int] = []
    while True:
        allowed = constraint.allowed.nonzero().flatten().tolist()
        may_end = any(token_id in encoder.eos_token_ids for token_id in allowed)
        words = [token_id for token_id in allowed if token_id not in encoder.eos_token_ids]
        if not words or (may_end and random.random() < 0.5):
            return encoder.decode(token_ids)
        token_ids.append(random.choice(words))
        if constraint.accept(token_ids[-1]):
            return encoder.decode(token_ids)


@pytest.mark.parametrize("template", [DEEPSEEK_V3, DEEPSEEK_V31, QWEN3, LLAMA3], ids=["v3", "v31", "hermes", "llama"])
@pytest.mark.parametrize("several", [True, False])
def test_what_is_allowed_is_read_as_calls(encoder, grammars, template, several):
    markers = {encoder.tokenizer.added_tokens[token_id] for token_id in encoder.tokenizer.marker_ids}
    known = choose_format(template, markers if "tool▁calls" in template else ())
    assert known is not None
    compiled = grammars.prepare(Grammar("ebnf", known.grammar(SCHEMAS, several=several))).result()
    random = Random(11)
    counts, names = set(), set()
    for _ in range(25):
        text = ramble(encoder, compiled, random)
        parser = known.parser(SCHEMAS)
        calls: list[tuple[str, str]] = []
        for event in [*parser.push(text), *parser.flush()]:
            assert not isinstance(event, ContentDelta), text
            if isinstance(event, CallStarted):
                calls.append((event.name, ""))
            elif isinstance(event, ArgumentDelta):
                calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
        assert calls, text
        for name, arguments in calls:
            check(name, json.loads(arguments))
        counts.add(len(calls))
        names |= {name for name, _ in calls}
    assert names == set(SCHEMAS)
    assert (max(counts) > 1) == (several and known.several)


def check(name: str, value: dict[str, Any]) -> None:
    if name == "stop":
        assert set(value) <= {"now"}
        assert isinstance(value.get("now", True), bool)
    else:
        assert set(value) == {"id", "value"}
        assert value["id"] in ("a", 'b"}')
        assert value["value"] in range(100)


def test_a_call_or_an_answer_of_a_shape(encoder, grammars):
    assert encoder.tool_format is not None
    text = encoder.tool_format.grammar(SCHEMAS, answer=ANSWER)
    compiled = grammars.prepare(Grammar("ebnf", text)).result()
    random = Random(3)
    said = [ramble(encoder, compiled, random).strip() for _ in range(40)]
    answers = [text for text in said if text.startswith("{")]
    assert answers
    assert len(answers) < len(said)
    assert all(json.loads(text)["n"] in (1, 2) for text in answers)


def test_a_one_of_whose_schemas_overlap_is_enforced_loosely(encoder, grammars):
    arms = [{"type": "integer", "maximum": 9, "minimum": 0}, {"enum": [5, "x"]}]
    schema = {"type": "object", "properties": {"v": {"oneOf": arms}}, "required": ["v"], "additionalProperties": False}
    assert encoder.tool_format is not None
    with pytest.raises(InvalidRequestError, match="oneOf"):
        grammars.prepare(Grammar("ebnf", encoder.tool_format.grammar({"f": enforceable(schema)}))).result()
    text = encoder.tool_format.grammar({"f": enforceable(schema, loosely=True)})
    compiled = grammars.prepare(Grammar("ebnf", text)).result()
    random = Random(5)
    for _ in range(10):
        parser = encoder.tool_format.parser({"f": schema})
        events = [*parser.push(ramble(encoder, compiled, random)), *parser.flush()]
        arguments = "".join(event.text for event in events if isinstance(event, ArgumentDelta))
        calls = sum(isinstance(event, CallStarted) for event in events)
        assert calls
        if calls == 1:
            assert json.loads(arguments)["v"] in [*range(10), "x"]
