"""Whether a prompt's own tokens say a concept: evidence that no further words dilute.

The test of a token's value against the concept's (AdaVD, CVPR 2025: delta = c / (1 + exp(-a (cos(v_j, v~) - b)))), with
both the value and the threshold found from examples, in each attention apart; our reading, the paper has one b for all:

    v0      = mean of the ordinary prompts' values,             t_r = v(row r of the phrase) - v0
    high_r  = min over prompts that say it of max_j cos(v_j - v0, t_r)
    low_r   = max over ordinary prompts of the same,            r* = argmax_r (high_r - low_r)
    said    = (max_j cos(v_j - v0, t_r*) - low) / (high - low), from 0 to 1

over the tokens j of a prompt. Where high <= low the attention cannot tell the concept, and says 0. What a position
finds (cre.py's floor) is a mean over the prompt, which other words turn away; the greatest of the tokens is not.

In a joint attention values are the picture's as well: there the encodings themselves are asked, v(x) = x. Some tell a
concept well, some not at all: where high - low is less than MARGIN, a word that is not found says nothing, and raises
no floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.encode import rows_of
from ..edits.spec import Concept, Phrase

# A floor where the tokens do not say the concept, and where they do, as shares of it: a position is edited on less
# evidence of its own where the prompt asks for the concept, and spares its neighbours better where it does not.
UNSAID, SAID = 1.7, 0.4
# What says neither: a concept without examples keeps its floor.
UNKNOWN = (UNSAID - 1) / (UNSAID - SAID)
MARGIN = 0.1  # of cosines of encodings


@dataclass(frozen=True)
class Said:
    """The test for K phrases in one attention. v0: [C]; t: [K, C] of length 1; low, high: [K]; margin: what lies
    between these at least, or nothing says less than UNKNOWN."""

    v0: Tensor
    t: Tensor
    low: Tensor
    high: Tensor
    margin: float | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """How surely each row's tokens say each phrase. v: [R, L, C]; returns [K, R, 1] in fp32."""
        cosines = F.normalize(v.float() - self.v0, dim=-1) @ self.t.T  # [R, L, K]
        share = (cosines.amax(1) - self.low) / (self.high - self.low).clamp_min(1e-6)
        said = torch.where(self.high > self.low, share, 0.0).clamp(0, 1)
        if self.margin is not None:
            said = torch.where(self.high - self.low < self.margin, said.clamp_min(UNKNOWN), said)
        return said.T[..., None]


def said_test(concept: Concept, values: Callable[[Tensor], Tensor | None], margin: float | None = None) -> Said | None:
    """The test of a concept's phrases; None for one that brings no examples, or where values cannot be told.

    values: rows of text encodings [n, W] to [n, C]; margin: as a Said's.
    """
    if not concept.ordinary or not all(phrase.like for phrase in concept.phrases):
        return None
    sizes = [[len(rows) for rows in rows_of_all(phrase)] for phrase in concept.phrases]
    every = [*concept.ordinary, *(rows for phrase in concept.phrases for rows in rows_of_all(phrase))]
    v = values(torch.cat(every))
    if v is None:
        return None
    ordinary, *phrases = v.float().split([sum(map(len, concept.ordinary)), *map(sum, sizes)])
    v0 = ordinary.mean(0)
    others = (ordinary - v0).split([len(rows) for rows in concept.ordinary])
    found = [tell(*(x - v0).split(n), others=others) for x, n in zip(phrases, sizes, strict=True)]
    t, low, high, _ = (torch.stack(each) for each in zip(*found, strict=True))
    return Said(v0, t, low, high, margin)


def rows_of_all(phrase: Phrase) -> list[Tensor]:
    """The phrase's rows but the first, for every prompt starts alike, and those of the prompts that say the same."""
    return [rows_of(phrase.tokens, phrase.own)[1:], *phrase.like]


def tell(own: Tensor, *like: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t_r*, low and high of one phrase, and r*, from values less v0: its own [r, C], those of each prompt [n, C]."""
    t = F.normalize(own, dim=-1)

    def most(v: Tensor) -> Tensor:
        return (F.normalize(v, dim=-1) @ t.T).amax(0)  # [r]

    high, low = torch.stack([most(v) for v in like]).amin(0), torch.stack([most(v) for v in others]).amax(0)
    best = (high - low).argmax()
    return t[best], low[best], high[best], best


def floors(floor: float, said: Tensor | None) -> Tensor | float:
    """The floor of each phrase and row: as it is where nothing is known of the tokens. said: [K, R, 1]; returns the
    same shape with two more dimensions of 1, for heads and their width."""
    if said is None or floor == 0:
        return floor
    return (floor * torch.lerp(torch.full_like(said, UNSAID), torch.full_like(said, SAID), said))[..., None, None]
