"""What a learned concept's file is as an edit's source."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..files.artefacts import Artefact
from .spec import Concept, Phrase


def placed(c: Tensor, e: Tensor, at: Sequence[int]) -> Tensor:
    """Each row's context with e in it. c: [B, T, W]; e: [n, W]; at: B first positions."""
    rows = [torch.cat([row[:i], e, row[i + len(e) :]]) for row, i in zip(c, at, strict=True)]
    return torch.stack(rows)


def concept_of(found: Artefact) -> Concept:
    """One phrase: what it was learned beside, the captions' mean encoding, with the learned tokens in its last places.

    Compared with that same mean, what is left is what the tokens add.
    """
    e, empty = found.tensors["learned"], found.tensors["empty"][None]
    neutral = found.tensors["neutral"][None] if "neutral" in found.tensors else empty
    first = empty.shape[1] - len(e)
    if first < 2:
        raise ValueError(f'"{found.name}" has {len(e)} tokens, too many for a prompt of {empty.shape[1]}')
    phrase = Phrase(found.name, placed(neutral, e, [first]), tuple(range(first, empty.shape[1])))
    return Concept(found.name, (phrase,), empty, neutral, artefact=found)
