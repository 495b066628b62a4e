"""A conversation: what is sent, what is kept, what a saved file holds."""

from __future__ import annotations

import json

from seamount.cli.conversation import Conversation, Turn


def test_earlier_turns_are_sent_without_their_reasoning() -> None:
    conversation = Conversation(system="Be brief.")
    conversation.add(Turn("one?", reasoning="hm", content="1"))
    assert conversation.messages("two?") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
    ]


def test_a_question_without_an_answer_is_not_sent_again_but_can_be_retried() -> None:
    conversation = Conversation()
    conversation.add(Turn("one?", content="1"))
    conversation.add(Turn("two?", reasoning="h", stopped=True))
    assert conversation.messages("three?")[-1] == {"role": "user", "content": "three?"}
    assert len(conversation.messages("three?")) == 3
    assert conversation.take_back() == "two?"
    assert [turn.question for turn in conversation.turns] == ["one?"]


def test_retry_forgets_the_answer_and_clear_forgets_all_but_the_system_prompt() -> None:
    conversation = Conversation(system="s")
    conversation.add(Turn("one?", content="1"))
    assert conversation.take_back() == "one?"
    assert conversation.turns == []
    conversation.add(Turn("one?", content="2"))
    conversation.clear()
    assert conversation.take_back() is None
    assert conversation.messages("x") == [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]


def test_saved_json_is_a_list_of_messages() -> None:
    conversation = Conversation(system="s")
    conversation.add(Turn("一?", reasoning="嗯", content="1"))
    text = conversation.to_json()
    assert "嗯" in text
    assert json.loads(text)[-1] == {"role": "assistant", "content": "1", "reasoning_content": "嗯"}


def test_saved_markdown_quotes_the_reasoning_and_marks_a_stopped_answer() -> None:
    conversation = Conversation()
    conversation.add(Turn("q", reasoning="a\n\nb", content="c", stopped=True))
    assert conversation.to_markdown() == (
        "**You**\n\nq\n\n**Reasoning**\n\n> a\n>\n> b\n\n**Answer**\n\nc\n\n(stopped)\n"
    )
