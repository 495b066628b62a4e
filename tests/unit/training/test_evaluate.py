"""Evaluation: answers taken apart, scored exactly, over held-out items only."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer

import seamount.models
from seamount.core.errors import InvalidRequestError
from seamount.models.prompt import PromptEncoder
from seamount.training.evaluate import Cell, evaluate, held_out_items, parse, score
from seamount.training.pretraining.bpe import EOS, THINK_END
from seamount.training.pretraining.corpus import direct, render
from seamount.training.skills import LANGUAGES, SKILLS

FOLDER = Path(seamount.models.__file__).parent / "embedded" / "seamount-tiny"
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def wanted(item, *, thinking=True):
    """The raw output that a perfect model gives."""
    messages = item.messages if thinking else [*item.prompt, direct(item.answer)]
    whole = render(messages, item.tools, thinking=thinking)
    return whole.removeprefix(render(item.prompt, item.tools, thinking=thinking, add_generation_prompt=True))


@dataclass
class Output:
    token_ids: list[int]


class Oracle:
    """A generator that knows every wanted answer, and spoils those of one skill."""

    def __init__(self, spoiled, *, thinking=True):
        self.answers = {}
        for skill in SKILLS:
            for language in LANGUAGES:
                for item in held_out_items(skill, language, 8):
                    prompt = render(item.prompt, item.tools, thinking=thinking, add_generation_prompt=True)
                    answer = wanted(item, thinking=thinking)
                    self.answers[tuple(TOKENIZER.encode(prompt).ids)] = (
                        answer.replace(EOS, "!" + EOS) if skill == spoiled else answer
                    )

    def generate(self, prompts, sampling):
        assert sampling.temperature == 0
        return [Output(TOKENIZER.encode(self.answers[tuple(prompt)]).ids) for prompt in prompts]


@pytest.fixture
def encoder():
    encoder = PromptEncoder.from_folder(FOLDER)
    yield encoder
    encoder.close()


@pytest.mark.parametrize("thinking", [True, False])
def test_perfect_answers_score_full_and_spoiled_ones_nothing(encoder, thinking):
    seen = []
    report = evaluate(
        Oracle("masking", thinking=thinking), encoder, num_items=8, thinking=thinking, progress=seen.append
    )
    assert seen == list(report.cells)
    assert len(report.cells) == 12
    for cell in report.cells:
        assert cell.num_right == (0 if cell.skill == "masking" else 8), cell
    assert report.overall == Cell("all", "all", 80, 96)
    assert {failure.skill for failure in report.failures} == {"masking"}
    described = json.loads(report.to_json())
    assert described["cells"][-1] == {
        "skill": "all",
        "language": "all",
        "num_right": 80,
        "num_items": 96,
        "share": 0.8333,
    }
    shown = io.StringIO()
    Console(width=100, file=shown).print(report.table())
    assert "0.0 % (0/8)" in shown.getvalue()
    assert "83.3 % (80/96)" in shown.getvalue()


def test_a_part_of_the_skills_can_be_asked_for_and_an_unknown_one_is_refused(encoder):
    report = evaluate(Oracle(""), encoder, skills=["tools"], languages=["zh"], num_items=3)
    assert report.cells == (Cell("tools", "zh", 3, 3),)
    with pytest.raises(InvalidRequestError, match="poetry"):
        evaluate(Oracle(""), encoder, skills=["poetry"])
    with pytest.raises(InvalidRequestError, match="'fr'"):
        evaluate(Oracle(""), encoder, languages=["fr"])


@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_only_different_held_out_items_are_asked(skill, language):
    found = held_out_items(skill, language, 50)
    assert len(found) == len({item.key for item in found}) == 50
    assert all(item.held_out for item in found)
    assert found == held_out_items(skill, language, 50)


def test_output_is_taken_apart():
    answer = parse(f"1 + 1 = 2{THINK_END}The answer is 2.{EOS}rest")
    assert (answer.reasoning, answer.content, answer.calls) == ("1 + 1 = 2", "The answer is 2.", ())
    assert parse("no end of thought").content == ""
    assert parse("direct", thinking=False).content == "direct"


def call_item():
    return next(item for item in held_out_items("tools", "en", 30) if item.answer.get("tool_calls"))


def test_a_call_needs_the_right_name_arguments_and_types():
    item = call_item()
    good = wanted(item)
    function = item.answer["tool_calls"][0]["function"]
    arguments = json.loads(function["arguments"])
    assert score(item, good)
    assert score(item, good.replace(function["arguments"], json.dumps(arguments, indent=1)))
    assert not score(item, good.replace(function["name"], function["name"] + "s"))
    assert not score(item, good.replace(function["arguments"], json.dumps(dict.fromkeys(arguments, "x"))))
    assert not score(item, good.replace(function["arguments"], function["arguments"][:-1]))
    assert not score(item, f"{THINK_END}Here you are.{EOS}")
    assert not score(held_out_items("masking", "en", 1)[0], good)


def test_json_is_compared_by_value_type_and_order():
    item = held_out_items("extraction", "en", 1)[0]
    fields = json.loads(item.answer["content"])

    def output(value):
        return THINK_END + json.dumps(value) + EOS

    assert score(item, output(fields))
    assert not score(item, output(dict(reversed(fields.items()))))
    assert not score(item, output({**fields, next(iter(fields)): 1.5}))
    assert not score(item, f"{THINK_END}not json{EOS}")


def test_arithmetic_is_scored_by_its_final_answer():
    item = held_out_items("arithmetic", "zh", 1)[0]
    content = item.answer["content"]
    assert score(item, f"nonsense{THINK_END}{content}{EOS}")
    assert not score(item, f"nonsense{THINK_END}{content}x{EOS}")
    assert score(item, f"steps\n{content}{EOS}", thinking=False)
    assert not score(item, f"steps {content}{EOS}", thinking=False)
