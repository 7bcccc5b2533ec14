"""The page of a report in a browser: it fits a phone, runs nothing, and shows what was flagged to who asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_report_page import EVIL, SETTINGS, work  # noqa: F401, the fixture

from conceptguard.jobs.report.page import write
from conceptguard.jobs.report.work import Work

pytestmark = pytest.mark.browser
FILTERS = "() => [...document.querySelectorAll('.shot img')].map(each => getComputedStyle(each).filter)"


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_on_a_phone_and_on_a_desk(chromium: Any, work: Work, width: int) -> None:  # noqa: F811
    write(work, SETTINGS, {})
    page = chromium.new_page(viewport={"width": width, "height": 800})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto((Path(work.path) / "report.html").as_uri())
    assert EVIL in page.inner_text("body") and said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    heads = page.evaluate("() => [...document.querySelectorAll('thead th')].map(each => each.offsetHeight)")
    assert max(heads) < 50, "a head of the table is broken into pieces"

    blurred = [each.startswith("blur") for each in page.evaluate(FILTERS)]
    assert sum(blurred) == 3
    shots = page.locator(".shot:has(input)")
    shots.first.click()
    shots.nth(1).locator("input").press("Space")
    assert sum(each.startswith("blur") for each in page.evaluate(FILTERS)) == 1
    page.close()
