"""The report of a run in a browser, from the file: it follows light and dark, fits a phone, and asks for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_folder import write_run

from seamount.training.tuning.report import write_report

pytestmark = pytest.mark.browser
_SLIP_IN = """() => {
  const script = document.createElement("script");
  script.textContent = "document.title = 'it ran'";
  document.body.append(script);
  return document.title;
}"""


@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(243, 247, 247)"), ("dark", "rgb(11, 21, 23)")])
def test_it_shows_itself_and_asks_for_nothing(browser: Any, tmp_path: Path, scheme: str, ground: str) -> None:
    write_run(tmp_path, tasks=("sums", "units"))
    write_report(tmp_path, tmp_path / "report.html")
    context = browser.new_context(color_scheme=scheme, viewport={"width": 360, "height": 700})
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    # Its own style is let in, which shows that the policy's digest fits.
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("svg.chart").count() == 5
    assert page.locator("svg.chart .curve-0").first.bounding_box()["width"] > 100
    assert complaints == []
    assert asked == [(tmp_path / "report.html").as_uri()]
    # Had something slipped in, the policy would keep it from running.
    title = page.evaluate(_SLIP_IN)
    assert title.endswith("tuning report")
    assert ["Content Security Policy" in complaint for complaint in complaints] == [True]
    context.close()
