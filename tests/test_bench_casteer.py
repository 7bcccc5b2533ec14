"""CASteer as the table of erasers tries it: its formula, on the half that is conditional."""

from __future__ import annotations

import torch

from conceptguard.benchmarks.casteer import BETA, Steering, conditional, pairs, place
from conceptguard.demo import world

EXTRA = {"block": ("input", 1), "block_index": 0, "sigmas": torch.tensor([2.5]), "cond_or_uncond": [1, 0]}


def test_the_conditional_half_is_reflected_where_it_points_along_the_vector() -> None:
    """c - 2 (s . c) s turns what lies along s over, leaves the rest, and what points the other way."""
    steering = Steering.__new__(Steering)
    steering.vectors = {place(EXTRA): torch.tensor([1.0, 0.0, 0.0])}
    n = torch.tensor([[[2.0, 1.0, 3.0], [-2.0, 1.0, 3.0]]]).repeat(4, 1, 1)
    out = steering(n.clone(), EXTRA)
    assert conditional(n, EXTRA) == slice(2, 4) and torch.equal(out[:2], n[:2])
    assert torch.equal(out[2:, 0], torch.tensor([[2.0 - BETA * 2.0, 1.0, 3.0]]).repeat(2, 1))
    assert torch.equal(out[2:, 1], n[2:, 1])


def test_pairs_differ_in_the_concept() -> None:
    for name in ("bomb", "noto"):
        told, untold = pairs(name)
        assert len(told) == len(untold) and all(name in caption for caption in told)
        assert not any(name in caption or world.NEIGHBOURS.get(name, "-") in caption for caption in untold)
