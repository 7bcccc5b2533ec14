"""A closed-form erasure as the change of a model's projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..edits.spec import Concept, Phrase
from ..training.changes import LoRA
from .closed_form import METHODS, Change
from .rows import erased, pooled_rows, preserved


def as_it_is(rows: Tensor) -> Tensor:
    """[n, d]."""
    return rows


@dataclass(frozen=True)
class Projections:
    """A model's weights that read the text, W [D, d] by the module's path, and the pooled text, [D, P]; read: from rows
    of encodings [n, d] to what W is given of them."""

    W: Mapping[str, Tensor]
    pooled: Mapping[str, Tensor] = field(default_factory=dict)
    read: Callable[[Tensor], Tensor] = as_it_is


def erasure(concept: Concept, empty: Tensor, keep: Sequence[Phrase], method: str, of: Projections, rounds: int) -> LoRA:
    """What becomes of every projection: the concept's texts are read as the empty prompt is, [1, T, d], or as what the
    concept says to draw instead; its pooled texts, where a model is told them, as that or as those that it is compared
    with. A LoRA of the host's names, fp32. Raises ValueError for a change that is nothing.

    keep: texts that are read as before, the concept's own neighbours among them.
    """
    C, G = map(of.read, erased(concept.phrases, empty, concept.given_instead))
    P = of.read(preserved((*keep, *concept.keep), C))
    changes = [(of.W, solved(method, C, G, P, of.read(empty[0].double()), of.W, rounds))]
    told = pooled_rows(concept, keep) if of.pooled else None
    if told is not None and all(w.shape[1] == told[0].shape[1] for w in of.pooled.values()):
        changes.append((of.pooled, solved(method, *told, told[1][:1], of.pooled, rounds)))
    tensors = {name: t for W, change in changes for name, t in lora_of(change, W).items()}
    if not tensors:
        raise ValueError(
            f'concept "{concept.name}" is read like the empty prompt already, or what is preserved leaves no room; '
            "preserve less, or choose another method"
        )
    return LoRA(tensors, {"method": method, "erased": concept.name})


def solved(method: str, C: Tensor, G: Tensor, P: Tensor, empty: Tensor, W: Mapping[str, Tensor], rounds: int) -> Change:
    """By one of METHODS; empty: the rows [f, d] that SPEED leaves exactly."""
    if method == "TIME":
        return METHODS[method](C, G)
    if method == "RECE":
        S = sum((w.T @ w for w in W.values()), torch.zeros(())).double()
        return METHODS[method](C, G, P, S, rounds)
    return METHODS[method](C, G, P, empty) if method == "SPEED" else METHODS[method](C, G, P)


def lora_of(change: Change, W: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W A B for each projection; nothing, for a change that is nothing."""
    change = change.compact()
    rank = change.A.shape[1]
    A, B = change.A.float(), change.B.float()
    tensors: dict[str, Tensor] = {}
    for path, w in W.items() if rank else ():
        tensors |= {f"{path}.lora_up.weight": w @ A, f"{path}.lora_down.weight": B}
        tensors[f"{path}.alpha"] = torch.tensor(float(rank))
    return tensors
