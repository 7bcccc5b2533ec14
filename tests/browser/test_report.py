"""A report in a browser: it fits a phone, runs nothing, shows what was flagged to who asks; node and panel open it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from page import ROOT, Browser
from test_report_page import EVIL, SETTINGS, work  # noqa: F401, the fixture

from conceptguard.editing.presets.document import read
from conceptguard.jobs.report.card import carried
from conceptguard.jobs.report.page import write
from conceptguard.jobs.report.work import Work

pytestmark = [pytest.mark.browser, pytest.mark.server]
RUNS = """() => { const script = document.createElement('script'); script.textContent = 'window.hit = 1';
    document.head.append(script); return window.hit ?? 0; }"""
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


def opened(browser: Browser, link: Any) -> Any:
    """The page that a link opens, beside the graph."""
    with browser.page.context.expect_page() as found:
        link.click()
    page = found.value
    page.wait_for_selector("h1")
    return page


def checked(page: Any) -> None:
    """The report is shown, runs nothing, and its blur is lifted without a script."""
    assert EVIL in page.inner_text("body") and page.locator(".verdict p").count() >= 1
    assert [each.startswith("blur") for each in page.evaluate(FILTERS)].count(True) == 3
    page.locator(".shot:has(input)").first.click()
    assert [each.startswith("blur") for each in page.evaluate(FILTERS)].count(True) == 2
    assert page.evaluate(RUNS) == 0, "the page lets scripts run"
    page.close()


def test_a_report_is_opened_from_its_node_and_from_the_panel(browser: Browser, work: Work) -> None:  # noqa: F811
    write(work, SETTINGS, {})
    folder = browser.host.base / "output" / "concept_guard_reports" / "evil-0123456789"
    shutil.copytree(work.path, folder, dirs_exist_ok=True)
    try:
        browser.js(
            "() => { window.hit = 0; app.graph.clear(); const n = LiteGraph.createNode('ConceptGuardReport');"
            " app.graph.add(n); n.pos = [100, 100]; }"
        )
        browser.js("""() => { const id = String(app.graph._nodes[0].id);
            app.api.dispatchCustomEvent('executed', { node: id, display_node: id, prompt_id: 'test',
                output: { text: ['done'], concept_guard_report: ['evil-0123456789'] } }); }""")
        browser.look_at("app.graph._nodes[0]", 0.4)
        checked(opened(browser, browser.page.locator("a.cg-report").first))
        for _ in range(1 if browser.page.locator(".cg-presets").count() == 0 else 2):
            browser.js("() => app.extensionManager.sidebarTab.toggleSidebarTab('ConceptGuard')")
        card = browser.page.locator(".cg-presets .report")
        card.first.wait_for()
        card.first.scroll_into_view_if_needed()
        assert EVIL in card.first.inner_text() and "What is to go was found" in card.first.inner_text()
        browser.picture("report-in-panel")
        checked(opened(browser, card.first.locator("a")))
        gone = browser.page.request.get(f"{browser.host.url}/concept_guard/reports/..%2F..%2Fx")
        assert gone.status == 404
    finally:
        shutil.rmtree(folder)


def test_the_panel_says_what_was_measured(browser: Browser) -> None:
    text = (ROOT / "presets" / "no-weapons.json").read_text(encoding="utf-8")
    found = [
        {"name": name, "side": "edited", "value": value, "n": 500}
        for name, value in (("flagged, of what is to go", 0.008), ("preservation", 0.97))
    ]
    card = {"checkpoint": "sdxl.safetensors", "checkpoint_sha256": "ab" * 32, "figures": found}
    if not browser.page.locator(".cg-presets").count():
        browser.js("() => app.extensionManager.sidebarTab.toggleSidebarTab('ConceptGuard')")
    browser.page.get_by_placeholder("Paste a preset's text here").fill(carried(read(text), card))
    shown = browser.page.locator(".cg-presets .card.new")
    shown.get_by_text("Measured on sdxl.safetensors (sha256 abababababab..)").wait_for()
    assert "0.8 % left (n = 500), 97 % kept (n = 500)" in shown.inner_text()
    browser.picture("preset-measured")
    shown.get_by_role("button", name="Discard").click()
    assert json.loads(text)["name"] in browser.page.locator(".cg-presets").inner_text()
