"""Whether a prompt's own tokens say a concept: evidence that no further words dilute.

The test of a token's value against the concept's (AdaVD, CVPR 2025: delta = c / (1 + exp(-a (cos(v_j, v~) - b)))), with
both the value and the threshold found from examples, in each attention apart; our reading, the paper has one b for all:

    v0      = mean of the ordinary prompts' values,             t_r = v(row r of the phrase) - v0
    high_r  = min over prompts that say it of max_j cos(v_j - v0, t_r)
    low_r   = max over ordinary prompts of the same,            r* = argmax_r (high_r - low_r)
    share   = (max_j cos(v_j - v0, t_r*) - low) / max(high - low, NARROW)
    said    = (share - SURE_0) / (SURE_1 - SURE_0), from 0 to 1

over the tokens j of a prompt, from 0 to 1: a neighbour's word is half as like the concept. Where high <= low the
attention cannot tell the concept, and says 0; where they are close, it is trusted as little. What a position finds
(cre.py's floor) is a mean over the prompt, which other words turn away; the greatest of the tokens is not.

In a joint attention values are the picture's as well: there the encodings themselves are asked, v(x) = x. These say
much that every prompt says, its grammar and places, and a word is a small part of them. So ordinary prompts are in more
words there (Concept.further), and what they vary in counts less: of their rows' principal directions u_i, of variance
e_i, all that is beyond a small one is left out,

    v <- v - sum_i (1 - sqrt(e / (e_i + e))) <v, u_i> u_i,    e = COMMON * mean of e_i

Where high - low is less than MARGIN all the same, a word that is not found says nothing, and raises no floor.
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
# Of high - low, the least that counts; and what counts as none and all of a concept: a neighbour's word is half of it,
# and its own beside other things little less than all.
NARROW, SURE = 0.2, (0.5, 0.8)
# Of encodings: of cosines; of the ordinary prompts' mean variance.
MARGIN, COMMON = 0.1, 1e-3
# And where a whole prompt is read anew for it: least of high - low, and of the share between them. What only leads to
# the concept, a scene, has 0.65 to 0.8 of it, a neighbour's word half, the concept's own words 0.89 at least.
SPREAD, CLEAR, LEADS = 0.45, (0.82, 0.88), (0.55, 0.65)
# Beside a picture a position is like a concept in all that it draws: of the most that any position is, this share.
PEAK = 0.75


@dataclass(frozen=True)
class Common:
    """What ordinary prompts vary in: directions u, [r, C], and how much of each is left out, [r]."""

    u: Tensor
    share: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Common:
        """x: [n, C], of mean 0; from the few rows' products."""
        X = x.cpu().double()  # not every device has what follows
        e, w = torch.linalg.eigh(X @ X.T)
        e = e.clamp_min(torch.finfo(x.dtype).tiny)
        least = COMMON * e.sum() / min(x.shape)
        share = 1 - (least / (e + least)).sqrt()
        much = share > 1e-3
        return cls((w.T @ X / e.sqrt()[:, None])[much].to(x), share[much].to(x))

    def left_out(self, x: Tensor) -> Tensor:
        """x [.., C] without it."""
        return x - (x @ self.u.T * self.share) @ self.u


@dataclass(frozen=True)
class Said:
    """The test for K phrases in one attention. v0: [C]; t: [K, C] of length 1; low, high: [K]; margin: what lies
    between these at least, or nothing says less than UNKNOWN; common: what does not count."""

    v0: Tensor
    t: Tensor
    low: Tensor
    high: Tensor
    margin: float | None = None
    common: Common | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """How surely each row's tokens say each phrase. v: [R, L, C]; returns [K, R, 1] in fp32."""
        said = self.share(v, NARROW if self.margin is None else 1e-6)
        said = rising(said, SURE)
        if self.margin is not None:
            said = torch.where(self.high - self.low < self.margin, said.clamp_min(UNKNOWN), said)
        return said.T[..., None]

    def clearly(self, v: Tensor) -> Tensor:
        """How clearly, where the whole prompt is to become another one: the same, and 0 for a phrase that others are
        like, however surely it is told from the ordinary ones."""
        return rising(self.share(v, SPREAD), CLEAR).T[..., None]

    def leads(self, v: Tensor) -> Tensor:
        """How surely each row only leads to the concept, with no word for it in any phrasing: [R, 1]."""
        share = torch.where(self.high - self.low < MARGIN, 0.0, self.share(v, 1e-6)).amax(1, keepdim=True)
        return rising(share, LEADS) * (1 - rising(share, CLEAR))

    def share(self, v: Tensor, spread: float) -> Tensor:
        """Between low and high, which are at least `spread` apart: [R, K]."""
        v = v.float() - self.v0
        cosines = F.normalize(v if self.common is None else self.common.left_out(v), dim=-1) @ self.t.T  # [R, L, K]
        share = (cosines.amax(1) - self.low) / (self.high - self.low).clamp_min(spread)
        return torch.where(self.high > self.low, share, 0.0)


def rising(share: Tensor, between: tuple[float, float]) -> Tensor:
    """Shares [..] between these as numbers from 0 to 1."""
    return ((share - between[0]) / (between[1] - between[0])).clamp(0, 1)


def said_test(concept: Concept, values: Callable[[Tensor], Tensor | None], margin: float | None = None) -> Said | None:
    """The test of a concept's phrases; None for one that brings no examples, or where values cannot be told.

    values: rows of text encodings [n, W] to [n, C]; margin: as a Said's, of encodings alone.
    """
    if not concept.ordinary or not all(phrase.like for phrase in concept.phrases):
        return None
    sizes = [[len(rows) for rows in rows_of_all(phrase)] for phrase in concept.phrases]
    plain = concept.ordinary if margin is None else (*concept.ordinary, *concept.further)
    every = [*plain, *(rows for phrase in concept.phrases for rows in rows_of_all(phrase))]
    v = values(torch.cat(every))
    if v is None:
        return None
    ordinary, *phrases = v.float().split([sum(map(len, plain)), *map(sum, sizes)])
    v0 = ordinary.mean(0)
    common = None if margin is None else Common.of(ordinary - v0)

    def own(x: Tensor) -> Tensor:
        return x - v0 if common is None else common.left_out(x - v0)

    others = own(ordinary).split([len(rows) for rows in plain])
    found = [tell(*own(x).split(n), others=others) for x, n in zip(phrases, sizes, strict=True)]
    t, low, high, _ = (torch.stack(each) for each in zip(*found, strict=True))
    return Said(v0, t, low, high, margin, common)


def rows_of_all(phrase: Phrase) -> list[Tensor]:
    """The phrase's rows but the first, for every prompt starts alike, and those of the prompts that say the same."""
    own = rows_of(phrase.tokens, phrase.own) if phrase.stem is None else phrase.stem
    return [own[1:], *phrase.like]


def tell(own: Tensor, *like: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t_r*, low and high of one phrase, and r*, from values less v0: its own [r, C], those of each prompt [n, C]."""
    t = F.normalize(own, dim=-1)

    def most(v: Tensor) -> Tensor:
        return (F.normalize(v, dim=-1) @ t.T).amax(0)  # [r]

    high, low = torch.stack([most(v) for v in like]).amin(0), torch.stack([most(v) for v in others]).amax(0)
    best = (high - low).argmax()
    return t[best], low[best], high[best], best


def floors(floor: float, said: Tensor | None, peak: Tensor | None = None) -> Tensor | float:
    """The floor of each phrase and row: as it is where nothing is known of the tokens. said: [K, R, 1]; peak: the
    greatest cosine of any position, [K, R, 1, H, 1], for a floor that is no lower than PEAK of it where tokens say the
    concept; returns said's shape with two more dimensions, for heads and their width."""
    if said is None or floor == 0:
        return floor
    said = said[..., None, None]
    found = floor * torch.lerp(torch.full_like(said, UNSAID), torch.full_like(said, SAID), said)
    if peak is None:
        return found
    least = (PEAK * peak).clamp_min(SAID * floor)
    return torch.where(said > UNKNOWN, torch.lerp(floor + 0 * least, least, (said - UNKNOWN) / (1 - UNKNOWN)), found)
