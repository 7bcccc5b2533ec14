"""AdaVD: the values of the prompt's own tokens lose their projection on the concept's value (CVPR 2025).

    v'_j = v_j - s delta_j (v_j . t / t . t) t,      delta_j = c / (1 + exp(-a (cos(v_j, t) - b))),      j >= 1

in each cross-attention, heads together, t being the value of the concept's last word. Several targets t_k are first
made orthogonal, in their order, each with its own delta. Values are linear in the text, so a text x_j that becomes
x_j - sum_k w_jk e_k, t_k = W_v e_k, gives the same: so it is done here, and the host's attention does the rest.

The published b was found with the unconditional half joined to v and t, which lifts all cosines: on the conditional
half alone it finds less. Mode "auto" (ours) finds t and b anew in each attention, by the test of said.py: compared with
v0, the mean over ordinary prompts, t is the row of the phrasings that tells them best from ordinary and kept prompts,
and b lies half-way between the two. It only takes away what points to the concept. An attention that cannot tell the
concept from ordinary things is left.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..edits.encode import CONTEXT, rows_of
from ..edits.method import Method, OnValues, register
from ..edits.spec import Concept, EditSpec
from ..presets.parts import ConceptEdit
from ..presets.texts import Percent
from .said import rows_of_all, tell

MODES = ("auto", "published")
TINY = 1e-12
SAME = 1e-4  # of a target's square: what is left of one that others explain is no target


@dataclass(frozen=True)
class AdaVDOptions:
    """mode: "auto" finds b; steepness: a; threshold: b, in mode "published"; factor: c, 1 removes and 2 reflects."""

    mode: str = "auto"
    steepness: float = 100.0
    threshold: float = 0.93
    factor: float = 2.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; choose one of {', '.join(MODES)}")
        if not -1 <= self.threshold <= 1:  # catches NaN as well
            raise ValueError(f"threshold is {self.threshold}; give a cosine from -1 (always) to 1 (never)")
        for name in ("steepness", "factor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} is {getattr(self, name)}; give a number of at least 0")


@dataclass(frozen=True)
class Target:
    """What is taken away in one attention. e: [W], in the text; t: [C], its value; b: the threshold; owner: the edit;
    v0: what values are compared with, [C], or 0."""

    e: Tensor
    t: Tensor
    b: float
    owner: int
    options: AdaVDOptions
    v0: Tensor


def orthogonal(t: Tensor) -> tuple[Tensor, Tensor]:
    """u = L t, each u_k less what the ones before it explain. t: [K, C]; returns u [K, C] and L [K, K]."""
    u, L = t.clone(), torch.eye(len(t), dtype=t.dtype, device=t.device)
    for k in range(1, len(t)):
        c = (u[:k] @ t[k]) / u[:k].square().sum(-1).clamp_min(TINY)
        u[k] = t[k] - c @ u[:k]
        L[k] = L[k] - c @ L[:k]
    return u, L


def weights(v: Tensor, targets: Sequence[Target], s: Tensor) -> Tensor:
    """w, such that v'_j = v_j - sum_k w_jk t_k. v: [R, L, C] fp32; s: [K, R]; returns [R, L, K]."""
    t = torch.stack([target.t for target in targets])
    u, L = orthogonal(t)
    there = u.square().sum(-1) > SAME * t.square().sum(-1)
    x = []
    for k, target in enumerate(targets):
        o, a = target.options, v - target.v0
        cos = (a @ t[k]) / (a.norm(dim=-1) * t[k].norm()).clamp_min(TINY)
        delta = o.factor * torch.sigmoid(o.steepness * (cos - target.b))
        along = (a @ u[k]) / u[k].square().sum().clamp_min(TINY)
        if o.mode == "auto":
            along = along.clamp_min(0)
        x.append(s[k][:, None] * delta * along * there[k])
    return torch.stack(x, -1) @ L


def found(concept: Concept, project: Callable[[Tensor], Tensor], device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Mode "auto": the rows e and x0 of the text and the threshold b of one attention, inf where it cannot tell the
    concept."""
    said = [[rows.to(device) for rows in rows_of_all(phrase)] for phrase in concept.phrases]
    kept = [rows_of(phrase.tokens, phrase.own)[1:] for phrase in concept.keep]
    x0 = torch.cat(concept.ordinary).mean(0).to(device)
    own = torch.cat([rows for rows, *_ in said]) - x0
    like = [project(rows - x0) for each in said for rows in each]
    others = [project(rows.to(device) - x0) for rows in (*concept.ordinary, *kept)]
    _, low, high, r = tell(project(own), *like, others=others)
    return own[r], x0, float((high + low) / 2) if high > low else math.inf


class AdaVDEdit(ConceptEdit):
    method: Literal["AdaVD"]
    mode: Literal["auto", "published"] = "auto"
    steepness: Annotated[float, Field(ge=0, le=1000)] = 100.0
    threshold: Percent = 0.93
    factor: Annotated[float, Field(ge=0, le=4)] = 2.0


class AdaVD(Method):
    name, label, order = "values", "AdaVD", 15
    source, options, document = Concept, AdaVDOptions, AdaVDEdit
    stage = "values"

    def idle(self, spec: EditSpec) -> bool:
        return spec.options.factor == 0

    def admit(self, spec: EditSpec, backbone: Any) -> None:
        if not backbone.values_apart:
            raise spec.error(
                f"the values of the text cannot be changed alone in {backbone.name}; use Erase Concept (CRE) there"
            )
        if spec.options.mode == "auto" and not spec.source.ordinary:
            raise spec.error(
                f'concept "{spec.source.name}" has no ordinary prompts to find a threshold with; give it neutral '
                'prompts, or set mode to "published"'
            )

    def on_values(
        self, edits: Sequence[tuple[int, EditSpec]], project: Callable[[Tensor], Tensor], device: torch.device
    ) -> tuple[OnValues | None, set[int]]:
        targets = [target for i, spec in edits for target in targets_of(i, spec, project, device)]
        untold = {i for i, _ in edits} - {target.owner for target in targets}
        if not targets:
            return None, untold
        e, owner = torch.stack([target.e for target in targets]), [target.owner for target in targets]

        def change(x: Tensor, s: Tensor) -> Tensor:
            w = weights(project(x).float(), targets, s[owner])
            w = w * (torch.arange(x.shape[1], device=x.device) % CONTEXT != 0)[:, None]  # no piece's start
            return (x.float() - w @ e).to(x.dtype)

        return change, untold

    def heard(self, spec: EditSpec, blocks: int, chosen: int) -> None:
        if not blocks:
            raise spec.error(
                f'none of {chosen} cross-attentions can tell "{spec.source.name}" from ordinary prompts; give it more '
                'phrasings or other neutral prompts, or set mode to "published"'
            )
        if blocks < chosen:
            logging.info(
                '%s: %d of %d cross-attentions cannot tell "%s" from ordinary prompts, and are left',
                *(spec.node, chosen - blocks, chosen, spec.source.name),
            )

    def to_document(self, spec: EditSpec, saver: Any, common: dict[str, Any]) -> AdaVDEdit:
        concept = saver.concept(spec.source)
        return AdaVDEdit(method="AdaVD", concept=concept, blocks=spec.blocks, **common, **vars(spec.options))

    def from_document(self, edit: AdaVDEdit, maker: Any) -> dict[str, Any]:
        options = AdaVDOptions(edit.mode, edit.steepness, edit.threshold, edit.factor)
        return dict(source=maker.concept(edit.concept), options=options)

    def described(self, edit: AdaVDEdit) -> str:
        verb = "Takes" if edit.strength and edit.factor else "Leaves"
        how = "" if edit.mode == "auto" else f", threshold {edit.threshold:g}"
        return f"{verb} {edit.concept.said()} out of the prompt's values (AdaVD{how}, strength {edit.strength:g})"


def targets_of(i: int, spec: EditSpec, project: Callable[[Tensor], Tensor], device: torch.device) -> list[Target]:
    """Of one edit in one attention: its best in mode "auto", or one a phrasing."""
    options, concept = spec.options, spec.source
    if options.mode == "auto":
        e, x0, b = found(concept, lambda x: project(x).float(), device)
        v0 = project(x0[None])[0].float()
        return [Target(e, project(e[None])[0].float(), b, i, options, v0)] if b < math.inf else []
    rows = [phrase.tokens[0, phrase.own[-1]].to(device) for phrase in concept.phrases]
    values = project(torch.stack(rows)).float()
    nothing = torch.zeros_like(values[0])
    return [Target(e, t, options.threshold, i, options, nothing) for e, t in zip(rows, values, strict=True)]


METHOD = register(AdaVD())
