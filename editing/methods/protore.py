"""ProtoRe: the negative features that a concept's prototype finds are removed from the attention (NeurIPS 2023).

The paper's formulas were not found. INF: its abstract has a prototype of the concept from CLIP's encodings, the same
queries' features of it, A_neg = softmax(Q K_neg^T / sqrt d) V_neg, and these "retrieved and removed" from A; the CRE
paper compares itself with it as with its own kind. So this is CRE's projection (cre.py) with one prototype, the mean of
the encodings of all phrasings, in the place of one steering vector a phrasing; `options` are CRE's readings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..edits.method import Method, register
from ..edits.spec import Concept, EditSpec, Phrase
from ..presets.parts import ConceptEdit
from ..presets.texts import Percent
from .cre import DEFAULTS as CRE
from .cre import CREOptions, neutral_needed, projection
from .found import Found
from .tokens import TokenSets, solved_together

DEFAULTS = replace(CRE, evidence="position")


def options_of(baseline: str, floor: float) -> CREOptions:
    return replace(DEFAULTS, baseline=baseline, floor=floor)


def prototype(concept: Concept) -> Concept:
    """The concept with one phrase, the mean of its phrases' encodings. Raises ValueError for several lengths."""
    if len({phrase.tokens.shape for phrase in concept.phrases}) > 1:
        raise ValueError(f'concept "{concept.name}" mixes phrases of several lengths; keep each under 75 tokens')
    mean = torch.cat([phrase.tokens for phrase in concept.phrases]).mean(0, keepdim=True)
    last = max(concept.phrases, key=lambda phrase: phrase.own[-1])
    return replace(concept, phrases=(Phrase(concept.name, mean, last.own),))


class ProtoReEdit(ConceptEdit):
    method: Literal["ProtoRe"]
    baseline: Literal["none", "neutral"] = "neutral"
    floor: Percent = DEFAULTS.floor


class ProtoRe(Method):
    name, label, order = "prototype", "ProtoRe", 45
    source, options, document = Concept, CREOptions, ProtoReEdit

    def complaint(self, spec: EditSpec) -> str | None:
        try:
            prototype(spec.source)
        except ValueError as error:
            return str(error)
        return None

    def admit(self, spec: EditSpec, backbone: Any) -> None:
        neutral_needed(spec, 'baseline to "none"')

    def token_sets(self, edits: Sequence[tuple[int, EditSpec]], device: torch.device) -> TokenSets:
        means = [(i, replace(spec, source=prototype(spec.source))) for i, spec in edits]
        return TokenSets(solved=solved_together(self, means, device))

    def taken(self, found: Found, s: Tensor, options: Any, note: Any = None) -> Tensor:
        return projection(found, s, options, note)

    def to_document(self, spec: EditSpec, saver: Any, common: dict[str, Any]) -> ProtoReEdit:
        concept, options = saver.concept(spec.source), spec.options
        if options != options_of(options.baseline, options.floor):
            raise ValueError(f"the edit of {spec.node} has options that no node gives it")
        numbers = dict(baseline=options.baseline, floor=options.floor)
        return ProtoReEdit(method="ProtoRe", concept=concept, blocks=spec.blocks, **common, **numbers)

    def from_document(self, edit: ProtoReEdit, maker: Any) -> dict[str, Any]:
        return dict(source=maker.concept(edit.concept), options=options_of(edit.baseline, edit.floor))

    def described(self, edit: ProtoReEdit) -> str:
        verb = "Erases" if edit.strength else "Leaves"
        return f"{verb} the prototype of {edit.concept.said()} (ProtoRe, strength {edit.strength:g})"


METHOD = register(ProtoRe())
