"""A prompt read anew: what says a concept in it is read as what is to be drawn in the concept's place.

What a concept's own prompt holds is not what it is within other words: less "a bomb", "a bomb in the style of noto" is
no picture of anything. So where the prompt's tokens say the concept (said.py) they are read as other ones, by UCE's
closed form (Gandikota et al., WACV 2024; weights/closed_form.py), here in one attention's own keys and values, which
leaves every weight and every other prompt as it is:

    k'_j = k_j + b_j (G_k - T_k),   v'_j = v_j + b_j (G_v - T_v),   b_j = v_j (lam I + T^T T + P^T P)^-1 T^T

T [n, C]: rows of prompts that say the concept, as values; G: the rows at the same places of the same prompts with the
other words; P: what is read as before, ordinary prompts and kept ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..edits.encode import rows_of
from ..edits.spec import Concept

LAM = 0.2  # of the mean square length of T's rows
TINY = 1e-12  # an attention whose values are all 0 has nothing to be read anew


@dataclass(frozen=True)
class Reading:
    """Of a concept in one attention, in the model's dtype. B: [C, n], with b_j = v_j B / m; k, v: G - T as keys and as
    values, [n, C]; m: the mean square length of T's rows, without which B is too small for fp16."""

    B: Tensor
    k: Tensor
    v: Tensor
    m: Tensor

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the keys and values of tokens whose values are v: [R, L, C] each, in fp32."""
        b = v.float() @ self.B.float() / self.m
        return b @ self.k.float(), b @ self.v.float()


def reading(
    concept: Concept, keys: Callable[[Tensor], Tensor], values: Callable[[Tensor], Tensor | None]
) -> Reading | None:
    """Of a concept; None for one whose phrases bring no such prompts, or where values cannot be told.

    keys, values: rows of text encodings [n, W] to [n, C].
    """
    pairs = [phrase.becomes for phrase in concept.phrases if phrase.becomes is not None]
    if not pairs:
        return None
    T, G = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    P = torch.cat([*concept.ordinary, *(rows_of(kept.tokens, kept.own)[1:] for kept in concept.keep)])
    v = values(torch.cat([T, G, P]))
    if v is None:
        return None
    Tv, Gv, Pv = v.float().split([len(T), len(G), len(P)])
    Tk, Gk = keys(torch.cat([T, G])).float().split(len(T))
    m = Tv.square().sum(-1).mean().clamp_min(TINY)
    B, k, v = (x.to(v.dtype) for x in (m * solved(Tv, Pv, LAM * m), Gk - Tk, Gv - Tv))
    return Reading(B, k, v, m)


def solved(T: Tensor, P: Tensor, lam: Tensor) -> Tensor:
    """(lam I + T^T T + P^T P)^-1 T^T, [C, n], from the few rows X of both: X^T (lam I + X X^T)^-1 is the same."""
    X = torch.cat([T, P])
    return X.T @ torch.linalg.inv(X @ X.T + lam * torch.eye(len(X), device=X.device))[:, : len(T)]
