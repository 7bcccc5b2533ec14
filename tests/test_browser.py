"""The pack in a real browser: Debian's chromium, driven by Playwright, on the live server.

`make browser` brings both; without them these tests are skipped. CONCEPT_GUARD_FRONTEND names the static folder of
another comfyui-frontend-package to try; CONCEPT_GUARD_SCREENSHOTS a folder for pictures of what was seen.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora
import pytest

from conceptguard.tools.host import Host
from conceptguard.tools.workflow import to_api

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
CHROMIUM = os.environ.get("CONCEPT_GUARD_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SCREENSHOTS = os.environ.get("CONCEPT_GUARD_SCREENSHOTS")
FRONTEND = os.environ.get("CONCEPT_GUARD_FRONTEND")
PATIENCE = 120_000  # ms: a busy machine is no reason to fail
PRESETS = "user/default/concept_guard/presets"

playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright here: `make browser` brings it")
pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: `make browser` brings it"),
]

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]  # fmt: skip
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False, "Comfy.EnableTooltips": False}
NODE = "app.graph._nodes.find(n => n.type === 'ConceptGuardCRE')"
VALUES = f"() => ['start_percent', 'end_percent'].map(name => {NODE}.widgets.find(w => w.name === name).value)"


class Browser:
    """One page with the pack in it, and the few things that the tests do there."""

    def __init__(self, page: Any, host: Host) -> None:
        self.page, self.host = page, host
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def js(self, source: str, *arguments: Any) -> Any:
        return self.page.evaluate(source, *arguments)

    def open(self, vue: bool) -> None:
        settings = self.host.base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps({**SETTINGS, "Comfy.VueNodes.Enabled": vue}), encoding="utf-8")
        self.page.goto(self.host.url, wait_until="commit")
        self.wait("() => window.app?.graph && window.LiteGraph?.registered_node_types?.ConceptGuardApplyPreset"
                  " && app.extensionManager?.getSidebarTabs?.().some(t => t.id === 'ConceptGuard')")  # fmt: skip

    def wait(self, condition: str) -> None:
        self.page.wait_for_function(condition, timeout=PATIENCE)

    def load(self, workflow: dict[str, Any]) -> None:
        self.js("w => app.loadGraphData(w)", workflow)

    def look_at(self, node: str, scale: float = 1.0) -> None:
        """Bring a node into view, free of the side bar."""
        self.js(f"s => {{ const n = {node}; app.canvas.ds.scale = s;"
                " app.canvas.ds.offset = [-n.pos[0] + 420 / s, -n.pos[1] + 160 / s]; app.canvas.setDirty(true, true) }",
                scale)  # fmt: skip
        self.page.wait_for_timeout(400)

    def box(self, selector: str) -> dict[str, float]:
        found = self.page.locator(selector).first
        found.wait_for(state="visible", timeout=PATIENCE)
        box: dict[str, float] = found.bounding_box()
        return box

    def drag(self, selector: str, by: float) -> None:
        box = self.box(selector)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + by / 2, y)
        self.page.mouse.move(x + by, y)
        self.page.mouse.up()

    def picture(self, name: str) -> None:
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"))

    def drop(self, selector: str, name: str, content: str) -> None:
        """A file dropped on an element, as the browser would tell it."""
        self.js(
            """([selector, name, content]) => {
                const data = new DataTransfer();
                data.items.add(new File([content], name, { type: 'application/json' }));
                const event = new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true });
                document.querySelector(selector).dispatchEvent(event);
            }""",
            [selector, name, content],
        )


@pytest.fixture(scope="module")
def server(host: Host) -> Iterator[Host]:
    """The session's server, or one of its own with another frontend."""
    if FRONTEND is None:
        lora.write(host.base / "models" / "loras")
        yield host
        return
    with Host(arguments=("--front-end-root", FRONTEND)) as other:
        lora.write(other.base / "models" / "loras")
        yield other


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["canvas", "nodes2"])
def browser(request: pytest.FixtureRequest, chromium: Any, server: Host) -> Iterator[Browser]:
    """A page in each of the frontend's two renderers."""
    context = chromium.new_context(viewport={"width": 1360, "height": 860})
    context.set_default_timeout(PATIENCE)
    opened = Browser(context.new_page(), server)
    opened.open(vue=request.param == "nodes2")
    yield opened
    context.close()


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def near(found: list[float], expected: list[float]) -> bool:
    return all(abs(a - b) < 0.03 for a, b in zip(found, expected, strict=True))


def test_every_node_is_there_and_edit_nodes_have_a_range(browser: Browser) -> None:
    from conceptguard.nodes import NODES

    known = set(browser.js("() => Object.keys(LiteGraph.registered_node_types)"))
    assert {node.GET_SCHEMA().node_id for node in NODES} <= known
    for node in NODES:
        inputs = {each.id for each in node.GET_SCHEMA().inputs}
        names = browser.js("id => (LiteGraph.createNode(id).widgets ?? []).map(w => w.name)", node.GET_SCHEMA().node_id)
        assert ("range_view" in names) == ({"start_percent", "end_percent"} <= inputs)
        assert "range_view" not in names or names[-1] == "range_view"


def test_the_range_is_dragged_and_saved_as_two_numbers(browser: Browser) -> None:
    browser.load(workflow("erase-a-concept"))
    browser.look_at(NODE)
    before = browser.js(f"() => {{ const n = {NODE}; return [...n.pos, n.serialize().widgets_values] }}")
    width = browser.box(".cg-range .track")["width"]

    browser.drag(".cg-range .handle[data-part=start]", 0.4 * width)
    assert near(browser.js(VALUES), [0.4, 1.0])
    browser.drag(".cg-range .handle[data-part=end]", -0.3 * width)
    assert near(browser.js(VALUES), [0.4, 0.7])
    browser.drag(".cg-range .bar", -0.2 * width)
    dragged = browser.js(VALUES)
    assert near(dragged, [0.2, 0.5])
    browser.picture("range")

    x, y, saved = browser.js(f"() => {{ const n = {NODE}; return [...n.pos, n.serialize().widgets_values] }}")
    assert [x, y] == before[:2], "the node moved with the handle"
    expected = list(before[2])
    expected[1:3] = dragged  # strength, start_percent, end_percent, ...
    assert saved == expected and None not in saved
    prompt = browser.js("async () => (await app.graphToPrompt()).output")
    inputs = next(node["inputs"] for node in prompt.values() if node["class_type"] == "ConceptGuardCRE")
    assert [inputs["start_percent"], inputs["end_percent"]] == dragged and "range_view" not in inputs

    browser.load(browser.js("() => JSON.parse(JSON.stringify(app.graph.serialize()))"))
    assert browser.js(VALUES) == dragged
    copies = browser.js(
        f"""() => {{ const n = {NODE}; app.canvas.selectNode(n);
        app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard();
        const copy = app.graph._nodes.filter(c => c.type === n.type).at(-1);
        return [copy !== n, copy.serialize().widgets_values, copy.widgets.at(-1).name]; }}"""
    )
    assert copies == [True, saved, "range_view"]


def test_the_range_takes_keys_double_clicks_and_undo(browser: Browser) -> None:
    browser.load(workflow("erase-a-concept"))
    browser.look_at(NODE)
    start = browser.page.locator(".cg-range .handle[data-part=start]").first
    start.focus()
    start.press("Shift+ArrowRight")
    start.press("ArrowRight")
    assert browser.js(VALUES) == [0.11, 1.0]
    assert [start.get_attribute(f"aria-{name}") for name in ("valuenow", "valuemin", "valuemax")] == ["0.11", "0", "1"]
    assert start.get_attribute("role") == "slider"
    start.press("Delete")
    assert browser.js(f"() => Boolean({NODE})"), "the key took the node away"
    browser.js("() => app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    assert browser.js(VALUES)[0] < 0.11
    # Undo makes the node anew; the bar that is seen must be the new one's.
    browser.wait(f"() => document.querySelector('.cg-range')?.conceptGuardNode === {NODE}")
    browser.look_at(NODE)
    box = browser.box(".cg-range .bar")
    browser.page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert browser.js(VALUES) == [0.0, 1.0]
    assert "steps 1-20 of 20" in browser.page.locator(".cg-range .note").first.inner_text()


def test_a_linked_range_is_shown_as_off(browser: Browser) -> None:
    browser.load(workflow("erase-a-concept"))
    browser.look_at(NODE)
    browser.js(f"""() => {{ const n = {NODE}; const source = LiteGraph.createNode('ConditioningTimestepsRange');
        app.graph.add(source); source.connect(0, n, n.inputs.findIndex(i => i.name === 'range')); }}""")
    browser.wait("() => document.querySelector('.cg-range.off')")
    width = browser.box(".cg-range .track")["width"]
    browser.drag(".cg-range .handle[data-part=start]", 0.4 * width)
    assert browser.js(VALUES) == [0.0, 1.0]


def test_a_range_lives_inside_a_subgraph(browser: Browser) -> None:
    browser.load(workflow("erase-a-concept"))
    inside = browser.js(
        f"""async () => {{ const n = {NODE}; n.widgets.find(w => w.name === 'start_percent').value = 0.25;
        app.graph.convertToSubgraph(new Set([n]));
        const saved = JSON.parse(JSON.stringify(app.graph.serialize()));
        await app.loadGraphData(saved);
        const prompt = (await app.graphToPrompt()).output;
        return Object.values(prompt).find(p => p.class_type === 'ConceptGuardCRE').inputs; }}"""
    )
    assert [inside["start_percent"], inside["end_percent"], inside["blocks"]] == [0.25, 1.0, "all"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_template_becomes_the_prompt_that_the_tests_run(browser: Browser, path: Path) -> None:
    browser.load(workflow(path.stem))
    found = browser.js("async () => (await app.graphToPrompt()).output")
    expected = to_api(workflow(path.stem), browser.host.get("/object_info"))
    assert {id: node["class_type"] for id, node in found.items()} == {
        id: node["class_type"] for id, node in expected.items()
    }
    for id, node in expected.items():
        assert found[id]["inputs"] == node["inputs"], f"node {id}, {node['class_type']}"


PRESET = (ROOT / "presets" / "no-weapons.json").read_text(encoding="utf-8")
HOSTILE = json.dumps(
    {**json.loads(PRESET), "name": "<img src=x onerror='window.hit=1'>", "description": "<script>window.hit=1</script>"}
)


def kept(host: Host) -> list[Path]:
    return sorted((host.base / PRESETS).glob("*.json"))


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
    browser.wait("() => document.querySelectorAll('.cg-presets details').length >= 7")
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
    browser.wait("() => document.querySelectorAll('.cg-presets details').length === 6")
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
        (PRESET.replace('"strength"', '"__proto__"').replace('"CRE"', '"x"'), "x"),
    ]:
        page.get_by_placeholder("Paste a preset's text here").fill(text)
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
    prompt = browser.js("async () => (await app.graphToPrompt()).output")
    applied = next(id for id, node in prompt.items() if node["class_type"] == "ConceptGuardApplyPreset")
    assert isinstance(prompt[applied]["inputs"]["clip"], list) and isinstance(prompt[applied]["inputs"]["model"], list)
    assert [applied, 0] in [node["inputs"].get("model") for node in prompt.values()]
    browser.js("() => app.queuePrompt(0, 1)")
    browser.wait("() => Object.values(app.nodeOutputs ?? {}).some(o => o?.images?.length)")
    browser.picture("preset-applied")


def test_no_script_of_the_page_failed(browser: Browser) -> None:
    assert browser.errors == []
