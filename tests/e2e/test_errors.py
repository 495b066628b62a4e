"""What the page says when something fails, and that nothing typed is lost."""

from __future__ import annotations

import pytest

from seamount.core.errors import ContextTooLongError, WorkerDiedError

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.browser


def send(page, text):
    page.locator("#composer-input").fill(text)
    page.keyboard.press("Enter")


def test_a_refused_request_shows_the_servers_words_and_can_be_tried_again(page, stage):
    stage.say("", fail_after=0, failure=ContextTooLongError("The prompt has 5000 tokens; the context has 4096."))
    send(page, "Too long")
    notice = page.locator(".notice.error")
    expect(notice).to_contain_text("refused the request (400)")
    expect(notice).to_contain_text("The prompt has 5000 tokens; the context has 4096.")
    expect(notice).to_have_attribute("role", "alert")
    expect(page.locator(".bubble")).to_have_text("Too long")
    stage.say("Better.")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".content")).to_have_text(["Better."])
    expect(page.locator(".versions")).to_have_count(0)


def test_an_error_in_mid_stream_keeps_what_came(page, stage):
    stage.say("Half an answer", fail_after=4, failure=WorkerDiedError("The engine's worker ended."))
    send(page, "Go")
    expect(page.locator(".notice.error")).to_contain_text("The engine's worker ended.")
    expect(page.locator(".content")).to_have_text("Half")
    stage.say("All of it.")
    send(page, "And now?")
    expect(page.locator(".content").last).to_have_text("All of it.")


def test_a_message_after_a_failed_one_is_sent_with_it(page, stage):
    stage.say("", fail_after=0)
    send(page, "One")
    expect(page.locator(".notice.error")).to_contain_text("failed (500)")
    stage.say("Fine.")
    send(page, "Two")
    expect(page.locator(".content").last).to_have_text("Fine.")
    assert stage.requests[-1]["messages"] == [{"role": "user", "content": "One\n\nTwo"}]


def test_a_lost_connection_is_told_apart(page, stage):
    stage.say("Half an answer", hold_after=4)
    send(page, "Go")
    expect(page.locator(".content")).to_have_text("Half")
    stage.cut()
    expect(page.locator(".notice.error")).to_contain_text("The connection was lost")
    expect(page.locator(".content")).to_have_text("Half")


def test_an_unreachable_server_is_named_and_the_message_kept(page, stage):
    page.context.set_offline(True)
    send(page, "Anyone there?")
    expect(page.locator(".notice.error")).to_contain_text("The server cannot be reached")
    page.context.set_offline(False)
    page.reload()
    page.wait_for_selector("html[data-ready]")
    expect(page.locator(".bubble")).to_have_text("Anyone there?")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".content")).to_have_text("Hello.")


def test_a_server_that_is_not_ready_is_announced_until_it_is(open_page, stage):
    page = open_page("/")
    page.route("**/v1/models", lambda route: route.fulfill(status=503, json={"error": {"message": "starting"}}))
    page.reload()
    expect(page.locator("#banner")).to_contain_text("The server does not answer")
    page.unroute("**/v1/models")
    page.locator("#banner").get_by_role("button", name="Try again").click()
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#model")).to_have_value("seamount-test")


def test_an_answer_cut_by_the_token_limit_says_so(page, stage):
    page.locator("#toggle-settings").click()
    page.get_by_label("Longest answer (tokens)").fill("5")
    stage.say("Half an answer")
    send(page, "Go")
    expect(page.locator(".notice")).to_contain_text("The token limit was reached")
