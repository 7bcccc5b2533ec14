"""Small plots as pictures, without a plotting package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

INK, FAINT, SHADE = (40, 40, 40), (205, 205, 205), (214, 232, 250)
COLOURS = ((31, 98, 175), (200, 86, 20), (44, 130, 60), (130, 70, 160))


@dataclass(frozen=True)
class Series:
    """Points (x, y) joined by a line, with or without a dot at each."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = True


@dataclass(frozen=True)
class Axes:
    """Where numbers lie on the picture: data from (x0, y0) to (x1, y1) on the box left, top, right, bottom."""

    x: tuple[float, float]
    y: tuple[float, float]
    box: tuple[int, int, int, int]

    def at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        share = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1), (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return left + share[0] * (right - left), bottom - share[1] * (bottom - top)


def plot(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    x: tuple[float, float],
    y: tuple[float, float] = (0.0, 1.0),
    shade: tuple[float, float] | None = None,
    size: tuple[int, int] = (640, 400),
) -> Tensor:
    """An IMAGE [1, h, w, 3] in [0, 1]; `shade` colours a span of x behind the lines."""
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    axes = Axes(x, y, (60, 40, size[0] - 20, size[1] - 50))
    if shade:
        draw.rectangle((*axes.at(shade[0], y[1]), *axes.at(shade[1], y[0])), fill=SHADE)
    grid(draw, axes)
    draw.text((60, 8), title, fill=INK, font_size=15)
    draw.text((size[0] // 2, size[1] - 20), x_label, fill=INK, font_size=13, anchor="mm")
    draw.text((60, 28), y_label, fill=INK, font_size=11)
    for i, each in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        places = [axes.at(*point) for point in each.points]
        if len(places) > 1:
            draw.line(places, fill=colour, width=2)
        for u, v in places if each.dots else ():
            draw.ellipse((u - 3, v - 3, u + 3, v + 3), fill=colour)
        draw.text((size[0] - 24, 44 + 16 * i), each.name, fill=colour, font_size=12, anchor="ra")
    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255


def grid(draw: ImageDraw.ImageDraw, axes: Axes) -> None:
    for i in range(6):
        across, up = (low + (high - low) * i / 5 for low, high in (axes.x, axes.y))
        (u, bottom), (left, v) = axes.at(across, axes.y[0]), axes.at(axes.x[0], up)
        draw.line((u, bottom, u, axes.box[1]), fill=FAINT)
        draw.line((left, v, axes.box[2], v), fill=FAINT)
        draw.text((u, bottom + 12), f"{across:g}"[:5], fill=INK, font_size=11, anchor="mm")
        draw.text((left - 8, v), f"{up:g}"[:5], fill=INK, font_size=11, anchor="rm")


def curve(values: Sequence[float], title: str, smooth: float = 0.9) -> Tensor:
    """An IMAGE [1, h, w, 3] of a noisy value at steps 1, 2, .. and of its running mean."""
    steps, top = range(1, len(values) + 1), max(values, default=1.0) or 1.0
    both = {"each step": values, "running mean": running_mean(values, smooth)}
    series = [Series(name, list(zip(steps, line, strict=True)), dots=False) for name, line in both.items()]
    return plot(series, title, "step", "loss", (1, max(len(values), 2)), (0.0, top), size=(640, 360))


def running_mean(values: Sequence[float], keep: float) -> list[float]:
    """Exponential, and right from the first value on."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out
