"""A conversation in the browser: send, stream, stop, retry, edit, reload, several of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.browser


def send(page, text):
    page.locator("#composer-input").fill(text)
    page.keyboard.press("Enter")


def answers(page):
    return page.locator(".message.assistant")


def test_an_answer_streams_in_and_shows_its_numbers(page, stage):
    stage.say("The sea is deep.", hold_after=7)
    expect(page.locator("#model")).to_have_value("seamount-test")
    send(page, "How deep?")
    expect(answers(page).locator(".content")).to_have_text("The sea")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#composer-input")).to_have_value("")
    stage.go_on.set()
    expect(answers(page).locator(".content")).to_have_text("The sea is deep.")
    expect(answers(page).locator(".stats")).to_have_text(
        re.compile(r"[\d.,]+ tokens/s.*first token \d+\.\d\d s.*\d+ tokens.*prompt \d+")
    )
    expect(page.locator("#status")).to_have_text("The answer is complete.")
    expect(page.locator("#title")).to_have_text("How deep?")
    asked = stage.requests[0]
    assert asked["messages"] == [{"role": "user", "content": "How deep?"}]
    assert asked["stream"] is True
    assert asked["chat_template_kwargs"] == {"thinking": True}
    assert "temperature" not in asked


def test_reasoning_is_open_while_it_streams_then_folds_and_is_not_sent_back(page, stage):
    stage.say("42.", reasoning="6 * 7 = 42", hold_after=10)
    send(page, "6 * 7?")
    details = page.locator("details.reasoning")
    expect(details).to_have_attribute("open", "")
    expect(details.locator("summary")).to_contain_text("Thinking…")
    expect(details.locator(".prose")).to_have_text("6 * 7 = 42")
    stage.go_on.set()
    expect(page.locator(".content")).to_have_text("42.")
    expect(details.locator("summary")).to_contain_text("Thought for")
    expect(details).not_to_have_attribute("open", "")
    details.locator("summary").click()
    expect(details.locator(".prose")).to_be_visible()
    stage.say("Yes.")
    send(page, "Sure?")
    expect(answers(page)).to_have_count(2)
    assert stage.requests[1]["messages"] == [
        {"role": "user", "content": "6 * 7?"},
        {"role": "assistant", "content": "42."},
        {"role": "user", "content": "Sure?"},
    ]


@pytest.mark.parametrize("by_key", [True, False])
def test_stop_ends_the_request_and_keeps_what_came(page, stage, by_key):
    stage.say("One two three", hold_after=7)
    send(page, "Count")
    expect(page.locator(".content")).to_have_text("One two")
    if by_key:
        page.keyboard.press("Escape")
    else:
        page.locator("#stop").click()
    expect(page.locator(".notice")).to_contain_text("You stopped this answer.")
    expect(page.locator(".content")).to_have_text("One two")
    expect(page.locator("#send")).to_be_visible()
    assert stage.gone.wait(10), "the server must see that the client left"


def test_retry_keeps_the_first_answer_as_another_version(page, stage):
    stage.say("First.")
    send(page, "Say")
    expect(page.locator(".stats")).to_be_visible()
    stage.say("Second.")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".content")).to_have_text("Second.")
    expect(page.locator(".versions")).to_contain_text("2 / 2")
    assert stage.requests[0]["messages"] == stage.requests[1]["messages"]
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".content")).to_have_text("First.")


def test_an_edited_message_goes_on_from_there(page, stage):
    for question, answer in (("a", "Alpha."), ("b", "Beta.")):
        stage.say(answer)
        send(page, question)
        expect(page.locator(".content").last).to_have_text(answer)
        expect(page.locator("#send")).to_be_visible()
    stage.say("Gamma.")
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit the message").fill("c")
    page.keyboard.press("Enter")
    expect(page.locator(".content")).to_have_text(["Gamma."])
    assert stage.requests[-1]["messages"] == [{"role": "user", "content": "c"}]
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".content")).to_have_text(["Alpha.", "Beta."])


def test_a_reload_keeps_everything_also_a_partial_answer_and_a_draft(page, stage):
    stage.say("Done.", reasoning="Hm.")
    send(page, "first")
    expect(page.locator(".stats")).to_be_visible()
    stage.say("Half of it", hold_after=4)
    send(page, "second")
    expect(page.locator(".content").last).to_have_text("Half")
    page.locator("#composer-input").fill("not yet sent")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    expect(page.locator(".bubble")).to_have_text(["first", "second"])
    expect(page.locator(".content")).to_have_text(["Done.", "Half"])
    expect(page.locator("details.reasoning").first).to_contain_text("Thought for")
    expect(page.locator(".notice").last).to_contain_text("The page was left")
    expect(page.locator("#composer-input")).to_have_value("not yet sent")
    stage.say("Whole.")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".content").last).to_have_text("Whole.")


def test_several_conversations_new_rename_export_delete_undo(page, stage):
    stage.say("One.")
    send(page, "First topic")
    expect(page.locator(".stats")).to_be_visible()
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#welcome")).to_be_visible()
    stage.say("Two.")
    send(page, "Second topic")
    expect(page.locator(".stats")).to_be_visible()
    rows = page.locator("#conversation-list li")
    expect(rows.locator(".open")).to_have_text(["Second topic", "First topic"])

    rows.nth(1).hover()
    rows.nth(1).get_by_role("button", name="Rename").click()
    page.get_by_label("Title of the conversation").fill("Depths")
    page.keyboard.press("Enter")
    rows.filter(has_text="Depths").locator(".open").click()
    expect(page.locator("#title")).to_have_text("Depths")
    expect(page.locator(".content")).to_have_text(["One."])

    with page.expect_download() as downloading:
        page.locator("li.current").get_by_role("button", name="Export as JSON").click()
    exported = json.loads(Path(downloading.value.path()).read_text())
    assert downloading.value.suggested_filename == "seamount-Depths.json"
    assert exported["format"] == "seamount.conversations"
    assert sorted(m["content"] for m in exported["conversations"][0]["messages"].values()) == ["First topic", "One."]

    page.locator("li.current").get_by_role("button", name="Delete").click()
    expect(rows).to_have_count(1)
    expect(page.locator("#welcome")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(rows).to_have_count(2)
    page.reload()
    expect(rows).to_have_count(2)


def test_an_answer_goes_on_while_another_conversation_is_open(page, stage):
    stage.say("Slow and steady", hold_after=4)
    send(page, "Slow")
    expect(page.locator(".content")).to_have_text("Slow")
    page.locator("#new-chat").click()
    expect(page.locator("#send")).to_be_visible()
    stage.go_on.set()
    page.locator("#conversation-list .open").click()
    expect(page.locator(".content")).to_have_text("Slow and steady")


def test_a_second_tab_sees_what_the_first_one_writes(page, stage):
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("html[data-ready]")
    send(page, "Shared")
    expect(other.locator("#conversation-list .open")).to_have_text(["Shared"])


def test_the_log_follows_only_a_reader_at_its_end(page, stage):
    text = "\n\n".join(f"Paragraph {number}." for number in range(40))
    stage.say(text + "\n\nThe very end.", hold_after=len(text))
    send(page, "Long")
    log = page.locator("#log")
    expect(page.locator(".content")).to_contain_text("Paragraph 39")
    at_end = "log => log.scrollHeight - log.scrollTop - log.clientHeight < 9"
    page.wait_for_function(f"({at_end})(document.querySelector('#log'))")
    log.evaluate("log => log.scrollBy(0, -400)")
    expect(page.locator("#jump")).to_be_visible()
    before = log.evaluate("log => log.scrollTop")
    stage.go_on.set()
    expect(page.locator(".stats")).to_be_attached()
    assert log.evaluate("log => log.scrollTop") == before
    page.locator("#jump").click()
    assert log.evaluate(at_end)
