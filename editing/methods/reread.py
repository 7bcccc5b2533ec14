"""A prompt read anew: what says a concept in it is read as what is to be drawn in the concept's place.

What a concept's own prompt holds is not what it is within other words: less "a bomb", "a bomb in the style of noto" is
no picture of anything. So where the prompt's tokens say the concept (said.py) they are read as other ones. What erases
from weights (Gandikota et al., WACV 2024; weights/closed_form.py) does that by one linear map for all prompts; here it
is looked up, token by token, which leaves what stands beside the concept as it is, and every other prompt:

    w_j  = softmax over the rows x_i of T and P, and NONE, of cos(M (v_j - v0), M (x_i - v0)) / TAU
    k'_j = k_j + sum_i w_ji (G_k,i - T_k,i),   v'_j = v_j + sum_i w_ji (G_v,i - T_v,i),   i of T

T [n, C]: rows of prompts that say the concept, as one attention's values; G: the rows at the same places of the same
prompts with the other words; P: what is read as before, ordinary prompts, whose mean is v0, and kept ones. M leaves out
what ordinary prompts vary in, as in said.py; a token that is like no row, or of zeros, stays. In a joint attention,
whose text changes from block to block, the encodings themselves are read anew, before the first: k = v = x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.encode import rows_of
from ..edits.spec import Concept
from .said import Common

TAU, NONE = 0.07, 0.5  # of cosines; that of a token like no row


@dataclass(frozen=True)
class Ordinary:
    """What ordinary prompts are in one attention. v0: [C]; x: M (x_i - v0), of length 1, [m, C],
    in the model's dtype."""

    v0: Tensor
    common: Common
    x: Tensor

    @classmethod
    def of(cls, v: Tensor) -> Ordinary:
        """v: their rows' values, [m, C]."""
        v0 = v.float().mean(0)
        plain = cls(v0, Common.of(v.float() - v0), v)
        return replace(plain, x=plain.turned(v).to(v.dtype))

    def turned(self, v: Tensor) -> Tensor:
        """M (v - v0), of length 1, fp32 [.., C]."""
        return F.normalize(self.common.left_out(v.float() - self.v0), dim=-1)


@dataclass(frozen=True)
class Reading:
    """Of a concept in one attention, in the model's dtype. x: as ordinary prompts', of T and of what is kept, at least
    [n, C]; k, v: G - T as keys and as values, [n, C]."""

    x: Tensor
    k: Tensor
    v: Tensor
    plain: Ordinary

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the keys and values of tokens whose values are v: [R, L, C] each, in fp32."""
        own = self.plain.turned(v)
        like = [own @ x.float().T for x in (self.x, self.plain.x)]
        w = (torch.cat([*like, torch.full_like(like[0][..., :1], NONE)], -1) / TAU).softmax(-1)[..., : len(self.v)]
        w = w * v.any(-1, keepdim=True)
        return w @ self.k.float(), w @ self.v.float()


def reading(
    concept: Concept,
    keys: Callable[[Tensor], Tensor],
    values: Callable[[Tensor], Tensor | None],
    plain: dict[str, Ordinary],
) -> Reading | None:
    """Of a concept; None for one whose phrases bring no such prompts, or where values cannot be told.

    keys, values: rows of text encodings [n, W] to [n, C]; plain: what is known of ordinary prompts there, and is added.
    """
    pairs = [phrase.becomes for phrase in concept.phrases if phrase.becomes is not None]
    if not pairs:
        return None
    T, G = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    kept = [rows_of(each.tokens, each.own)[1:] for each in concept.keep]
    v = values(torch.cat([T, *kept, G]))
    if v is None:
        return None
    if concept.ordinary_key not in plain:
        ordinary = values(torch.cat(concept.ordinary))
        assert ordinary is not None
        plain[concept.ordinary_key] = Ordinary.of(ordinary)
    own = plain[concept.ordinary_key]
    Tv, Gv = v[: len(T)].float(), v[-len(G) :].float()
    Tk, Gk = keys(torch.cat([T, G])).float().split(len(T))
    x, k, more = (each.to(v.dtype) for each in (own.turned(v[: -len(G)]), Gk - Tk, Gv - Tv))
    return Reading(x, k, more, own)
