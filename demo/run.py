"""`make demo`: run the example workflow headless on the demo model and judge what came out.

Writes output/demo/: unedited.png and edited.png (the workflow's own pictures), grid.png (the same edit on other
prompts), report.json (what the judge saw).
"""

from __future__ import annotations

import copy
import io
import json
import time
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..tools.environment import ROOT
from ..tools.host import Host
from ..tools.workflow import to_api
from .judge import Verdict, judge
from .load import load_judge

WORKFLOW = ROOT / "example_workflows" / "erase-a-concept.json"
OUTPUT = ROOT / "output" / "demo"
CONCEPT = "beer mug"
PROMPTS = (
    "a beer mug",
    "a beer mug and a cat on a blue background",
    "the pub",
    "a coffee cup",
    "a wine glass",
    "a panda in the style of twemoji",
)  # the first three hold the concept; the third does not say so
CAPTION = 16  # pixels above each column of the grid


def pictures(host: Host, prompt: dict[str, Any]) -> dict[str, list[Image.Image]]:
    """Run a prompt; {title of the save node: its pictures}."""
    saved = host.images(host.run(prompt))
    return {
        prompt[node]["_meta"]["title"]: [Image.open(io.BytesIO(png)).convert("RGB") for png in files]
        for node, files in saved.items()
    }


def with_prompt(prompt: dict[str, Any], text: str) -> dict[str, Any]:
    """The example with another prompt, one picture."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if node["_meta"]["title"] == "Prompt":
            node["inputs"]["text"] = text
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"]["batch_size"] = 1
    return prompt


def tile(rows: list[list[Image.Image]], captions: tuple[str, ...] = ()) -> Image.Image:
    w, h = rows[0][0].size
    top = CAPTION if captions else 0
    out = Image.new("RGB", (w * max(map(len, rows)), top + h * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            out.paste(picture, (x * w, top + y * h))
    for x, caption in enumerate(captions):
        ImageDraw.Draw(out).text((x * w + 3, 2), caption if len(caption) < 24 else caption[:21] + "...", fill="black")
    return out


def seen(images: list[Image.Image]) -> list[dict[str, Any]]:
    x = torch.stack([torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255 for image in images])

    def row(v: Verdict) -> dict[str, Any]:
        return {
            "object": v.objects[0],
            f"{CONCEPT} top-1": v.found(CONCEPT),
            f"{CONCEPT} score": round(v.scores[CONCEPT], 4),
            "style": v.style,
            "background": v.background,
        }

    return [row(v) for v in judge(load_judge(), x)]


def main() -> None:
    start = time.time()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    print("starting ComfyUI", flush=True)
    with Host() as host:
        prompt = to_api(workflow, host.get("/object_info"))
        print(f"sampling {WORKFLOW.name}: {CONCEPT!r} unedited and erased", flush=True)
        own = pictures(host, prompt)
        columns = []
        for text in PROMPTS:
            print(f"sampling {text!r}", flush=True)
            columns.append(pictures(host, with_prompt(prompt, text)))
    report: dict[str, Any] = {"workflow": WORKFLOW.name, "erased": CONCEPT, "seconds": 0.0}
    for title in ("Unedited", "Edited"):
        tile([own[title]]).save(OUTPUT / f"{title.lower()}.png")
        report[title.lower()] = seen(own[title])
    tile([[c[title][0] for c in columns] for title in ("Unedited", "Edited")], PROMPTS).save(OUTPUT / "grid.png")
    report["grid"] = [
        {"prompt": text} | {title.lower(): seen(c[title])[0] for title in ("Unedited", "Edited")}
        for text, c in zip(PROMPTS, columns, strict=True)
    ]
    report["seconds"] = round(time.time() - start, 1)
    (OUTPUT / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    before, after = (sum(r[f"{CONCEPT} top-1"] for r in report[k]) for k in ("unedited", "edited"))
    print(f"{CONCEPT}: found in {before} of {len(report['unedited'])} pictures, after erasure in {after}")
    print(f"pictures and report in {OUTPUT.relative_to(ROOT)}/ after {report['seconds']} s")


if __name__ == "__main__":
    main()
