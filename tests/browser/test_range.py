"""The range bar under start_percent and end_percent: a view of two numbers, which stay the data."""

from __future__ import annotations

import json

import pytest
from page import Browser, workflow

pytestmark = [pytest.mark.server, pytest.mark.browser]
NODE = "app.graph._nodes.find(n => n.type === 'ConceptGuardCRE')"
VALUES = f"() => ['start_percent', 'end_percent'].map(name => {NODE}.widgets.find(w => w.name === name).value)"
HOLDER = "(app.rootGraph ?? app.graph)._nodes.find(n => n.subgraph)"
INSIDE = f"{HOLDER}.subgraph._nodes.find(n => n.type === 'ConceptGuardCRE')"
SHADED = "() => [...document.querySelectorAll('.cg-range .found')].some(each => each.offsetWidth > 20)"


def near(found: list[float], expected: list[float]) -> bool:
    return all(abs(a - b) < 0.03 for a, b in zip(found, expected, strict=True))


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
    inputs = browser.prompt_of("ConceptGuardCRE")
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


def test_the_period_that_a_search_found_is_shaded(browser: Browser) -> None:
    browser.load(workflow("find-causal-period"))
    browser.look_at(NODE)
    browser.wait("() => document.querySelector('.cg-range.off')")
    assert browser.js("() => document.querySelector('.cg-range .found').offsetWidth") == 0
    browser.found("app.graph._nodes.find(n => n.type === 'ConceptGuardCausalPeriod').id", 0.2, 0.65)
    browser.wait(SHADED)
    assert browser.page.locator(".cg-range .note").first.inner_text() == "found: 20-65 %"
    assert browser.js(VALUES) == [0.0, 1.0], "the shade is no value"
    browser.picture("range-found")


def test_the_shade_outlives_a_reload_of_the_page(browser: Browser) -> None:
    browser.load(workflow("find-causal-period"))
    before = browser.js("() => app.graph.serialize().nodes.map(n => n.widgets_values)")
    browser.found("app.graph._nodes.find(n => n.type === 'ConceptGuardCausalPeriod').id", 0.2, 0.65)
    saved = browser.js("() => JSON.stringify(app.graph.serialize())")
    assert [node.get("widgets_values") for node in json.loads(saved)["nodes"]] == before
    browser.open()
    browser.load(json.loads(saved))
    browser.look_at(NODE)
    browser.wait(SHADED)
    assert browser.page.locator(".cg-range .note").first.inner_text() == "found: 20-65 %"


def test_the_bar_counts_the_steps_of_the_sampler_behind_it(browser: Browser) -> None:
    browser.load(workflow("erase-a-concept"))
    browser.look_at(NODE)
    note = browser.page.locator(".cg-range .note").first
    note.get_by_text("steps 1-20 of 20").wait_for()
    browser.js("""() => { for (const n of app.graph._nodes) if (n.type === 'KSampler')
        n.widgets.find(w => w.name === 'steps').value = 8;
        app.api.dispatchCustomEvent('graphChanged', app.graph.serialize()); }""")
    note.get_by_text("steps 1-8 of 8").wait_for()
    browser.drag(".cg-range .handle[data-part=end]", -0.5 * browser.box(".cg-range .track")["width"])
    note.get_by_text("steps 1-4 of 8").wait_for()


def test_a_range_lives_inside_a_subgraph(browser: Browser) -> None:
    """Its search and its sampler stay outside."""
    browser.load(workflow("find-causal-period"))
    browser.js(f"() => {{ app.graph.convertToSubgraph(new Set([{NODE}])) }}")
    browser.load(browser.js("() => JSON.parse(JSON.stringify(app.graph.serialize()))"))
    browser.found("app.graph._nodes.find(n => n.type === 'ConceptGuardCausalPeriod').id", 0.2, 0.65)
    browser.js(f"() => app.canvas.setGraph({HOLDER}.subgraph)")
    browser.look_at(INSIDE)
    browser.wait(SHADED)
    browser.js(f"() => {{ const n = {INSIDE}; n.disconnectInput(n.inputs.findIndex(i => i.name === 'range')) }}")
    browser.wait("() => !document.querySelector('.cg-range.off')")
    assert "of 20" in browser.page.locator(".cg-range .note").first.inner_text()
    browser.drag(".cg-range .handle[data-part=start]", 0.4 * browser.box(".cg-range .track")["width"])
    browser.js("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")
    inputs = browser.prompt_of("ConceptGuardCRE")
    assert near([inputs["start_percent"], inputs["end_percent"]], [0.4, 1.0]) and inputs["blocks"] == "all"


def test_a_search_inside_a_subgraph_is_found_too(browser: Browser) -> None:
    browser.load(workflow("find-causal-period"))
    browser.js("""() => { const n = app.graph._nodes.find(n => n.type === 'ConceptGuardCausalPeriod');
        app.graph.convertToSubgraph(new Set([n])) }""")
    inside = f"`${{{HOLDER}.id}}:${{{HOLDER}.subgraph._nodes[0].id}}`"
    browser.found(inside, 0.3, 0.5)
    browser.look_at(NODE)
    browser.wait(SHADED)
    assert browser.page.locator(".cg-range .note").first.inner_text() == "found: 30-50 %"


def test_the_window_outlives_a_reload_of_the_page(browser: Browser) -> None:
    browser.load(workflow("erase-a-concept"))
    browser.look_at(NODE)
    browser.drag(".cg-range .handle[data-part=start]", 0.3 * browser.box(".cg-range .track")["width"])
    saved = browser.js("() => JSON.stringify(app.graph.serialize())")
    values = browser.js(VALUES)
    browser.open()
    browser.load(json.loads(saved))
    assert browser.js(VALUES) == values and near(values, [0.3, 1.0])
    browser.look_at(NODE)
    assert near([float(browser.page.locator(".cg-range .handle").first.get_attribute("aria-valuenow"))], [0.3])


def test_a_new_node_starts_with_the_window_of_the_settings(browser: Browser) -> None:
    fresh = """type => { const n = LiteGraph.createNode(type); app.graph.add(n);
        return ['start_percent', 'end_percent'].map(name => n.widgets.find(w => w.name === name).value); }"""
    browser.js("() => app.graph.clear()")
    own = browser.js(fresh, "ConceptGuardEIUP")
    for text, window in [("0.1 - 0.7", [0.1, 0.7]), ("0.2 0.4", [0.2, 0.4]), ("0.7 - 0.1", own), ("x", own), ("", own)]:
        browser.set("ConceptGuard.Range.Window", text)
        assert browser.js(fresh, "ConceptGuardEIUP") == window, text
    browser.set("ConceptGuard.Range.Window", "0.1 - 0.7")
    assert browser.js(fresh, "ConceptGuardConceptMap") == [0.2, 0.8], "it edits nothing"
    browser.load(workflow("erase-a-concept"))
    assert browser.js(VALUES) == [0.0, 1.0], "a saved window stays"
    browser.set("ConceptGuard.Range.Window", "")
