"""The skills: true answers, a clean split, both languages, and enough variety."""

import json
import re

import pytest

from seamount.training.skills import LANGUAGES, SKILLS, draw, generate, random_of
from seamount.training.skills.arithmetic import step
from seamount.training.skills.commands_facts import SOCIAL_TOPICS, TOPICS
from seamount.training.skills.item import is_held_out
from seamount.training.skills.masking import MASKS
from seamount.training.skills.unknown import ANSWERS

EVERY = [(skill, language) for skill in SKILLS for language in LANGUAGES]


def items(skill, language, count=400, *, held_out=False, seed=5):
    return [generate(skill, language, seed, index, held_out=held_out) for index in range(count)]


@pytest.mark.parametrize(("skill", "language"), EVERY)
def test_an_item_is_a_pure_function_of_seed_and_index(skill, language):
    assert items(skill, language, 20) == items(skill, language, 20)
    assert items(skill, language, 20) != items(skill, language, 20, seed=6)


def test_no_held_out_combination_is_drawn_for_training_over_20_000_items():
    rng = random_of("test", 1)
    held_out, trained = set(), set()
    for skill, language in EVERY:
        for _ in range(1500):
            trained.add((skill, draw(rng, skill, language).key))
        for _ in range(200):
            held_out.add((skill, draw(rng, skill, language, held_out=True).key))
    assert len(trained) > 10_000
    assert not trained & held_out
    assert not any(is_held_out(*pair) for pair in trained)


def test_the_split_never_moves():
    """Weights that were trained stay comparable only while the same combinations are held out."""
    assert [key for key in range(60) if is_held_out("arithmetic", str(key))] == [1, 2, 30, 52]


@pytest.mark.parametrize(("skill", "language"), EVERY)
def test_every_item_ends_in_the_assistant_and_asks_in_its_language(skill, language):
    for item in items(skill, language, 200):
        assert item.messages[0]["role"] == "user"
        assert item.answer["role"] == "assistant"
        assert item.answer.get("content") or item.answer.get("tool_calls")
        if language == "en":
            assert not re.search(r"[\u4e00-\u9fff]", json.dumps([*item.messages, *item.tools], ensure_ascii=False))
        assert "{" not in item.messages[0]["content"]


@pytest.mark.parametrize("skill", SKILLS)
def test_combinations_are_many(skill):
    fewest = 1500 if skill == "commands" else 2400
    assert len({item.key for item in items(skill, "en", 3000)}) >= fewest


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_step_of_arithmetic_is_true_and_leads_to_the_answer(language):
    for item in items("arithmetic", language):
        for line in item.answer["reasoning_content"].split("\n"):
            values = {eval(side.replace("×", "*")) for side in line.split("=")}
            assert len(values) == 1, line
        assert re.findall(r"\d+", item.answer["content"]) == [str(values.pop())]


def test_an_expression_has_the_value_that_python_gives_it():
    found = 0
    for item in items("arithmetic", "en", 800):
        expression = item.key
        if not expression.startswith("story"):
            assert item.answer["content"] == f"The answer is {eval(expression)}."
            found += 1
    assert found > 300


def test_a_step_adds_tens_before_units():
    assert step(47, "+", 38) == ("47 + 38 = 77 + 8 = 85", 85)
    assert step(85, "-", 38) == ("85 - 38 = 55 - 8 = 47", 47)
    assert step(23, "*", 4) == ("23 × 4 = 80 + 12 = 92", 92)
    assert step(7, "*", 8) == ("7 × 8 = 56", 56)


@pytest.mark.parametrize("language", LANGUAGES)
def test_extracted_values_stand_in_the_note_in_the_order_asked(language):
    num_absent = 0
    for item in items("extraction", language):
        fields = json.loads(item.answer["content"])
        text = item.messages[0]["content"]
        assert len(fields) >= 3
        for value in fields.values():
            num_absent += value is None
            assert value is None or str(value).lower() in text.lower()
        separator = "、" if language == "zh" else ", "
        assert separator.join(fields) in text
    assert 0 < num_absent < 100


@pytest.mark.parametrize("language", LANGUAGES)
def test_masking_leaves_no_personal_data_and_changes_nothing_else(language):
    for item in items("masking", language):
        text, masked = item.messages[0]["content"], item.answer["content"]
        assert "@" not in masked
        assert not re.search(r"\d{9}", masked)
        pieces = re.split("|".join(map(re.escape, MASKS[language].values())), masked)
        assert re.search(".+?".join(map(re.escape, pieces)), text, re.DOTALL), (text, masked)


def test_the_topics_have_six_wordings_in_each_language_and_no_wording_has_two_answers():
    seen = {}
    for answers, english, chinese in TOPICS:
        assert all(answers)
        for language, wordings in (("en", english.split("|")), ("zh", chinese.split("|"))):
            assert len(wordings) == 6
            assert len({*wordings}) == 6
            for wording in wordings:
                bare = wording.lower().rstrip("?？!！.。")
                assert seen.setdefault((language, bare), answers) == answers, wording
    assert len(TOPICS) >= 25
    assert len(SOCIAL_TOPICS) == 3


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_tool_call_fits_one_of_the_given_tools_and_copies_the_request(language):
    num_calls = num_refusals = 0
    for item in items("tools", language):
        functions = {tool["function"]["name"]: tool["function"] for tool in item.tools}
        assert 1 <= len(functions) == len(item.tools) <= 4
        calls = [call for message in item.messages for call in message.get("tool_calls", ())]
        if not calls:
            num_refusals += 1
            continue
        num_calls += 1
        (call,) = calls
        schema = functions[call["function"]["name"]]["parameters"]
        arguments = json.loads(call["function"]["arguments"])
        assert list(arguments) == list(schema["properties"]) == schema["required"]
        for name, value in arguments.items():
            assert str(value) in item.messages[0]["content"]
            assert schema["properties"][name]["type"] == ("integer" if isinstance(value, int) else "string")
    assert num_calls > 4 * num_refusals > 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_cannot_be_known_is_answered_by_one_of_the_honest_answers(language):
    known = {pair[language == "zh"] for pair in ANSWERS.values()}
    assert {item.answer["content"] for item in items("unknown", language)} == known


def test_no_question_has_two_answers():
    """Over both languages and all skills; else the best model could not answer them all."""
    answers = {}
    for skill, language in EVERY:
        for item in items(skill, language, 1200):
            asked = json.dumps([item.prompt, item.tools]).lower()
            assert answers.setdefault(asked, item.answer) == item.answer, item


def test_an_unknown_skill_is_a_key_error():
    with pytest.raises(KeyError):
        generate("poetry", "en", 1, 1)
