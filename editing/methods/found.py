"""What an attention's queries find, as the methods' formulas have it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """What the same queries find in prompts that must survive, [M, ..., H, d], and for which concept: of, [K, M]."""

    found: Tensor
    of: Tensor


@dataclass
class Weight:
    """Of texts beside the picture in one attention: a text weighs Z = sum_j exp(q k_j / sqrt d) there.

    more: log Z of what remains less log Z of each phrase, [K, ..., H, 1]; gained: by the prompt's log Z, [..., H, 1],
    once a method has said what it takes away.
    """

    more: Tensor
    gained: Tensor | None = None

    def taken(self, c: Tensor) -> None:
        """c: how much of each phrase, [K, ..., H or 1, 1]. Whoever takes all of one, or more, takes its weight once."""
        self.gained = (c.clamp(0, 1) * self.more).sum(0)


@dataclass(frozen=True)
class Found:
    """Of R rows and N positions: A in the prompt, [R, N, H, d], and what the same queries find elsewhere.

    At: in each phrase, [K, R, N, H, d]; A0: in the baseline, [R, N, H, d]; Ar: in what is to be drawn in each phrase's
    place, [K, R, N, H, d]; kept: in the neighbours. said: how surely the prompt's own tokens say each phrase, 0 to 1,
    [K, R, 1] (said.py); weight: where text and picture share the attention; peak: the most that the method finds of
    each phrase at any of the picture's positions, of which these may be a part; lost: A of the prompt alone, less what
    the queries find in it read anew (reread.py), [R, N, H, d]; reread: how surely it says each phrase that is, [K, R,
    1]. What is None is not there.
    """

    A: Tensor
    At: Tensor
    A0: Tensor | None = None
    Ar: Tensor | None = None
    kept: Kept | None = None
    said: Tensor | None = None
    weight: Weight | None = None
    peak: Tensor | None = None
    lost: Tensor | None = None
    reread: Tensor | None = None
