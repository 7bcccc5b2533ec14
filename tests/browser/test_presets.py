"""The preset panel: dropped, pasted, hostile, kept, inserted, applied."""

from __future__ import annotations

import json

import pytest
from page import ROOT, Browser, kept, workflow

pytestmark = [pytest.mark.server, pytest.mark.browser]
SHIPPED = len(list((ROOT / "presets").glob("*.json")))
PRESET = (ROOT / "presets" / "no-weapons.json").read_text(encoding="utf-8")
HOSTILE = json.dumps(
    {**json.loads(PRESET), "name": "<img src=x onerror='window.hit=1'>", "description": "<script>window.hit=1</script>"}
)


def test_presets_are_dropped_shown_kept_and_inserted(browser: Browser) -> None:
    page = browser.page
    before = len(kept(browser.host))
    browser.js("() => app.graph.clear()")
    browser.drop("#graph-canvas", "weapons.json", PRESET)
    card = page.locator(".cg-presets .card.new")
    card.wait_for()
    assert "No weapons" in card.inner_text() and 'Erases "weapon"' in card.inner_text()
    assert len(kept(browser.host)) == before, "nothing is stored before the user says so"
    browser.picture("preset-preview")
    card.get_by_role("button", name="Keep").click()
    page.locator(".cg-presets .card.new").wait_for(state="detached")
    browser.wait("() => document.querySelectorAll('.cg-presets details').length === " + str(SHIPPED + 1))
    assert len(kept(browser.host)) == before + 1
    assert json.loads(kept(browser.host)[-1].read_text(encoding="utf-8")) == json.loads(PRESET)

    page.get_by_placeholder("Search presets").fill("tobacco")
    assert page.locator(".cg-presets details").count() == 1
    page.get_by_placeholder("Search presets").fill("")
    page.locator(".cg-presets .card").first.get_by_role("button", name="Insert").click()
    text = browser.js("() => app.graph._nodes.find(n => n.type === 'ConceptGuardApplyPreset').widgets[0].value")
    assert json.loads(text) == json.loads(PRESET)
    mine = page.locator(".cg-presets .card").first
    mine.get_by_role("button", name="Delete").click()
    assert len(kept(browser.host)) == before + 1
    mine.get_by_role("button", name="Really delete?").click()
    browser.wait("() => document.querySelectorAll('.cg-presets details').length === " + str(SHIPPED))
    assert len(kept(browser.host)) == before


def test_hostile_presets_are_inert_or_refused(browser: Browser) -> None:
    page = browser.page
    before = kept(browser.host)
    browser.js("() => { window.hit = 0 }")
    page.get_by_placeholder("Paste a preset's text here").fill(HOSTILE)
    card = page.locator(".cg-presets .card.new")
    card.get_by_text("onerror").wait_for()
    assert "<script>" in card.inner_text() and card.locator("img, script").count() == 0
    for text, complaint in [
        ("{]", "Invalid JSON"),
        (PRESET.replace('"strength"', '"__proto__"').replace('"CRE"', '"x"'), "there is no method 'x' here"),
    ]:
        page.get_by_placeholder("Paste a preset's text here").fill(text)
        card.get_by_text(complaint).first.wait_for()  # the one before it may still stand there
        card.get_by_text("This is not a preset").wait_for()
        assert complaint in card.inner_text() and card.get_by_role("button", name="Keep").count() == 0
    browser.drop(".cg-presets", "zip.json", "PK\x03\x04")
    card.get_by_text("not a JSON object").wait_for()
    card.get_by_role("button", name="Close").click()
    assert browser.js("() => window.hit") == 0 and kept(browser.host) == before


def test_a_preset_goes_into_the_model_line_and_the_picture_appears(browser: Browser) -> None:
    browser.load(workflow("erase-a-concept"))
    browser.js("""() => { const s = app.graph._nodes.filter(n => n.type === 'KSampler').at(-1);
        app.canvas.deselectAll?.(); app.canvas.selectNode(s);
        for (const n of app.graph._nodes)
            if (n.type === 'KSampler') n.widgets.find(w => w.name === 'steps').value = 2; }""")
    if not browser.page.locator(".cg-presets").count():
        browser.js("() => app.extensionManager.sidebarTab.toggleSidebarTab('ConceptGuard')")
    shipped = browser.page.locator(".cg-presets .card").filter(has_text="No weapons").last
    shipped.get_by_role("button", name="Apply").click()
    prompt = browser.prompt()
    applied = next(id for id, node in prompt.items() if node["class_type"] == "ConceptGuardApplyPreset")
    assert isinstance(prompt[applied]["inputs"]["clip"], list) and isinstance(prompt[applied]["inputs"]["model"], list)
    assert [applied, 0] in [node["inputs"].get("model") for node in prompt.values()]
    browser.js("() => app.queuePrompt(0, 1)")
    browser.wait("() => Object.values(app.nodeOutputs ?? {}).some(o => o?.images?.length)")
    browser.picture("preset-applied")


def test_the_panel_tells_of_a_policy_where_there_is_one(browser: Browser) -> None:
    page, told = browser.page, "<img src=x onerror='window.hit=1'>"
    run = {"time": "2026-01-01T12:00:00+00:00", "verdict": "edited", "model": "BaseModel", "did": ['"knife" acted']}
    refused = {**run, "verdict": "refused", "why": told, "did": []}
    found = {"on": True, "governs": "all models: No knives", "refused": [refused], "refused_count": 1, "last": [run]}
    if not page.locator(".cg-presets").count():
        browser.js("() => app.extensionManager.sidebarTab.toggleSidebarTab('ConceptGuard')")
    assert page.locator(".cg-presets .policy").count() == 0
    page.route("**/concept_guard/policy", lambda route: route.fulfill(json=found))
    try:
        for _ in range(2):
            browser.js("() => app.extensionManager.sidebarTab.toggleSidebarTab('ConceptGuard')")
        card = page.locator(".cg-presets .policy")
        card.get_by_text("all models: No knives").wait_for()
        card.get_by_text("Refused today: 1").click()
        card.get_by_text(told).wait_for()
        card.get_by_text("The last runs").click()
        card.get_by_text('"knife" acted').wait_for()
        assert card.locator("img, button, input").count() == 0 and browser.js("() => window.hit ?? 0") == 0
    finally:
        page.unroute("**/concept_guard/policy")
