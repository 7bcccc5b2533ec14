"""Curves as pictures, for nodes that train or measure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIZE, MARGIN = (640, 360), 40
INK, GRID, LINE, FAINT = (40, 40, 40), (225, 225, 225), (32, 96, 176), (186, 210, 236)


def curve(values: Sequence[float], title: str, smooth: float = 0.9) -> Tensor:
    """An IMAGE [1, h, w, 3] in [0, 1] of a noisy curve over 1, 2, .. and, stronger, its running mean."""
    image = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default()
    (width, height), top = SIZE, max(values, default=1.0) or 1.0
    left, right, low, high = MARGIN, width - 10, height - 24, 24

    def at(i: int, value: float) -> tuple[float, float]:
        return left + (right - left) * i / max(len(values) - 1, 1), low - (low - high) * max(value, 0.0) / top

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = low - (low - high) * share
        pen.line([(left, y), (right, y)], fill=GRID)
        pen.text((2, y - 6), f"{top * share:.3g}", fill=INK, font=font)
    pen.text((left, 6), title, fill=INK, font=font)
    pen.text((left, low + 6), "1", fill=INK, font=font)
    pen.text((right - 30, low + 6), str(len(values)), fill=INK, font=font)
    for line, colour, wide in ((list(values), FAINT, 1), (running_mean(values, smooth), LINE, 2)):
        points = [at(i, value) for i, value in enumerate(line)]
        if len(points) > 1:
            pen.line(points, fill=colour, width=wide)
    return torch.from_numpy(np.asarray(image).copy()).float()[None] / 255


def running_mean(values: Sequence[float], keep: float) -> list[float]:
    """Exponential, and right from the first value on."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out
