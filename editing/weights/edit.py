"""A closed-form erasure as the change of a model's projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..edits.spec import Concept, Phrase
from ..training.changes import LoRA
from .closed_form import METHODS, Change
from .rows import erased, preserved


def erasure(
    concept: Concept, empty: Tensor, keep: Sequence[Phrase], method: str, W: Mapping[str, Tensor], rounds: int
) -> Change:
    """What becomes of every projection in W, [D, d] each: the concept's texts are read as the empty prompt is,
    [1, T, d], or as what the concept says to draw instead.

    keep: texts that are read as before, the concept's own neighbours among them.
    """
    C, G = erased(concept.phrases, empty, concept.given_instead)
    P = preserved((*keep, *concept.keep), C)
    if method == "TIME":
        return METHODS[method](C, G)
    if method == "RECE":
        S = sum((w.T @ w for w in W.values()), torch.zeros(())).double()
        return METHODS[method](C, G, P, S, rounds)
    if method == "SPEED":
        return METHODS[method](C, G, P, empty[0].double())
    return METHODS[method](C, G, P)


def lora_of(change: Change, W: Mapping[str, Tensor], concept: Concept, method: str) -> LoRA:
    """W A B for each projection: a LoRA of the host's names, fp32. Raises ValueError for a change that is nothing."""
    change = change.compact()
    rank = change.A.shape[1]
    if not rank:
        raise ValueError(
            f'concept "{concept.name}" is read like the empty prompt already, or what is preserved leaves no room; '
            "preserve less, or choose another method"
        )
    A, B = change.A.float(), change.B.float()
    tensors: dict[str, Tensor] = {}
    for path, w in W.items():
        tensors |= {f"{path}.lora_up.weight": w @ A, f"{path}.lora_down.weight": B}
        tensors[f"{path}.alpha"] = torch.tensor(float(rank))
    return LoRA(tensors, {"method": method, "erased": concept.name})
