"""Nodes and templates in the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from page import ROOT, Browser, workflow

from conceptguard.tools.workflow import to_api

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
pytestmark = [pytest.mark.server, pytest.mark.browser]


def test_every_node_is_there_and_edit_nodes_have_a_range(browser: Browser) -> None:
    from conceptguard.nodes import NODES

    known = set(browser.js("() => Object.keys(LiteGraph.registered_node_types)"))
    assert {node.GET_SCHEMA().node_id for node in NODES} <= known
    for node in NODES:
        inputs = {each.id for each in node.GET_SCHEMA().inputs}
        names = browser.js("id => (LiteGraph.createNode(id).widgets ?? []).map(w => w.name)", node.GET_SCHEMA().node_id)
        views = [name for name in names if name.endswith("_view")]
        assert ("range_view" in views) == ({"start_percent", "end_percent"} <= inputs)
        assert names[len(names) - len(views) :] == views, "saved values are restored by position: views come last"


def test_every_template_becomes_the_prompt_that_the_tests_run(browser: Browser) -> None:
    known = browser.host.get("/object_info")
    for path in EXAMPLES:
        browser.load(workflow(path.stem))
        found, expected = browser.prompt(), to_api(workflow(path.stem), known)
        assert {id: node["class_type"] for id, node in found.items()} == {
            id: node["class_type"] for id, node in expected.items()
        }, path.stem
        for id, node in expected.items():
            assert found[id]["inputs"] == node["inputs"], f"{path.stem}: node {id}, {node['class_type']}"


def overlapping(nodes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    def along(a: dict[str, Any], b: dict[str, Any], start: str, size: str) -> bool:
        return bool(a[start] < b[start] + b[size] and b[start] < a[start] + a[size])

    pairs = combinations(nodes, 2)
    return [(a["type"], b["type"]) for a, b in pairs if along(a, b, "x", "width") and along(a, b, "y", "height")]


def test_no_two_nodes_of_a_template_overlap(browser: Browser) -> None:
    found = {}
    for path in EXAMPLES:
        browser.load(workflow(path.stem))
        nodes = browser.nodes()
        assert len(nodes) == len(workflow(path.stem)["nodes"]), path.stem
        found[path.stem] = overlapping(nodes)
    assert not {stem: pairs for stem, pairs in found.items() if pairs}


def test_no_two_nodes_of_a_blueprint_overlap(browser: Browser) -> None:
    for path in BLUEPRINTS:
        blueprint = json.loads(path.read_text(encoding="utf-8"))
        browser.load(blueprint)
        browser.js("() => app.canvas.setGraph([...app.graph.subgraphs.values()][0])")
        nodes = browser.nodes()
        browser.js("() => app.canvas.setGraph(app.graph)")
        assert len(nodes) == len(blueprint["definitions"]["subgraphs"][0]["nodes"]), path.stem
        assert not overlapping(nodes), path.stem


def test_a_concept_map_is_shown_on_its_node(browser: Browser) -> None:
    browser.load(workflow("see-a-concept"))
    node = "app.graph._nodes.find(n => n.type === 'ConceptGuardConceptMap')"
    browser.js("""() => { for (const n of app.graph._nodes) for (const w of n.widgets ?? [])
        if (w.name === 'steps') w.value = 2; else if (w.name === 'seed') w.value = Date.now() % 1e9;
        app.queuePrompt(0, 1) }""")  # a seed of its own: the host would answer what it has drawn before
    browser.wait("() => [...document.querySelectorAll('.cg-maps img')].some(each => each.naturalWidth > 0)")
    browser.look_at(node)
    browser.box(".cg-maps img")
    browser.picture("concept-map")
    browser.set("ConceptGuard.Maps.Show", False)
    browser.js(f"""() => {{ const n = {node}; n.onExecuted(app.nodeOutputs[n.id]) }}""")
    assert browser.page.locator(".cg-maps img").count() == 0
    browser.set("ConceptGuard.Maps.Show", True)


def test_a_page_of_help_shows_its_pictures(browser: Browser) -> None:
    cre = "app.graph._nodes.find(n => n.type === 'ConceptGuardCRE')"
    browser.load(workflow("erase-a-concept"))
    browser.look_at(cre)
    browser.js(f"() => {{ app.canvas.deselectAll?.(); app.canvas.selectNode({cre}) }}")
    browser.page.get_by_test_id("info-button").click()
    browser.wait("""() => { const shown = [...document.querySelectorAll('.node-help-content img')];
        return shown.some(each => each.src.endsWith('/ConceptGuardCRE.webp'))
            && shown.every(each => each.naturalWidth > 0) }""")
    browser.picture("help")
    browser.open()


@pytest.fixture
def chinese(browser: Browser) -> Iterator[Browser]:
    browser.open(**{"Comfy.Locale": "zh"})
    yield browser
    browser.open(**{"Comfy.Locale": "en"})


def test_the_panel_and_the_range_speak_chinese(chinese: Browser) -> None:
    words = strings("zh", "main")["conceptGuard"]
    chinese.load(workflow("erase-a-concept"))
    chinese.look_at("app.graph._nodes.find(n => n.type === 'ConceptGuardCRE')")
    steps = words["steps {first}-{last} of {all}"].format(first=1, last=20, all=20)
    chinese.page.locator(".cg-range .note").first.get_by_text(steps).wait_for()
    if not chinese.page.locator(".cg-presets").count():
        chinese.js("() => app.extensionManager.sidebarTab.toggleSidebarTab('ConceptGuard')")
    chinese.page.get_by_placeholder(words["Search presets"]).wait_for()
    for text in ("Import a file", "From ConceptGuard", "Apply"):
        chinese.page.locator(".cg-presets").get_by_text(words[text], exact=True).first.wait_for()
    chinese.picture("chinese")


def test_the_nodes_and_their_settings_speak_chinese(chinese: Browser) -> None:
    browser = chinese
    nodes, settings = (strings("zh", name) for name in ("nodeDefs", "settings"))
    served = browser.host.get("/api/i18n")["zh"]
    assert nodes.items() <= served["nodeDefs"].items() and settings.items() <= served["settings"].items()
    if not browser.newer:
        return  # it puts its own texts in a language's place when it has loaded them, and loses those of packs
    titles = browser.js("ids => ids.map(id => LiteGraph.registered_node_types[id].title)", list(nodes))
    assert titles == [texts["display_name"] for texts in nodes.values()]
    show_settings(browser)
    for texts in settings.values():
        browser.page.get_by_text(texts["name"], exact=True).first.wait_for()


def test_the_settings_page_tells_where_learned_files_are(browser: Browser) -> None:
    show_settings(browser)
    browser.page.get_by_text("Window of new edit nodes", exact=True).first.wait_for()
    store = browser.page.locator(".cg-store").first
    store.get_by_text("concept_guard").wait_for()
    assert str(browser.host.base / "models" / "concept_guard") in store.inner_text().splitlines()
    browser.picture("settings")
    browser.page.keyboard.press("Escape")


def show_settings(browser: Browser) -> None:
    browser.js("() => { app.extensionManager.command.execute('Comfy.ShowSettingsDialog') }")
    browser.page.get_by_role("dialog").get_by_text("ConceptGuard", exact=True).first.click()


def strings(language: str, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))
    return loaded
