"""The safe-region direction: a learned vector added to the text encoding (arXiv 2505.15427; c' = c + beta d)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..edits.method import Method, OnText, method, register
from ..edits.spec import Direction, Draw, EditSpec, Gate
from ..files.artefacts import Artefact
from ..presets.parts import LearnedEdit, LearnedFile


def shift(c: Tensor, d: Tensor, beta: Tensor) -> Tensor:
    """c + beta d. c: [R, L, W]; d: [T, W]; beta: [R]; returns [R, L, W] in c's dtype.

    A context longer than the direction is the encoding of several pieces of prompt, or a repetition of one: each piece
    gets the same shift.
    """
    T, L = d.shape[0], c.shape[1]
    if T > 1:
        d = d.repeat(-(-L // T), 1)[:L]
    return (c.float() + beta[:, None, None] * d.float()).to(c.dtype)


def direction_of(artefact: Artefact) -> Direction:
    """d = b a, with what its file says about it."""
    return Direction(artefact.name, artefact.tensors["b"] @ artefact.tensors["a"], artefact)


def offset(conditioning: Sequence[Any], direction: Direction, beta: float, pooled: Tensor | None = None) -> list[Any]:
    """A CONDITIONING with the direction added to every entry, and its pooled output replaced if one [1, P] is given."""
    if not math.isfinite(beta):
        raise ValueError(f"strength is {beta}; give a finite number (0 changes nothing)")
    if beta == 0:
        return list(conditioning)
    out = []
    for c, extra in conditioning:
        if c.shape[-1] != direction.width:
            raise ValueError(
                f'direction "{direction.name}" was learned for text of width {direction.width}, and conditioning has '
                f"width {c.shape[-1]}; use a direction that was learned with this model's text encoder"
            )
        moved = shift(c, direction.d.to(c.device), torch.full((len(c),), beta, device=c.device))
        changed = {} if pooled is None or extra.get("pooled_output") is None else {"pooled_output": pooled}
        out.append([moved, {**extra, **changed}])
    return out


def drawn(directions: Sequence[Direction], seed: int, gate: Gate, place: Mapping[str, Any]) -> list[EditSpec]:
    """One edit a direction, open for the images that draw it. Nodes with other directions draw on their own."""
    stream, n = f"{seed} {' '.join(sorted(direction.key for direction in directions))}", len(directions)
    draws = [Draw(gate.values, gate.inflight, Gate(gate.values), stream, i, n) for i in range(n)]
    return [EditSpec("direction", direction, **{**place, "gate": draws[i]}) for i, direction in enumerate(directions)]


class DirectionEdit(LearnedEdit):
    method: Literal["safe region"]
    direction: LearnedFile

    def learned(self) -> Iterator[tuple[LearnedFile, str]]:
        yield self.direction, "direction"
        yield from super().learned()


class SafeRegion(Method):
    name, label, order = "direction", "safe region", 10
    source, document = Direction, DirectionEdit

    def admit(self, spec: EditSpec, backbone: Any) -> None:
        learned_on = spec.source.backbone
        if learned_on and backbone.fingerprint and learned_on != backbone.fingerprint:
            logging.warning(
                '%s: "%s" was learned on another kind of model (%s) than %s (%s); look at what it does',
                spec.node,
                spec.source.name,
                learned_on,
                backbone.name,
                backbone.fingerprint,
            )

    def on_text(self, spec: EditSpec, device: torch.device) -> OnText:
        return partial(shifted, spec.source.d.to(device))

    def to_document(self, spec: EditSpec, saver: Any, common: dict[str, Any]) -> Any:
        file = saver.learned(spec)
        if spec.source.artefact.kind == "prompt":  # KPOP's additive ones are shifts
            return method("prompt").document(method="KPOP", prompt=file, **common)
        return DirectionEdit(method="safe region", direction=file, blocks=spec.blocks, **common)

    def from_document(self, edit: DirectionEdit, maker: Any) -> dict[str, Any]:
        return dict(source=direction_of(maker.artefact(edit.direction, "direction")))

    def described(self, edit: DirectionEdit) -> str:
        return f"Moves the prompt along {edit.direction.file} (safe region, strength {edit.strength:g})"


def shifted(d: Tensor, c: Tensor, beta: Tensor) -> Tensor:
    """`shift`, d [T, W] first: c [R, L, W] + beta [R] d."""
    return shift(c, d, beta)


METHOD = register(SafeRegion())
