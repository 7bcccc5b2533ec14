"""Every eraser of the table `peers` on the same prompts and noise: docs/erasers.jpg (`make bench ARGS=--sheet`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..tools.environment import ROOT
from .peers import METHODS, SEED, Pictures, in_style, phrasings, ready

FILE = ROOT / "docs" / "erasers.jpg"
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


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    captions = [f"without the {THING}: {text}" for text in OF_THING] + [f"without {STYLE}: {text}" for text in OF_STYLE]
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


def draw() -> None:
    rows = []
    for method in METHODS:
        print(method, flush=True)
        rows.append((method, row(method)))
    sheet(rows).save(FILE, quality=86)
