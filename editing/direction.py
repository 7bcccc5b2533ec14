"""The safe-region direction: a learned vector added to the text encoding (arXiv 2505.15427; c' = c + beta d)."""

from __future__ import annotations

from torch import Tensor


def shift(c: Tensor, d: Tensor, beta: Tensor) -> Tensor:
    """c + beta d. c: [R, L, W]; d: [T, W]; beta: [R]; returns [R, L, W] in c's dtype.

    A context longer than the direction is the encoding of several pieces of prompt, or a repetition of one: each piece
    gets the same shift.
    """
    T, L = d.shape[0], c.shape[1]
    if T > 1:
        d = d.repeat(-(-L // T), 1)[:L]
    return (c.float() + beta[:, None, None] * d.float()).to(c.dtype)
