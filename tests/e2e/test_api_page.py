"""The page of the API in a browser: it lists the routes, tries one with a key, and asks no other machine.

`open_page` checks after each test that no request left the origin and that nothing broke the page's policy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture
def api_page(open_page: Callable[..., Any]) -> Any:
    page = open_page("/docs")
    page.wait_for_selector(".opblock")
    return page


def test_it_lists_every_route_of_the_document(api_page: Any) -> None:
    document = api_page.evaluate("() => fetch('/openapi.json').then((answer) => answer.json())")
    shown = api_page.eval_on_selector_all(".opblock", "rows => rows.map((row) => row.id)")
    assert len(shown) == sum(len(methods) for methods in document["paths"].values())
    paths = api_page.eval_on_selector_all(".opblock-summary-path", "rows => rows.map((row) => row.dataset.path)")
    assert set(paths) == set(document["paths"])
    assert "/v1/embeddings" in paths
    assert "Seamount" in api_page.inner_text(".info .title")


def test_a_route_opens_with_its_schemas(api_page: Any) -> None:
    row = api_page.locator(".opblock", has=api_page.locator('[data-path="/v1/embeddings"]'))
    row.locator(".opblock-summary").click()
    row.locator(".opblock-description").wait_for()
    text = row.inner_text()
    assert "Turn texts into vectors" in text
    assert "encoding_format" in text or "input" in text
    assert "401" in text


def test_a_key_goes_with_what_is_tried_and_is_not_kept(api_page: Any) -> None:
    api_page.locator(".btn.authorize").first.click()
    field = api_page.locator(".modal-ux input")
    field.fill("sk-of-a-test")
    api_page.locator(".modal-ux .btn.authorize").click()
    api_page.locator(".modal-ux .btn-done").click()
    row = api_page.locator(".opblock", has=api_page.locator('[data-path="/v1/models"]'))
    row.locator(".opblock-summary").click()
    row.locator(".try-out__btn").click()
    with api_page.expect_request("**/v1/models") as asked:
        row.locator(".btn.execute").click()
    assert asked.value.headers["authorization"] == "Bearer sk-of-a-test"
    row.locator(".live-responses-table .response-col_status").first.wait_for()
    assert "seamount-test" in row.locator(".live-responses-table").inner_text()
    kept = api_page.evaluate("() => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert "sk-of-a-test" not in json.dumps(kept)


def test_an_address_cannot_make_it_show_another_document(open_page: Callable[..., Any], base_url: str) -> None:
    page = open_page(f"/docs?url={base_url}/healthz&configUrl={base_url}/healthz")
    page.wait_for_selector(".opblock")
    assert "Seamount" in page.inner_text(".info .title")
