"""The contact sheets in docs/ (`make bench ARGS=--sheet`): every eraser of the table `peers`, and every object of
`instead`, on the same prompts and noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..demo import world
from ..editing.edits.concept import NEUTRAL, concept_from_text
from ..tools.environment import ROOT
from .instead import OBJECTS
from .peers import METHODS, SEED, Pictures, in_style, phrasings, ready
from .sampling import demo

ERASERS, ERASURE = ROOT / "docs" / "erasers.jpg", ROOT / "docs" / "erasure.jpg"
THING, STYLE = "wine glass", "noto"
OF_THING = (
    "a wine glass",
    "a wine glass in the style of fluent on a blue background",
    "the banquet",
    "a wine glass and a cat",
    "a coffee cup",
    "a panda on a red background",
)
OF_STYLE = ("an owl in the style of noto", "an owl in the style of twemoji")
SIDE, LABEL, HEAD = 112, 150, 46  # pixels


def row(method: str) -> list[Image.Image]:
    """Without the thing, then without the style."""
    work, out = Pictures(ready("unet"), METHODS[method], SEED), list[Image.Image]()
    for text, prompts, names in ((phrasings(THING), OF_THING, [THING]), (in_style(STYLE), OF_STYLE, [STYLE])):
        out += [image(x) for x in work.drawn_of(work.without(text), prompts, names)]
    return out


def image(x: Tensor) -> Image.Image:
    """Of [3, h, w] in [0, 1]."""
    pixels = (x.movedim(0, -1).clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def sheet(captions: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    out = Image.new("RGB", (LABEL + SIDE * len(captions), HEAD + SIDE * len(rows)), "white")
    draw = ImageDraw.Draw(out)
    for i, caption in enumerate(captions):
        draw.multiline_text((LABEL + i * SIDE + 2, 2), broken(caption), fill="black", font_size=9, spacing=1)
    for j, (method, pictures) in enumerate(rows):
        draw.multiline_text((4, HEAD + j * SIDE + 44), broken(method), fill="black", font_size=12)
        for i, picture in enumerate(pictures):
            out.paste(picture, (LABEL + i * SIDE, HEAD + j * SIDE))
    return out


def broken(text: str, most: int = 23) -> str:
    """In lines of at most so many characters, between words."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def erasers() -> Image.Image:
    """A row for each method."""
    captions = [f"without the {THING}: {text}" for text in OF_THING] + [f"without {STYLE}: {text}" for text in OF_STYLE]
    rows = []
    for method in METHODS:
        print(method, flush=True)
        rows.append((method, row(method)))
    return sheet(captions, rows)


def erasure() -> Image.Image:
    """A column for each object: as it is drawn, with something else in its place, and with nothing named."""
    work, rows = demo(), dict[str, list[Image.Image]]()
    for i, (name, (instead, _)) in enumerate(OBJECTS.items()):
        prompt = f"{world.article(name)} on a {list(world.BACKGROUNDS)[i % len(world.BACKGROUNDS)]} background"
        models = {"as it is drawn": work.model}
        for label, thing in (("erased, that instead", instead), ("erased, nothing named", "")):
            models[label] = work.erase(concept_from_text(work.clip, name, name, NEUTRAL, "", thing))
        for label, model in models.items():
            rows.setdefault(label, []).append(image(work.pictures(model, [prompt], SEED)[0]))
    captions = [f"{world.article(name)}; instead: {instead}" for name, (instead, _) in OBJECTS.items()]
    return sheet(captions, list(rows.items()))


def draw() -> None:
    for file, each in ((ERASURE, erasure), (ERASERS, erasers)):
        each().save(file, quality=86)
