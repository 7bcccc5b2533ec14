"""What an attention's queries find, as the methods' formulas have it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """What the same queries find in prompts that must survive, [M, ..., H, d], and for which concept: of, [K, M]."""

    found: Tensor
    of: Tensor


@dataclass(frozen=True)
class Found:
    """Of R rows and N positions: A in the prompt, [R, N, H, d], and what the same queries find elsewhere.

    At: in each phrase, [K, R, N, H, d]; A0: in the baseline, [R, N, H, d]; Ar: in what is to be drawn in each phrase's
    place, [K, R, N, H, d]; kept: in the neighbours. said: how surely the prompt's own tokens say each phrase, 0 to 1,
    [K, R, 1] (said.py). What is None is not there.
    """

    A: Tensor
    At: Tensor
    A0: Tensor | None = None
    Ar: Tensor | None = None
    kept: Kept | None = None
    said: Tensor | None = None
