"""Grammars over the embedded model's vocabulary: what they allow, where they end, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import Grammar
from seamount.engine import grammar as module
from seamount.engine.grammar import MAX_COMPILED, Compiled, Constraint, Grammars
from seamount.engine.grammar_schema import FORMATS
from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder

VOCAB_SIZE = 4096


@pytest.fixture(scope="module")
def encoder() -> Iterator[PromptEncoder]:
    made = PromptEncoder.from_folder(locate_model("seamount-tiny"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def grammars(encoder: PromptEncoder) -> Grammars:
    return Grammars(encoder, VOCAB_SIZE)


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


class Follower:
    """Says texts under a grammar, token by token."""

    def __init__(self, encoder: PromptEncoder, compiled: Compiled) -> None:
        self._encoder, self._compiled = encoder, compiled

    def says(self, text: str) -> str:
        """How far the text may go: "complete", "may end", "goes on", or "no"."""
        constraint = Constraint(self._compiled, thinks=False)
        complete = False
        for token_id in self._encoder.tokenizer.encode_inside(text):
            # A forced text may be cut into other tokens than a free one: by bytes, any text can be spelled.
            if complete or not self._accepts(constraint, token_id):
                return self._by_bytes(text)
            complete = constraint.accept(token_id)
        return self._end(constraint, complete)

    def _by_bytes(self, text: str) -> str:
        constraint = Constraint(self._compiled, thinks=False)
        complete = False
        rest = text.encode()
        while rest:
            if complete:
                return "no"
            fitting = [
                i
                for i in constraint.allowed.nonzero().flatten().tolist()
                if i not in self._encoder.eos_token_ids and rest.startswith(self._encoder.token_bytes(i) or b"\xff")
            ]
            if not fitting:
                return "no"
            best = max(fitting, key=lambda i: len(self._encoder.token_bytes(i)))
            complete = constraint.accept(best)
            rest = rest[len(self._encoder.token_bytes(best)) :]
        return self._end(constraint, complete)

    @staticmethod
    def _accepts(constraint: Constraint, token_id: int) -> bool:
        return bool(constraint.allowed[token_id])

    def _end(self, constraint: Constraint, complete: bool) -> str:
        if complete:
            return "complete"
        return "may end" if constraint.allowed[self._encoder.eos_token_ids[0]] else "goes on"


@pytest.fixture(scope="module")
def follow(encoder: PromptEncoder, grammars: Grammars) -> Any:
    return lambda grammar: Follower(encoder, grammars.prepare(grammar).result())


@pytest.mark.parametrize(
    ("grammar", "begun", "text", "outcome"),
    [
        (Grammar("json_object"), "{", '"a": 1}', "complete"),
        (Grammar("json_object"), "{", '{"a": 1}', "no"),
        (Grammar("json_object"), '{"a": "Gr', 'üße 一"}', "complete"),
        (Grammar("json_object"), '{"a": 1', "}", "complete"),
        (Grammar("json_object"), '{"a": 1', "2}", "complete"),
        (Grammar("regex", "[a-z]{3}<pad>x*"), "ab", "c<pad>", "may end"),
        (Grammar("regex", "[a-z]{3}<pad>x*"), "abc<pad>", "x", "may end"),
        (Grammar("ebnf", 'start: "yes" | "yeah"'), "ye", "ah", "complete"),
    ],
)
def test_an_answer_goes_on_from_its_beginning(follow, grammar, begun, text, outcome):
    assert follow(replace(grammar, begun=begun)).says(text) == outcome
    assert follow(grammar).says(begun + text) == outcome


@pytest.mark.parametrize(
    ("begun", "words"),
    [
        ("Sure: {", "none of what"),
        ("\u00a0{", "none of what"),
        ('{"a": 1}x', "none of what"),
        ('{"a": 1}', "nothing can follow"),
    ],
)
def test_a_beginning_that_does_not_fit_is_refused(grammars, begun, words):
    with pytest.raises(InvalidRequestError, match=words) as caught:
        grammars.prepare(Grammar("json_object", begun=begun)).result()
    assert caught.value.param == "messages"


def test_json_may_begin_behind_white_space(follow):
    assert follow(Grammar("json_object", begun='\r\n\t {"a": ')).says("1}") == "complete"


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -5, "maximum": 5}, "name": {"enum": ["a", "bc"]}},
    "required": ["x"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("grammar", "text", "outcome"),
    [
        (Grammar("json_object"), '{"a": [1, {"b": null}]}', "complete"),
        (Grammar("json_object"), '{"a": ', "goes on"),
        (Grammar("json_object"), "[1]", "no"),
        (Grammar("json_object"), "{}x", "no"),
        (Grammar("json_object"), "{" + " " * 100 + "}", "no"),
        (Grammar("json_object"), '{\r\n\t\t"a": [\n' + " " * 32 + "1]}", "complete"),
        *(
            (grammar, f'{{{space}"x": 3}}', "no")
            for grammar in (Grammar("json_object"), schema({"type": "object"}))
            for space in ("  ", "\t", "\n\n", "\n  \n", "\n\t ", "\n" + " " * 33, " \n")
        ),
        (schema(POINT), '{"x": -5, "name": "bc"}', "complete"),
        (schema(POINT), '{"x":3}', "complete"),
        (schema(POINT), '{\n  "x": 3\n}', "complete"),
        (schema(POINT), '{"x": 6', "no"),
        (schema(POINT), '{"name": "a"', "no"),
        (schema(POINT), '{"x": 1, "y"', "no"),
        (schema({"type": "integer"}), "12", "may end"),
        (schema({"type": "integer"}), "-", "goes on"),
        (
            schema({"$ref": "#/$defs/T", "$defs": {"T": {"type": "array", "items": {"$ref": "#/$defs/T"}}}}),
            "[[[]], []]",
            "complete",
        ),
        (schema({"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[0-9]{2}$"}]}), '"42"', "complete"),
        (schema({"const": {"a": [1, "é"]}}), '{"a": [1, "é"]}', "complete"),
        (Grammar("regex", "[ab]{2,3}"), "aba", "complete"),
        (Grammar("regex", "[ab]{2,3}"), "ab", "may end"),
        (Grammar("regex", "[ab]{2,3}"), "a", "goes on"),
        (Grammar("regex", "[ab]{2,3}"), "abc", "no"),
        (Grammar("regex", "(?i)straße 😀"), "STRAßE 😀", "complete"),
        (Grammar("ebnf", 'start: "(" start ")" | "x"'), "((x))", "complete"),
        (Grammar("ebnf", 'start: "(" start ")" | "x"'), "((x)", "goes on"),
        (Grammar("ebnf", 'start: "(" start ")" | "x"'), "(x))", "no"),
        (Grammar("ebnf", 'start: NAME ("," NAME)*\nNAME: /[a-z]+/'), "ab,c", "may end"),
    ],
)
def test_what_each_kind_allows(follow: Any, grammar: Grammar, text: str, outcome: str) -> None:
    assert follow(grammar).says(text) == outcome


# Characters come as they are; of escapes only those that JSON needs are allowed, and, beyond JSON, one for DEL.
words = st.text(st.characters(exclude_characters="\x7f", exclude_categories=["Cs"]), max_size=6)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(-1e6, 1e6) | words,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=8,
    ).map(lambda value: {"a": value})
)
def test_every_json_object_is_one_for_the_grammar(follow: Any, value: Any) -> None:
    for text in (json.dumps(value, ensure_ascii=False, indent=indent) for indent in (None, 1)):
        assert follow(Grammar("json_object")).says(text) == "complete"


def test_markers_are_no_text_and_can_be_named(follow: Any, encoder: PromptEncoder, grammars: Grammars) -> None:
    marks = sorted(encoder.tokenizer.marker_ids)
    anything = Constraint(grammars.prepare(Grammar("regex", "(?s:.*)")).result(), thinks=False)
    ends = set(encoder.eos_token_ids)
    assert {i for i in marks if anything.allowed[i]} == ends
    name = encoder.tokenizer.added_tokens[next(i for i in marks if i not in ends)]
    named = Constraint(grammars.prepare(Grammar("ebnf", f'start: {name} "a"')).result(), thinks=False)
    assert named.allowed.nonzero().flatten().tolist() == [encoder.tokenizer.token_id(name)]


def test_copies_do_not_know_of_each_other(grammars: Grammars, encoder: PromptEncoder) -> None:
    compiled = grammars.prepare(Grammar("regex", "[ab]+c")).result()
    one, other = (Constraint(compiled, thinks=False) for _ in range(2))
    a, c = (encoder.tokenizer.encode_inside(letter)[0] for letter in "ac")
    assert not one.allowed[c]
    assert not one.accept(a)
    assert one.allowed[c] and not other.allowed[c]
    assert one.accept(c)


def test_thoughts_are_free_but_for_the_end(grammars: Grammars, encoder: PromptEncoder) -> None:
    think_open, think_close = (encoder.tokenizer.token_id(tag) for tag in ("<think>", "</think>"))
    prompt = encoder.encode_text("What?")
    assert think_open is not None and think_close is not None
    assert grammars.thinks((*prompt, think_open))
    assert grammars.thinks((*prompt, think_open, *encoder.tokenizer.encode_inside("\nI had begun")))
    assert not grammars.thinks((*prompt, think_open, think_close))
    assert not grammars.thinks(prompt)
    compiled = grammars.prepare(Grammar("regex", "[ab]")).result()
    constraint = Constraint(compiled, thinks=True)
    assert constraint.allowed.sum() == VOCAB_SIZE - len(encoder.eos_token_ids)
    for token_id in encoder.tokenizer.encode_inside("zz ]]"):
        assert not constraint.accept(token_id)
    assert not constraint.accept(think_close)
    assert constraint.allowed.equal(compiled.first)


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        (schema({"type": "string", "pattern": "(?=a)b"}), "look"),
        (schema({"type": "string", "pattern": "("}), "regex"),
        (schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
        (schema({"$ref": "#/$defs/missing"}), "missing"),
        (schema({"not": {}}), "'not'"),
        (schema(False), "nothing"),
        (schema({"allOf": [{"type": "string"}, {"type": "null"}]}), "nsatisfiable"),
        (Grammar("json_schema", "{"), "no JSON"),
        (Grammar("json_schema", "[" * 100_000), "no JSON"),
        (Grammar("regex", "("), "grammar"),
        (Grammar("regex", r"(a)\1"), "grammar"),
        (Grammar("ebnf", "start: missing"), "missing"),
        (Grammar("ebnf", 'begin: "a"'), "start"),
        (Grammar("ebnf", 'root ::= "a"'), "Lark"),
        (Grammar("ebnf", 'start: <|nobody|> "a"'), "nobody"),
        (Grammar("ebnf", "start[max_tokens=3]: /.*/"), "max_tokens"),
        (Grammar("ebnf", 'start: a\na[lazy, stop="x"]: /.*/'), "stop"),
        (Grammar("ebnf", '{"grammars": [{"lark_grammar": "start: /a/"}]}'), "grammar"),
    ],
)
def test_what_is_wrong_is_refused_with_the_reason(grammars: Grammars, grammar: Grammar, problem: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        grammars.prepare(grammar).result()
    assert problem in caught.value.message
    assert len(caught.value.message) < 600 and "\n" not in caught.value.message


@pytest.mark.parametrize("grammar", [Grammar("json_object"), schema({"type": "array"})], ids=["object", "schema"])
def test_a_model_that_prefers_space_cannot_go_on_with_it(
    encoder: PromptEncoder, grammars: Grammars, grammar: Grammar
) -> None:
    """It takes space for as long as it may, and is soon held to write something else."""
    spaces = {i: text for i in range(VOCAB_SIZE) if (text := encoder.token_bytes(i)) and not text.strip()}
    for prefers in (min, max):
        follower, run = Constraint(grammars.prepare(grammar).result(), thinks=False), b""
        follower.accept(encoder.tokenizer.encode_inside("{" if grammar.kind == "json_object" else "[")[0])
        while fitting := [i for i in spaces if follower.allowed[i]]:
            best = prefers(fitting, key=lambda i: (spaces[i] == b" ", len(spaces[i])))
            assert not follower.accept(best)
            run += spaces[best]
            assert len(run) <= 34
        assert run


@pytest.mark.parametrize(
    ("value", "problem", "hint"),
    [
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf' is not supported", "'anyOf'"),
        ({"items": {"oneOf": [{"minimum": 1}, {"maximum": 3}]}}, "'oneOf' is not supported", "'anyOf'"),
        ({"$ref": "#"}, "'$ref' or a rule leads back to itself", "'$defs'"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "leads back to itself", "'$defs'"),
        ({"type": "object", "properties": {"a": {}}, "$ref": "#"}, "beside other keywords", "'properties'"),
    ],
)
def test_what_the_library_refuses_in_its_own_tongue_is_said_in_ours(
    grammars: Grammars, value: Any, problem: str, hint: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        grammars.prepare(schema(value)).result()
    assert problem in caught.value.message
    assert hint in (caught.value.hint or "")
    assert not re.search("coerce|Bias|verbose|json-schema:", str(caught.value))


def test_one_of_stays_where_no_value_fits_two(follow: Any) -> None:
    assert follow(schema({"oneOf": [{"type": "string"}, {"type": "null"}]})).says("null") == "complete"


def test_a_grammar_that_another_tenant_compiled_is_compiled_again(grammars: Grammars) -> None:
    """Else the time that it takes would tell what others ask for."""
    grammar = Grammar("regex", "[ab]+c")
    first = grammars.prepare(grammar, "one").result()
    assert grammars.prepare(grammar, "one").result() is first
    assert grammars.prepare(grammar, "other").result() is not first


def test_every_format_that_the_schema_check_lets_pass_is_known(grammars: Grammars) -> None:
    for name in FORMATS:
        grammars.prepare(schema({"type": "string", "format": name})).result()


def _chain(kind: str, length: int) -> str:
    names = [f"{kind}{''.join(chr(97 + int(digit)) for digit in str(i))}" for i in range(length)]
    names = [name.upper() if kind == "T" else name for name in names]
    rules = [f'{name}: {after} "x"' for name, after in itertools.pairwise(names)]
    return "\n".join([f"start: {names[0]}", *rules, f'{names[-1]}: "x"'])


def _doubling(levels: int) -> dict[str, Any]:
    defs: dict[str, Any] = {
        f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}], "type": "object"}
        for i in range(levels)
    }
    defs[f"d{levels}"] = {"type": "object", "properties": {"a": {"type": "string"}}}
    return {"$ref": "#/$defs/d0", "$defs": defs}


BOMBS = {
    "counted repeats": Grammar("regex", "((((a{1,999}){1,999}){1,999}){1,999}){1,999}"),
    "open groups": Grammar("regex", "(" * 50_000),
    "groups": Grammar("regex", "(" * 50_000 + "a" + ")" * 50_000),
    "alternatives behind a wildcard": Grammar("regex", "(.*a.{1,500}|.*b.{1,500}|.*c.{1,500}){1,50}"),
    "classes": Grammar("regex", r"[\p{L}\p{N}]{1,900}" * 100),
    "nested rules": Grammar("ebnf", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "a chain of rules": Grammar("ebnf", _chain("r", 4000)),
    "a chain of terminals": Grammar("ebnf", _chain("T", 4000)),
    "negations": Grammar("ebnf", "start: T\nT: " + "~(" * 20_000 + "/a/" + ")" * 20_000),
    "nested JSON": Grammar("ebnf", "start: %json " + '{"items":' * 10_000),
    "doubling references": schema(_doubling(40)),
    "repeats of repeats": schema(
        {
            "type": "array",
            "minItems": 9999,
            "items": {"type": "array", "minItems": 9999, "items": {"type": "array", "minItems": 9999}},
        }
    ),
    "intersections": schema(
        {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(5, 60)]},
    ),
    "many ranges": schema({"anyOf": [{"type": "integer", "minimum": i, "maximum": 10**15 - i} for i in range(900)]}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_or_harmless_and_the_next_grammar_is_served(grammars: Grammars, name: str) -> None:
    try:
        constraint = Constraint(grammars.prepare(BOMBS[name]).result(), thinks=False)
        for _ in range(3):
            if constraint.accept(int(constraint.allowed.nonzero()[-1])):
                break
    except InvalidRequestError as error:
        assert len(error.message) < 600
    assert grammars.prepare(Grammar("regex", f"[ab]{{1,{len(name)}}}")).result() is not None


@pytest.mark.parametrize("limits", [{"cpu_limit_s": 0.0001}, {"memory_limit_bytes": 1 << 20}], ids=["time", "memory"])
def test_the_child_is_held_to_its_limits(encoder: PromptEncoder, limits: dict[str, Any]) -> None:
    tight = Grammars(encoder, VOCAB_SIZE, **limits)
    with pytest.raises(InvalidRequestError, match="compiling it takes over"):
        tight.prepare(schema({"anyOf": [{"type": "integer", "minimum": i} for i in range(2000)]})).result()


def test_a_grammar_that_grows_too_complex_ends_its_own_sequence(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.LIMITS, "max_lexer_states", 40)
    compiled = Grammars(encoder, VOCAB_SIZE).prepare(Grammar("regex", "[ab]{1,900}c")).result()
    constraint = Constraint(compiled, thinks=False)
    (a,) = encoder.tokenizer.encode_inside("a")
    with pytest.raises(InvalidRequestError) as caught:
        for _ in range(900):
            constraint.accept(a)
    assert caught.value.code == "grammar_too_complex"


def test_the_latest_grammars_are_kept_and_no_more(encoder: PromptEncoder) -> None:
    kept = Grammars(encoder, VOCAB_SIZE)
    first = kept.prepare(Grammar("regex", "a"))
    wrong = kept.prepare(Grammar("regex", "("))
    assert kept.prepare(Grammar("regex", "a")) is first
    assert kept.prepare(Grammar("regex", "(")) is wrong
    for i in range(MAX_COMPILED):
        kept.prepare(Grammar("regex", f"b{i}")).result()
    assert kept.prepare(Grammar("regex", "a")) is not first


def test_letters_stay_where_the_tokenizer_would_change_them(encoder: PromptEncoder) -> None:
    """A tokenizer with a normal form would spell a decomposed é as the composed one."""
    vocabulary = module.Vocabulary(encoder, VOCAB_SIZE)
    vocabulary._encode = lambda text: encoder.tokenizer.encode_inside(text.replace("e\u0301", "é"))
    spelled = b"".join(encoder.token_bytes(token_id) for token_id in vocabulary("cafe\u0301"))
    assert spelled.decode() == "cafe\u0301"
