"""The safe-region direction: a learned vector added to the text encoding (arXiv 2505.15427; c' = c + beta d)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..edits.spec import Direction
from ..files.artefacts import Artefact


def shift(c: Tensor, d: Tensor, beta: Tensor) -> Tensor:
    """c + beta d. c: [R, L, W]; d: [T, W]; beta: [R]; returns [R, L, W] in c's dtype.

    A context longer than the direction is the encoding of several pieces of prompt, or a repetition of one: each piece
    gets the same shift.
    """
    T, L = d.shape[0], c.shape[1]
    if T > 1:
        d = d.repeat(-(-L // T), 1)[:L]
    return (c.float() + beta[:, None, None] * d.float()).to(c.dtype)


def direction_of(artefact: Artefact) -> Direction:
    """d = b a, with what its file says about it."""
    return Direction(artefact.name, artefact.tensors["b"] @ artefact.tensors["a"], artefact)


def offset(conditioning: Sequence[Any], direction: Direction, beta: float, pooled: Tensor | None = None) -> list[Any]:
    """A CONDITIONING with the direction added to every entry, and its pooled output replaced if one is given."""
    if not math.isfinite(beta):
        raise ValueError(f"strength is {beta}; give a finite number (0 changes nothing)")
    if beta == 0:
        return list(conditioning)
    out = []
    for c, extra in conditioning:
        if c.shape[-1] != direction.width:
            raise ValueError(
                f'direction "{direction.name}" was learned for text of width {direction.width}, and conditioning has '
                f"width {c.shape[-1]}; use a direction that was learned with this model's text encoder"
            )
        moved = shift(c, direction.d.to(c.device), torch.full((len(c),), beta, device=c.device))
        changed = {} if pooled is None or extra.get("pooled_output") is None else {"pooled_output": pooled}
        out.append([moved, {**extra, **changed}])
    return out
