"""The console at a server that asks for keys: the key's field, and the administrators' page of keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from seamount.cli.wire import make_access
from seamount.core.identity import Limits, Principal
from seamount.core.state import open_state
from seamount.security.keys import ApiKeys

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.browser

STORED = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[ApiKeys]:
    database = open_state(str(tmp_path / "state.db"))
    yield ApiKeys(database)
    database.close()


@pytest.fixture
def admin_key(keys: ApiKeys) -> str:
    return keys.add_first_administrator(tenant="admin", label="first")[0]


@pytest.fixture
def base_url(serve_stage, keys: ApiKeys, admin_key: str) -> str:
    """In place of conftest's: this server asks for keys."""
    return serve_stage(access=make_access(keys.database), state=keys.database)


@pytest.fixture
def page(open_page, base_url):
    opened = open_page()
    opened.asked = []
    opened.on("request", lambda request: opened.asked.append(request))
    return opened


def enter(page, key: str) -> None:
    page.get_by_label("API key", exact=True).fill(key)
    page.keyboard.press("Enter")


def ask(page, text: str) -> None:
    page.locator("#composer-input").fill(text)
    page.keyboard.press("Enter")


def test_the_page_asks_for_a_key_tells_a_wrong_one_and_then_chats(page, stage, keys, admin_key):
    dialog = page.get_by_role("dialog", name="This server asks for an API key")
    expect(dialog).to_be_visible()
    expect(page.get_by_label("API key", exact=True)).to_be_focused()
    enter(page, "sm-aaaaaaaaaa-" + "b" * 43)
    expect(dialog.get_by_role("alert")).to_contain_text("The API key is not known here.")
    enter(page, "schlüssel")
    expect(dialog.get_by_role("alert")).to_contain_text("letters, digits and dashes")
    clerk, key = keys.add(Principal(key_id=None, tenant="bank"))
    enter(page, clerk)
    expect(dialog).to_be_hidden()
    expect(page.locator("#model")).to_have_value("seamount-test")
    stage.say("Good day.")
    ask(page, "Hello")
    expect(page.locator(".content")).to_have_text("Good day.")
    assert clerk not in page.evaluate(STORED), "in memory only, unless it shall be kept"
    assert not [request.url for request in page.asked if clerk in request.url]
    keys.revoke(key.id)
    ask(page, "And now?")
    expect(dialog.get_by_role("alert")).to_contain_text("The API key is revoked.")


def test_a_kept_key_outlives_a_reload_and_can_be_forgotten(page, stage, admin_key):
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_label("Keep it in this tab").check()
    enter(page, admin_key)
    expect(page.get_by_role("dialog")).to_be_hidden()
    local, session, cookie, address = json.loads(page.evaluate(STORED))
    assert list(session.values()) == [admin_key]
    assert admin_key not in json.dumps([local, cookie, address])
    page.reload()
    expect(page.locator("#model")).to_have_value("seamount-test")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.get_by_role("button", name="Your key").click()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.locator("#banner")).to_contain_text("This server asks for an API key.")
    assert admin_key not in page.evaluate(STORED)


def test_a_key_that_is_not_kept_is_gone_after_a_reload_and_escape_leaves_the_question(page, admin_key):
    enter(page, admin_key)
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.reload()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.locator("#banner").get_by_role("button", name="Enter a key").click()
    expect(page.get_by_role("dialog")).to_be_visible()


def test_an_administrator_makes_a_key_copies_it_and_revokes_it(open_page, base_url, keys, admin_key):
    page = open_page("/", permissions=["clipboard-read", "clipboard-write"])
    enter(page, admin_key)
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.get_by_role("button", name="API keys").click()
    expect(page.locator("#keys-title")).to_be_focused()
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.locator("tbody tr")).to_contain_text("(yours)")
    page.get_by_text("Make a key", exact=True).click()
    page.get_by_label("Tenant").fill("radiology")
    page.get_by_label("Label").fill("report assistant")
    page.get_by_label("Models").fill("seamount-test, other")
    page.get_by_label("Routes").fill("/v1/models /v1/chat/completions")
    page.get_by_label("Days until it expires").fill("90")
    page.get_by_label("Requests per minute").fill("30")
    page.get_by_label("Tokens per minute").fill("20000")
    page.get_by_label("Requests at once").fill("4")
    page.get_by_label("Priority").select_option("Goes first")
    page.get_by_role("button", name="Make the key").click()
    shown = page.get_by_label("of radiology")
    expect(shown).to_be_focused()
    made = shown.input_value()
    page.locator(".made").get_by_role("button", name="Copy").click()
    page.wait_for_function("made => navigator.clipboard.readText().then((text) => text === made)", arg=made)
    assert httpx.get(f"{base_url}/v1/models", headers={"authorization": f"Bearer {made}"}).status_code == 200

    key = next(each for each in keys.all() if each.principal.tenant == "radiology")
    assert key.label == "report assistant"
    assert key.principal.models == ("seamount-test", "other")
    assert key.principal.routes == ("/v1/models", "/v1/chat/completions")
    assert key.principal.limits == Limits(requests_per_minute=30, tokens_per_minute=20_000, max_concurrent=4)
    assert key.principal.priority == 1
    assert key.expires_s == key.created_s + 90 * 86_400

    row = page.locator("tbody tr").filter(has_text="radiology")
    expect(row).to_contain_text("report assistant")
    row.get_by_role("button", name=f"Revoke the key {key.id}").click()
    assert keys.find(key.id)[0].revoked_s is None, "the first press only asks"
    row.get_by_role("button", name=f"Really revoke the key {key.id}?").click()
    expect(row).to_contain_text("revoked")
    assert httpx.get(f"{base_url}/v1/models", headers={"authorization": f"Bearer {made}"}).status_code == 401
    page.get_by_role("button", name="Back to the chat").click()
    expect(page.locator("#composer-input")).to_be_visible()
    assert made not in page.content(), "shown once"
    page.go_back()
    expect(page.locator("#keys-title")).to_be_visible()
    expect(page.locator(".made")).to_have_count(0)


def test_who_is_no_administrator_is_told_so_and_a_wrong_order_names_its_fault(page, keys, admin_key):
    clerk, _ = keys.add(Principal(key_id=None, tenant="bank"))
    enter(page, clerk)
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.get_by_role("button", name="API keys").click()
    expect(page.locator("#keys-page").get_by_role("alert")).to_contain_text("may not use this route")
    expect(page.locator("tbody tr")).to_have_count(0)
    page.get_by_role("button", name="Your key").click()
    enter(page, admin_key)
    expect(page.locator("tbody tr")).to_have_count(2)
    page.get_by_text("Make a key", exact=True).click()
    page.get_by_label("Tenant").fill("lab")
    page.get_by_label("Routes").fill("/v1/nowhere")
    page.get_by_role("button", name="Make the key").click()
    expect(page.locator("#keys-page").get_by_role("alert")).to_contain_text("/v1/nowhere")
    expect(page.get_by_label("Tenant")).to_have_value("lab")


def test_the_keys_page_by_keyboard_and_on_a_phone(open_page, admin_key):
    page = open_page("/", viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    enter(page, admin_key)
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.locator("#toggle-sidebar").tap()
    page.get_by_role("button", name="API keys").tap()
    expect(page.locator("#sidebar")).to_be_hidden()
    page.get_by_text("Make a key", exact=True).tap()
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    unnamed = page.locator("button, input, textarea, select").evaluate_all(
        """(all) => all
            .filter((each) => !each.ariaLabel && !each.textContent.trim() && !each.labels?.length)
            .map((each) => each.outerHTML)"""
    )
    assert unnamed == []
    page.get_by_label("Administrator").focus()
    page.keyboard.press("Space")
    expect(page.get_by_label("Models")).to_be_disabled()
    page.get_by_label("Tenant").focus()
    page.keyboard.type("ops")
    page.keyboard.press("Enter")
    expect(page.get_by_label("of ops")).to_be_focused()
    expect(page.locator("tbody tr")).to_have_count(2)
