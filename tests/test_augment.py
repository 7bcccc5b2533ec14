"""Each way of spoiling a picture, on its own."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from conceptguard.editing.gates.augment import LUMA, blur, grain, light, perturbed, uniform


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def test_grain_is_noise_of_another_size_for_each_picture() -> None:
    x = torch.full((16, 3, 32, 32), 0.5)
    noise = grain(x, seeded()) - x
    spread = noise.flatten(1).std(1)
    assert spread.max() < 0.06 * 1.1 and spread.min() < 0.02 and spread.max() > 0.03
    assert noise.mean().abs() < 1e-3 and len({round(float(s), 4) for s in spread}) > 12


def test_saturation_leaves_a_grey_picture_grey_and_its_luma_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = torch.rand(8, 1, 6, 6, generator=seeded()).expand(-1, 3, -1, -1) * 0.3 + 0.3
    lit = light(grey, seeded(1))
    assert (lit[:, 0] - lit[:, 2]).abs().max() < 1e-6
    colour = torch.rand(4, 3, 6, 6, generator=seeded(2)) * 0.2 + 0.4
    factors = iter((1.5, 1.0, 1.0))  # saturation; contrast and exposure left alone
    monkeypatch.setattr(
        "conceptguard.editing.gates.augment.uniform", lambda rng, b, *_: torch.full((b, 1, 1, 1), next(factors))
    )
    more = light(colour, seeded())
    torch.testing.assert_close(luma(more), luma(colour))
    torch.testing.assert_close(more - luma(more), 1.5 * (colour - luma(colour)), atol=1e-6, rtol=1e-4)


def luma(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def test_the_luma_is_that_of_the_standard() -> None:
    assert LUMA == (0.299, 0.587, 0.114)


def test_blur_keeps_the_mean_and_takes_the_edges() -> None:
    board = torch.zeros(1, 3, 32, 32)
    board[..., ::2] = 1.0
    soft = blur(board, seeded(3))
    assert soft.std() < 0.8 * board.std() and abs(soft.mean() - board.mean()) < 0.05


def test_all_of_them_are_in_it() -> None:
    """On an even grey picture only light and grain can be seen: many levels of grey, and noise."""
    x = torch.full((6, 3, 16, 16), 0.4)
    spoiled = perturbed(x, seeded())
    levels = spoiled.mean((1, 2, 3))
    assert levels.std() > 0.02 and (spoiled - levels[:, None, None, None]).flatten(1).std(1).min() > 1e-4


def test_uniform_lies_between() -> None:
    drawn = uniform(seeded(), 500, 2.0, 3.0)
    assert drawn.shape == (500, 1, 1, 1) and 2 <= drawn.min() < 2.02 and 2.98 < drawn.max() <= 3
