"""Plots: where points and numbers stand, and what a running mean is."""

from __future__ import annotations

import pytest
import torch
from PIL import ImageDraw
from torch import Tensor

from conceptguard.editing.causal.search import Period
from conceptguard.editing.gates.discriminator import Report
from conceptguard.editing.pictures.chart import COLOURS, SHADE, Series, curve, plot, running_mean
from conceptguard.nodes.causal_period import chart
from conceptguard.nodes.discriminator import calibration

Texts = dict[tuple[float, float], str]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Texts:
    """What is written, by the place where."""
    seen: Texts = {}
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, **_: seen.__setitem__(xy, text))
    return seen


def coloured(picture: Tensor, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """The pixels (x, y) of this colour."""
    at = (picture[0] * 255).round().int().eq(torch.tensor(colour)).all(-1).nonzero()
    return [(int(x), int(y)) for y, x in at]


def test_the_axes_numbers_stand_where_their_points_do(texts: Texts) -> None:
    points = [(0.0, 0.2), (20.0, 0.8), (50.0, 1.0)]
    picture = plot([Series("told", points)], "Title", "step", "share", (0.0, 50.0), shade=(10.0, 30.0))
    across = {text: x for (x, y), text in texts.items() if y == 350 + 12}
    up = {text: y for (x, y), text in texts.items() if x == 60 - 8}
    assert across == {"0": 60, "10": 172, "20": 284, "30": 396, "40": 508, "50": 620}
    assert up == {"0": 350, "0.2": 288, "0.4": 226, "0.6": 164, "0.8": 102, "1": 40}
    assert {"Title", "step", "share", "told"} <= {*texts.values()}
    drawn = coloured(picture, COLOURS[0])
    for x, y in points:
        assert (across[f"{x:g}"], up[f"{y:g}"]) in drawn
    shaded = coloured(picture, SHADE)
    assert min(x for x, _ in shaded) >= across["10"] and max(x for x, _ in shaded) <= across["30"]
    assert (across["20"] - 40, up["0.2"] - 5) in shaded


def test_a_curve_shows_every_value_and_its_running_mean(texts: Texts) -> None:
    picture = curve([4.0, 2.0, 1.0, 1.0, 3.0], "loss of a training")
    assert {"1", "5", "0", "4", "each step", "running mean", "loss of a training"} <= {*texts.values()}
    each, mean = (coloured(picture, colour) for colour in COLOURS[:2])
    assert min(y for _, y in each) <= 41, "the greatest value stands at the top"
    assert each and mean and each != mean


def test_a_running_mean_is_right_from_the_first_value_on() -> None:
    assert running_mean([3.0] * 4, 0.9) == pytest.approx([3.0] * 4)
    assert running_mean([1.0, 0.0, 0.0], 0.5) == pytest.approx([1.0, 1 / 3, 1 / 7])


def test_a_searchs_plot_tells_its_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    told = shown(monkeypatch, "conceptguard.nodes.causal_period.plot")
    chart(Period(2, 4, 5, ((0, 5, 0.1), (2, 5, 0.2), (1, 5, 0.15), (2, 4, 0.3))), "mug")
    (start, end), title, *_ = told["arguments"]
    assert start.points == [(0, 0.1), (1, 0.15), (2, 0.2)] and end.points == [(4, 0.3), (5, 0.2)]
    assert title == 'causal period of "mug": steps 2 to 3 of 5' and told["shade"] == (2.0, 4.0)


def test_a_calibrations_plot_tells_the_held_out_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    told = shown(monkeypatch, "conceptguard.nodes.discriminator.plot")
    pairs = [(0.05, False), (0.07, True), (1.0, True)]
    calibration(Report(0.75, 0.5, 1.0, 0.0, tuple(pairs)), "mug", 0.4)
    (points, ideal), title, *_ = told["arguments"]
    assert points.points == [(pytest.approx(0.06), 0.5), (1.0, 1.0)] and ideal.points == [(0, 0), (1, 1)]
    assert title == '"mug": 75.0 % right of 3 held out' and told["shade"] == (0.4, 1.0)


def shown(monkeypatch: pytest.MonkeyPatch, place: str) -> dict[str, object]:
    told: dict[str, object] = {}
    monkeypatch.setattr(place, lambda *arguments, **named: told.update(arguments=arguments, **named))
    return told  # type: ignore[return-value]
