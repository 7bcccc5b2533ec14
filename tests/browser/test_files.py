"""Presets with learned files, two browsers at once, and blueprints."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from page import PATIENCE, ROOT, Browser, kept

from conceptguard.editing.files.artefacts import Artefact, data_of
from conceptguard.editing.presets.document import packed, read
from conceptguard.tools.host import Host

pytestmark = [pytest.mark.server, pytest.mark.browser]
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
SHIFT = {"b": torch.ones(77, 1), "a": torch.ones(1, 768)}
WAY = Artefact("direction", "sharp things", SHIFT, text_width=768, tokens=77)
DATA = data_of(WAY)
FILE = {"file": "sharp.safetensors", "sha256": hashlib.sha256(DATA).hexdigest()}
DOCUMENT: dict[str, Any] = {
    "schema_version": 1,
    "kind": "concept-guard preset",
    "name": "Away from <b>blades</b>",
    "edits": [{"method": "safe region", "direction": FILE}],
    "files": [{**FILE, "data": base64.b64encode(DATA).decode()}],
}
PACKED = packed(read(json.dumps(DOCUMENT)))


@pytest.fixture(scope="module")
def pages(chromium: Any, host: Host) -> Iterator[list[Browser]]:
    """Two users' browsers on one server."""
    contexts = [chromium.new_context(viewport={"width": 1360, "height": 860}) for _ in range(2)]
    opened = []
    for context in contexts:
        context.set_default_timeout(PATIENCE)
        page = Browser(context.new_page(), host)
        page.page.on(
            "console",
            lambda message, page=page: page.errors.append(message.text) if "blueprint" in message.text else None,
        )
        page.open(**{"Comfy.VueNodes.Enabled": False})
        opened.append(page)
    before = kept(host)
    yield opened
    for context in contexts:
        context.close()
    for path in set(kept(host)) - set(before):
        path.unlink()


def drop(browser: Browser, selector: str, name: str, data: bytes) -> None:
    browser.js(
        """([selector, name, text]) => {
            const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], name));
            const event = new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true });
            document.querySelector(selector).dispatchEvent(event);
        }""",
        [selector, name, base64.b64encode(data).decode()],
    )


def test_a_preset_with_a_learned_file_is_dropped_shown_kept_and_exported(pages: list[Browser]) -> None:
    browser = pages[0]
    page, before = browser.page, kept(browser.host)
    drop(browser, "#graph-canvas", "away.safetensors", PACKED)
    card = page.locator(".cg-presets .card.new")
    card.wait_for()
    assert "Away from <b>blades</b>" in card.inner_text() and "along sharp.safetensors" in card.inner_text()
    assert 'Brings along the direction sharp.safetensors, "sharp things"' in card.inner_text()
    assert kept(browser.host) == before, "nothing is stored before the user says so"
    browser.picture("preset-with-a-file")
    card.get_by_role("button", name="Keep").click()
    card.wait_for(state="detached")
    (new,) = set(kept(browser.host)) - set(before)
    assert read(new.read_bytes()) == read(PACKED)
    mine = page.locator(".cg-presets .card", has_text="Away from <b>blades</b>").first
    with page.expect_download() as download:
        mine.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename == "away-from-b-blades-b.safetensors"
    assert Path(download.value.path()).read_bytes() == PACKED
    mine.get_by_role("button", name="Insert").click()
    prompt = browser.js("async () => (await app.graphToPrompt()).output")
    (node,) = [each for each in prompt.values() if each["class_type"] == "ConceptGuardApplyPreset"]
    assert read(node["inputs"]["preset"]) == read(PACKED)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (PACKED[:-4] + struct.pack("<f", 2.0), "other contents than its sha256 says"),
        (b"PK\x03\x04" + bytes(60), "not a JSON object"),
        (DATA, "no preset"),
    ],
    ids=["hash", "zip", "direction"],
)
def test_hostile_files_are_refused(pages: list[Browser], data: bytes, complaint: str) -> None:
    before = kept(pages[0].host)
    drop(pages[0], ".cg-presets", "x.safetensors", data)
    card = pages[0].page.locator(".cg-presets .card.new")
    card.get_by_text(complaint).wait_for()
    assert card.get_by_role("button", name="Keep").count() == 0
    card.get_by_role("button", name="Close").click()
    assert kept(pages[0].host) == before


def test_two_browsers_saving_at_once_lose_nothing(pages: list[Browser]) -> None:
    before = kept(pages[0].host)
    keep = """async ([name, n]) => { const store = await import('/extensions/ConceptGuard/preset_store.mjs');
        await Promise.all(Array.from({ length: n }, (_, i) => store.keep(JSON.stringify({ by: name, i }), 'same'))) }"""
    for browser, name in zip(pages, "ab", strict=True):
        browser.js(f"args => {{ window.done = ({keep})(args) }}", [name, 10])  # both under way before either is awaited
    for browser in pages:
        browser.js("() => window.done")
    new = sorted(set(kept(pages[0].host)) - set(before))
    assert sorted((each["by"], each["i"]) for each in (json.loads(path.read_text()) for path in new)) == [
        (name, i) for name in "ab" for i in range(10)
    ]
    for path in new:
        path.unlink()


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_becomes_a_prompt(pages: list[Browser], path: Path) -> None:
    browser = pages[0]
    browser.load(json.loads(path.read_text(encoding="utf-8")))
    prompt = browser.js(
        """async () => { const node = app.graph._nodes[0], demo = LiteGraph.createNode('ConceptGuardLoadDemo');
            app.graph.add(demo);
            for (const [slot, name] of ['model', 'clip', 'vae'].entries())
                demo.connect(slot, node, node.inputs.findIndex(each => each.name === name));
            const erase = node.widgets.find(each => each.name === 'erase');
            erase.value = 'a sword'; erase.callback?.('a sword');
            return (await app.graphToPrompt()).output; }"""
    )
    nodes = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"][0]["nodes"]
    assert sorted(each["class_type"] for each in prompt.values()) == sorted(
        [node["type"] for node in nodes] + ["ConceptGuardLoadDemo"]
    )
    (concept,) = [each for each in prompt.values() if each["class_type"] == "ConceptGuardConcept"]
    assert concept["inputs"]["text"] == "a sword"
    names = [widget["name"] for widget in browser.js("() => app.graph._nodes[0].widgets.map(({ name }) => ({ name }))")]
    assert "strength" in " ".join(names)
    browser.look_at("app.graph._nodes[0]")
    browser.picture(f"blueprint-{path.stem.lower().replace(' ', '-')}")


def test_no_script_of_the_pages_failed(pages: list[Browser]) -> None:
    assert [browser.errors for browser in pages] == [[], []]
