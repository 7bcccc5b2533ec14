"""Pictures of nodes for their help pages: each in ComfyUI's own frontend, between what it is connected to."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from PIL import Image

from ..tools.browser import ARGUMENTS, SETTINGS, chromium, settle
from ..tools.environment import ROOT, SetupError
from ..tools.host import Host

PREFIX = "ConceptGuard"
MARGIN = 12  # pixels around the chain

# What usually gives a type, and what takes it.
BEFORE = {
    "CLIP": "ConceptGuardLoadDemo",
    "CLIP_VISION": "CLIPVisionLoader",
    "CONCEPT_GUARD_CONCEPT": "ConceptGuardConcept",
    "CONCEPT_GUARD_DIRECTION": "ConceptGuardLoadDirection",
    "CONCEPT_GUARD_DISCRIMINATOR": "ConceptGuardLoadDiscriminator",
    "CONCEPT_GUARD_PROMPT": "ConceptGuardLoadPrompt",
    "CONDITIONING": "CLIPTextEncode",
    "IMAGE": "LoadImage",
    "LATENT": "EmptyLatentImage",
    "LORA_MODEL": "ConceptGuardTrainKPOP",
    "MODEL": "ConceptGuardLoadDemo",
    "VAE": "ConceptGuardLoadDemo",
}
BEHIND = {
    "CLIP": "CLIPTextEncode",
    "CONCEPT_GUARD_CONCEPT": "ConceptGuardCRE",
    "CONCEPT_GUARD_DIRECTION": "ConceptGuardSafeDirection",
    "CONCEPT_GUARD_DISCRIMINATOR": "ConceptGuardImageGate",
    "CONCEPT_GUARD_GATE": "ConceptGuardCRE",
    "CONCEPT_GUARD_PROMPT": "ConceptGuardKPOP",
    "CONDITIONING": "KSampler",
    "IMAGE": "PreviewImage",
    "LORA_MODEL": "ConceptGuardSaveWeights",
    "MODEL": "KSampler",
    "TIMESTEPS_RANGE": "ConceptGuardCRE",
    "VAE": "VAEDecode",
}

# Where that is not what the node is for: "<" a type that it takes and what gives it, ">" one that it gives.
NEIGHBOURS = {
    "ConceptGuardAccount": {"<LATENT": "KSampler", "<MODEL": "ConceptGuardCRE"},
    "ConceptGuardConceptMap": {"<LATENT": "KSampler"},
    "ConceptGuardKPOP": {"<MODEL": "LoraLoader"},
    "ConceptGuardPresetGate": {">CONCEPT_GUARD_GATE": "ConceptGuardApplyPreset"},
    "ConceptGuardSaveConcept": {"<CONCEPT_GUARD_CONCEPT": "ConceptGuardLearnConcept"},
    "ConceptGuardSaveDirection": {"<CONCEPT_GUARD_DIRECTION": "ConceptGuardTrainDirection"},
    "ConceptGuardSaveDiscriminator": {"<CONCEPT_GUARD_DISCRIMINATOR": "ConceptGuardTrainDiscriminator"},
    "ConceptGuardSavePreset": {"<MODEL": "ConceptGuardCRE"},
    "ConceptGuardSavePrompt": {"<CONCEPT_GUARD_PROMPT": "ConceptGuardTrainKPOP"},
    "ConceptGuardTrainDirection": {">CONCEPT_GUARD_DIRECTION": "ConceptGuardSaveDirection"},
    "ConceptGuardTrainDiscriminator": {">CONCEPT_GUARD_DISCRIMINATOR": "ConceptGuardSaveDiscriminator"},
    "ConceptGuardTrainKPOP": {">CONCEPT_GUARD_PROMPT": "ConceptGuardSavePrompt"},
}
OPTIONAL = {  # inputs that are connected all the same
    "ConceptGuardInFlightGate": ["vae"],
    "ConceptGuardPresetGate": ["vae", "image"],
    "ConceptGuardPromptGate": ["concept"],
    "ConceptGuardReport": ["discriminator_1"],
    "ConceptGuardTrainDiscriminator": ["concept_images", "other_images"],
}
TYPED = {
    "ConceptGuardConcept": {"text": "a kitchen knife", "keep": "a spoon"},
    "ConceptGuardReport": {"prompts": "a kitchen knife\na spoon"},
    "ConceptGuardLoadClassifier": {"classifier": "resnet18.safetensors"},
    "ConceptGuardLoadConcept": {"file": "from-pictures_00001.safetensors"},
    "ConceptGuardLoadDirection": {"file": "drinks_00001.safetensors"},
    "ConceptGuardLoadPrompt": {"file": "keys/drinks_00001.safetensors"},
    "ConceptGuardApplyPreset": {"preset": (ROOT / "presets" / "no-weapons.json").read_text(encoding="utf-8")},
}

# The node in the middle, the others as their titles; returns the box around them in graph units.
CHAIN = """([kind, needed, before, behind, typed]) => {
    app.graph.clear();
    const made = {};
    const add = (type, side) => (made[side + type] ??= (() => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        return Object.assign(node, { side });
    })());
    const node = add(kind, '');
    for (const [name, value] of Object.entries(typed)) {
        const widget = node.widgets.find(each => each.name === name);
        widget.value = value;
        widget.callback?.(value, app.canvas, node);
    }
    for (const [slot, input] of node.inputs.entries()) {
        if (input.widget || !needed.includes(input.name) || !before[input.type]) continue;
        const source = add(before[input.type], '<');
        source.connect(source.outputs.findIndex(each => each.type === input.type), node, slot);
    }
    for (const [slot, output] of node.outputs.entries()) {
        if (!behind[output.type]) continue;
        const target = add(behind[output.type], '>');
        const into = target.inputs.findIndex(each => each.type === output.type && each.link == null);
        if (into >= 0) node.connect(slot, target, into);
    }
    const [width, height] = node.computeSize();
    const told = node.widgets?.some(each => each.name === 'preset_view') ? 130 : 0; // a preset is worth its words
    node.setSize([Math.max(width, 250), height + told]);
    node.pos = [0, 0];
    const others = Object.values(made).filter(each => each !== node);
    for (const each of others) each.collapse(true);
    return others.length;
}"""
ARRANGE = """margin => {
    const [node, ...others] = app.graph._nodes;
    const wide = each => each._collapsed_width ?? each.size[0];
    for (const side of '<>') {
        const column = others.filter(each => each.side === side);
        for (const [i, each] of column.entries()) {
            const x = side === '<' ? -40 - wide(each) : node.size[0] + 40;
            each.pos = [x, (i - (column.length - 1) / 2) * 50 + Math.min(node.size[1] / 2, 90)];
        }
    }
    const ends = side => others.filter(each => each.side === side);
    const left = Math.min(0, ...ends('<').map(each => each.pos[0])) - margin;
    const right = Math.max(node.size[0], ...ends('>').map(each => each.pos[0] + wide(each))) + margin;
    const top = Math.min(-34, ...others.map(each => each.pos[1] - 34)) - margin;
    const bottom = Math.max(node.size[1], ...others.map(each => each.pos[1])) + margin;
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [420 - left, 120 - top];
    app.canvas.deselectAll?.();
    app.canvas.setDirty(true, true);
    const area = app.canvas.canvas.getBoundingClientRect();
    return { x: area.x + 420, y: area.y + 120, width: right - left, height: bottom - top };
}"""


def around(kind: str, side: str) -> dict[str, str]:
    """What stands on one side of a node, by type."""
    own = {key[1:]: node for key, node in NEIGHBOURS.get(kind, {}).items() if key[0] == side}
    return (BEFORE if side == "<" else BEHIND) | own


def taken(host: Host, names: Sequence[str] = ()) -> Iterator[tuple[str, Image.Image]]:
    """A picture of each of the pack's nodes, or of those that are named."""
    known = host.get("/object_info")
    kinds = [kind for kind in sorted(known) if kind.startswith(PREFIX) and (not names or kind in names)]
    if not kinds:
        return
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise SetupError("there is no Playwright here", "bring it with `make browser`") from None
    settle(host.base, {**SETTINGS, "Comfy.NodeBadge.NodeSourceBadgeMode": "None"})
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1600, "height": 1400})
        page.goto(host.url, wait_until="commit")
        page.wait_for_function(f"() => window.app?.graph && window.LiteGraph?.registered_node_types?.{kinds[0]}")
        for kind in kinds:
            inputs = [*known[kind]["input_order"].get("required", ()), *OPTIONAL.get(kind, ())]
            page.evaluate(CHAIN, [kind, inputs, around(kind, "<"), around(kind, ">"), TYPED.get(kind, {})])
            page.wait_for_timeout(600)  # drawn, and the words under a preset have come
            clip = page.evaluate(ARRANGE, MARGIN)
            page.wait_for_timeout(400)
            yield kind, Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
        browser.close()
