"""`make pictures`: the thumbnails of the templates and the pictures of the help pages, from the pack itself.

A template is run on the demo model, and what it saves is tiled: its .jpg, and the result on the help pages of the nodes
that it is about. A node is photographed in the page (node_pictures.py).
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from ..tools.environment import ROOT
from ..tools.host import Host
from ..tools.workflow import to_api
from . import lora, node_pictures
from .run import tile

TEMPLATES = {path.stem: path for path in sorted((ROOT / "example_workflows").glob("*.json"))}
HELP = ROOT / "web" / "docs"
WIDTH = 512  # of a thumbnail
PATIENCE = 3600.0  # seconds: some templates learn

# The nodes that a template's result says most about.
ABOUT = {
    "concept-from-pictures": "ConceptGuardLearnConcept",
    "erase-a-concept": "ConceptGuardCRE",
    "fair-faces": "ConceptGuardFairDirection",
    "find-causal-period": "ConceptGuardCausalPeriod",
    "gated-preset": "ConceptGuardPresetGate",
    "gated-reference-image": "ConceptGuardImageGate",
    "implicit-prompt": "ConceptGuardEIUP",
    "in-flight-gate": "ConceptGuardInFlightGate",
    "kpop-erase": "ConceptGuardKPOP",
    "report-card": "ConceptGuardReport",
    "safety-preset": "ConceptGuardApplyPreset",
    "see-a-concept": "ConceptGuardConceptMap",
    "train-a-direction": "ConceptGuardSafeDirection",
}

# Templates for models that are not here, by the same graph that the demo model draws.
LIKE = {f"erase-a-concept-{name}": "erase-a-concept-checkpoint" for name in ("flux", "z-image", "qwen-image")}


def on_demo_model(prompt: dict[str, Any]) -> dict[str, Any]:
    """A template for a checkpoint, with the demo model in the checkpoint's place."""
    for node in prompt.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            node |= {"class_type": "ConceptGuardLoadDemo", "inputs": {}}
        elif node["class_type"] == "EmptyLatentImage":
            node["inputs"] |= {"width": 128, "height": 128}
    return prompt


def result(host: Host, name: str) -> Image.Image:
    """What a template saves: a row for each node that saves several pictures, one row of those that save one each."""
    prompt = on_demo_model(to_api(json.loads(TEMPLATES[name].read_text(encoding="utf-8")), host.get("/object_info")))
    saved = host.images(host.run(prompt, PATIENCE))
    rows = [
        [Image.open(io.BytesIO(png)).convert("RGB") for png in saved[node]]
        for node in sorted(saved, key=int)
        if prompt[node]["class_type"] == "SaveImage"
    ]
    single = [picture for row in rows if len(row) == 1 for picture in row if picture.width == picture.height]
    plots = [row for row in rows if len(row) == 1 and row[0].width != row[0].height]
    tiled = [tile([row]) for row in [single, *(row for row in rows if len(row) > 1), *plots] if row]
    return stacked([row.resize((WIDTH, row.height * WIDTH // row.width), Image.Resampling.LANCZOS) for row in tiled])


def stacked(rows: list[Image.Image]) -> Image.Image:
    out = Image.new("RGB", (WIDTH, sum(row.height for row in rows)))
    for i, row in enumerate(rows):
        out.paste(row, (0, sum(above.height for above in rows[:i])))
    return out


def keep(picture: Image.Image, path: Path, quality: int = 85) -> None:
    picture.save(path, quality=quality, method=6)
    print(f"{path.relative_to(ROOT)}: {picture.size}, {path.stat().st_size / 1024:.0f} KB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make pictures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of templates and nodes; all, if none is named")
    names = parser.parse_args().names
    with Host() as host:
        lora.write(host.base / "models" / "loras")
        for node, picture in node_pictures.taken(host, names):
            keep(picture, HELP / f"{node}.webp", quality=70)
        for name in TEMPLATES:
            if names and name not in names:
                continue
            picture = result(host, LIKE.get(name, name))
            keep(picture, TEMPLATES[name].with_suffix(".jpg"))
            if name in ABOUT:
                keep(picture, HELP / f"{ABOUT[name]}-result.webp")


if __name__ == "__main__":
    main()
