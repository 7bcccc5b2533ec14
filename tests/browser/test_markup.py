"""Text of strangers in the page: names, files, errors, presets and menus that hold markup show it, and nothing runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page import PATIENCE, ROOT, Browser, kept

from conceptguard.editing.files import artefacts
from conceptguard.editing.presets import versions
from conceptguard.nodes.files import DEMO
from conceptguard.tools.host import Host

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.slow]

TAG = "<img src=x onerror=window.hit=1>"  # without a slash and quotes: a file may be called so
LINKS = "[[mugs|https:example.invalid]] [[x|javascript:window.hit=1]] __LNK9__ www.example.invalid"
MARK = f"{TAG} {LINKS}"
SHOWN = "onerror=window.hit=1"
SHIPPED = len(list((ROOT / "presets").glob("*.json")))
PRESET = json.loads((ROOT / "presets" / "no-weapons.json").read_text(encoding="utf-8"))


def discriminator(name: str) -> bytes:
    """The file of one of the demo model's, under another name inside."""
    file = next(iter(DEMO["discriminator"].values()))
    return artefacts.data_of(dataclasses.replace(artefacts.read(file, "discriminator"), name=name))


def classifier(folder: Path, labels: dict[int, str]) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, id2label=labels)
    transformers.ViTForImageClassification(config).save_pretrained(folder)


def pictures(folder: Path) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (32, 32), (200, 10 * i, 20)).save(folder / f"{i}.png")
    (folder / f"{MARK}.png").write_text("no picture")


@pytest.fixture(scope="module")
def hostile(server: Host) -> Iterator[Host]:
    """A server whose folders hold what strangers called as they liked."""
    learned = server.base / "models" / "concept_guard"
    made = [learned / "strange", learned / "classifiers", server.base / "input" / MARK]
    made[0].mkdir(parents=True)
    (made[0] / "strange.safetensors").write_bytes(discriminator(MARK))
    (made[0] / f"{TAG}.safetensors").write_bytes(discriminator("a mug"))
    classifier(made[1] / "small", {0: MARK, 1: "mug"})
    shutil.copytree(made[1] / "small", made[1] / TAG)
    pictures(made[2])
    yield server
    for folder in made:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def page(browser: Browser, hostile: Host) -> Iterator[Browser]:
    browser.open()
    browser.js("() => { delete window.hit }")
    yield browser
    browser.open()


def nothing_ran(page: Browser, links: bool = True) -> None:
    page.js("() => new Promise(done => setTimeout(done, 300))")  # a picture that cannot be fetched fails after a while
    assert page.js("() => window.hit") is None, "a script of the text ran"
    assert page.js("() => document.querySelectorAll('[onerror]').length") == 0
    hrefs = page.js("() => [...document.querySelectorAll('a')].map(a => a.getAttribute('href') ?? '')")
    assert not [href for href in hrefs if "example.invalid" in href or "javascript" in href]
    assert page.errors == []


QUEUE = """graph => { app.loadApiJson(graph, 'strange'); window.ended = null;
    const end = (type, words) => { window.ended ??= [type, words] };
    for (const type of ['execution_success', 'execution_error']) app.api.addEventListener(
        type, ({ detail }) => end(type, detail.exception_message ?? ''), { once: true });
    const queue = app.api.queuePrompt;
    app.api.queuePrompt = async (...given) => {
        app.api.queuePrompt = queue;
        try { return await queue.apply(app.api, given) }
        catch (error) { end('refused', JSON.stringify(error.response ?? String(error))); throw error }
    };
    app.queuePrompt(0, 1) }"""

# What the page has for people to read: in its elements, in what the canvas draws of a node, or in what a node's script
# is given when it has run.
SAYS = """words => document.body.innerText.includes(words)
    || Object.values(app.nodeOutputs ?? {}).some(out => (out.text ?? []).some(line => line.includes(words)))
    || app.graph._nodes.some(node =>
    (node.widgets ?? []).some(w => w.name.startsWith('$$') && String(w.value).includes(words)))"""


def run(page: Browser, graph: dict[str, Any]) -> tuple[str, str]:
    """Queue a graph on the page, so that its words and errors come back there: how it ended, and with which error."""
    page.js(QUEUE, graph)
    page.wait("() => window.ended")
    how, words = page.js("() => window.ended")
    return how, words


def says(page: Browser, words: str = SHOWN) -> None:
    page.page.wait_for_function(SAYS, arg=words, timeout=PATIENCE)


def image(color: int) -> dict[str, Any]:
    return {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 12, "color": color}}


def training(**inputs: Any) -> dict[str, Any]:
    given = {"name": MARK, "false_positive_rate": 0.01, "copies": 0, "seed": 0, "other_images": ["blue", 0], **inputs}
    return {
        "blue": image(0x1010E0),
        "train": {"class_type": "ConceptGuardTrainDiscriminator", "inputs": given},
        "see": {"class_type": "PreviewImage", "inputs": {"images": ["train", 3]}},
    }


def judged(loader: str, **inputs: Any) -> dict[str, Any]:
    gate = {"discriminator": ["load", 0], "image": ["picture", 0], "threshold": 0.5, "soft": False, "decides": "each"}
    return {
        "picture": image(0xE01010),
        "load": {"class_type": loader, "inputs": inputs},
        "gate": {"class_type": "ConceptGuardImageGate", "inputs": gate},
        "see": {"class_type": "PreviewAny", "inputs": {"source": ["gate", 2]}},
    }


def edited(kind: str, name: str = TAG, **inputs: Any) -> dict[str, Any]:
    about = {"name": name, "description": MARK, "author": MARK, "licence": TAG}
    return {
        "demo": {"class_type": "ConceptGuardLoadDemo", "inputs": {}},
        "concept": {"class_type": "ConceptGuardConcept", "inputs": {"clip": ["demo", 1], "text": "mug", "name": MARK}},
        "edit": {"class_type": kind, "inputs": {"model": ["demo", 0], "strength": 1.0, **inputs}},
        "save": {
            "class_type": "ConceptGuardSavePreset",
            "inputs": {**about, "clip": ["demo", 1], "model": ["edit", 0]},
        },
    }


WINDOW = {"concept": ["concept", 0], "start_percent": 0.0, "end_percent": 1.0, "blocks": "all"}
WORDS = {
    "the name in a discriminator's file": judged("ConceptGuardLoadDiscriminator", file="strange/strange.safetensors"),
    "the names of pictures that cannot be read": training(concept_folder=MARK),
    "the name of a preset and of its concepts": edited("ConceptGuardCRE", **WINDOW),
}
SMALL = {"classifier": "small", "labels": "0", "network": "resnet18"}
CLASSIFIER, LEARNED, PRESET_NODE = (
    "ConceptGuardLoadClassifier",
    "ConceptGuardLoadDiscriminator",
    "ConceptGuardApplyPreset",
)
ERRORS = {
    "a class that a classifier has not": judged(CLASSIFIER, **{**SMALL, "labels": TAG}),
    "a classifier that is not there": judged(CLASSIFIER, **{**SMALL, "classifier": f"no {TAG}"}),
    "a file that is not there": judged(LEARNED, file=f"strange/no {TAG}.safetensors"),
    "a folder that is not there": training(concept_folder=f"no {MARK}"),
    "blocks that there are not": edited("ConceptGuardCRE", **{**WINDOW, "blocks": MARK}),
    "a preset that is none": edited(PRESET_NODE, clip=["demo", 1], preset=MARK),
    "a preset with a strange method": edited(
        PRESET_NODE, clip=["demo", 1], preset=json.dumps({**PRESET, "edits": [{"method": MARK}]})
    ),
}


SILENT = {"a preset that is none": "not a JSON object"}


@pytest.mark.parametrize("what", WORDS)
def test_words_on_a_node(page: Browser, what: str) -> None:
    assert run(page, WORDS[what]) == ("execution_success", "")
    says(page)
    page.picture(f"markup-{what}")
    nothing_ran(page)


@pytest.mark.parametrize("what", ERRORS)
def test_errors(page: Browser, what: str) -> None:
    """SILENT: those that do not repeat what was given."""
    how, words = run(page, ERRORS[what])
    assert how in ("refused", "execution_error") and SILENT.get(what, SHOWN) in words
    nothing_ran(page)
    page.picture(f"markup-{what}")
    page.page.keyboard.press("Escape")


def test_menus_leave_out_names_with_tags(page: Browser) -> None:
    for kind, name, plain in (
        ("ConceptGuardLoadDiscriminator", "file", "strange/strange.safetensors"),
        ("ConceptGuardLoadClassifier", "classifier", "small"),
    ):
        values = page.js(
            "([kind, name]) => LiteGraph.createNode(kind).widgets.find(w => w.name === name).options.values",
            [kind, name],
        )
        assert plain in values and not [value for value in values if "<" in value]
        page.js("values => { new LiteGraph.ContextMenu(values, {}) }", values)
        nothing_ran(page)
        page.js("() => LiteGraph.closeAllContextMenus?.(window)")


def full_of_markup() -> dict[str, Any]:
    """A preset with it in every field that holds words, and in a file's name."""
    concept = {name: [MARK] for name in ("phrases", "keep", "instead")} | {"name": MARK}
    learned = {"method": "safe region", "direction": {"file": "strange.safetensors", "sha256": "0" * 64}, "why": MARK}
    measured = {"checkpoint": TAG, "sha256": "0" * 64, "left": 0.0, "left_of": 9, "kept": 1.0, "kept_of": 9}
    return {
        **PRESET,
        **{name: TAG for name in ("name", "author", "licence")},
        "schema_version": versions.newest(),
        "needs": [],
        "description": MARK,
        "edits": [{"method": "CRE", "concept": concept, "why": MARK}, learned],
        "measured": [measured],
    }


@pytest.fixture
def panel(page: Browser) -> Iterator[Any]:
    """The panel, with a file among the user's own that is no preset."""
    strange = page.host.base / f"user/default/concept_guard/presets/{TAG}.json"
    strange.parent.mkdir(parents=True, exist_ok=True)
    strange.write_text(json.dumps({MARK: MARK}), encoding="utf-8")
    page.open()  # free of the errors' dialogs
    if not page.page.locator(".cg-presets").count():
        page.js("() => app.extensionManager.sidebarTab.toggleSidebarTab('ConceptGuard')")
    page.wait(f"() => document.querySelectorAll('.cg-presets details').length >= {SHIPPED}")
    yield page.page.locator(".cg-presets")
    for file in {strange, *kept(page.host)}:
        file.unlink(missing_ok=True)


def test_the_panel(page: Browser, panel: Any) -> None:
    """Errors, each field of a preset, those that are kept, and the node that holds one."""
    panel.locator("summary").get_by_text("onerror").first.wait_for()  # the strange file
    card = panel.locator(".card.new")
    paste = page.page.get_by_placeholder("Paste a preset's text here")
    for text in (json.dumps({**PRESET, MARK: MARK}), MARK, json.dumps(full_of_markup())):
        paste.fill(text)
        card.get_by_text("onerror" if text != MARK else "not a JSON object").first.wait_for()
        nothing_ran(page)
    page.picture("markup-panel")
    told = card.inner_text()
    fields = ("name", "description", "author", "licence", "why", "phrases", "keep", "instead", "measured")
    assert told.count(SHOWN) >= len(fields) and "strange.safetensors" in told
    card.get_by_role("button", name="Keep").click()
    mine = panel.locator(".card", has_text=TAG).filter(has=page.page.get_by_role("button", name="Insert"))
    mine.first.get_by_role("button", name="Rename").click()
    page.page.get_by_label("New name").wait_for()
    nothing_ran(page)
    page.page.get_by_label("New name").press("Escape")
    page.js("() => app.graph.clear()")
    mine.first.get_by_role("button", name="Insert").click()
    page.page.locator(".cg-does").get_by_text("onerror").first.wait_for()
    nothing_ran(page)
