"""Presets as edits, the same that the nodes make by hand, and edits as presets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .cre import CREOptions
from .eiup import EIUPOptions
from .encode import concept_from_text, lines_of
from .preset import CREEdit, Edit, EIUPEdit, Preset, Words
from .spec import Concept, EditSpec, Gate

CLOSE = 1e-2  # of an encoding's size: an encoder in half precision does not give the same numbers twice everywhere


def specs_of(
    preset: Preset, clip: Any, strength: float = 1.0, gate: Gate | None = None, node: str = ""
) -> list[EditSpec]:
    """Its edits, the concepts encoded by `clip`. strength and gate count for all of them."""
    encoded: dict[Words, Concept] = {}
    return [_spec(edit, i, clip, encoded, strength, gate or Gate(), node) for i, edit in enumerate(preset.edits, 1)]


def _spec(
    edit: Edit, i: int, clip: Any, encoded: dict[Words, Concept], strength: float, gate: Gate, node: str
) -> EditSpec:
    if not isinstance(edit, CREEdit | EIUPEdit) or not isinstance(edit.concept, Words):
        raise ValueError(
            f"preset: edit {i} needs a learned file, which presets cannot bring along yet; use the nodes that load it"
        )
    if edit.gate is not None:
        raise ValueError(
            f"preset: edit {i} asks for a gate of its own, which presets cannot make yet; take `gate` out of it and "
            "connect a gate node to the `gate` input"
        )
    if edit.concept not in encoded:
        encoded[edit.concept] = _encoded(edit.concept, clip)
    options: CREOptions | EIUPOptions
    if isinstance(edit, CREEdit):
        options = CREOptions(edit.width, edit.tokens, edit.baseline, edit.negative, edit.solve, edit.floor)
        method = "projection"
    else:
        method, options = "erasure", EIUPOptions(edit.form, edit.weights, edit.evidence)
    return EditSpec(
        method, encoded[edit.concept], strength * edit.strength, edit.start_percent, edit.end_percent, edit.blocks,
        gate, options, node,
    )  # fmt: skip


def edits_from(specs: Sequence[EditSpec], clip: Any) -> tuple[Edit, ...]:
    """What a MODEL carries, as a preset's edits. `clip` proves that the words it stores make the same concepts.

    Gates are left out: they hold decisions about the pictures of one run.
    """
    if not specs:
        raise ValueError("model carries no edits; put ConceptGuard edit nodes before this one")
    return tuple(_edit(spec, clip) for spec in sorted(specs, key=lambda spec: spec.order))


def _edit(spec: EditSpec, clip: Any) -> Edit:
    if not isinstance(spec.source, Concept):
        raise ValueError(f'the edit of {spec.node} holds the learned "{spec.source.name}", and presets hold words only')
    common: dict[str, Any] = dict(
        concept=words_of(spec.source, clip), strength=float(spec.strength),
        start_percent=float(spec.start_percent), end_percent=float(spec.end_percent), blocks=spec.blocks,
    )  # fmt: skip
    if isinstance(spec.options, CREOptions):
        return CREEdit(method="CRE", **common, **vars(spec.options))
    assert isinstance(spec.options, EIUPOptions)
    if spec.options.auto is not None:
        raise ValueError(f"the edit of {spec.node} finds its weight with a learned file; set its auto to off")
    options = {name: getattr(spec.options, name) for name in ("form", "evidence", "weights")}
    return EIUPEdit(method="EIUP", **common, **options)


def _encoded(words: Words, clip: Any) -> Concept:
    phrases, neutral, keep = map("\n".join, (words.phrases, words.neutral, words.keep))
    return concept_from_text(clip, phrases, words.name, neutral, keep)


def words_of(concept: Concept, clip: Any) -> Words:
    """The phrases of a concept, if they are what it was made of."""
    phrases, keep = (tuple(phrase.text for phrase in some) for some in (concept.phrases, concept.keep))
    try:
        words = Words(name=concept.name, phrases=phrases, neutral=tuple(lines_of(concept.neutral_text)), keep=keep)
        again = _encoded(words, clip)
    except ValueError:
        again = None
    if again is None or not alike(concept, again):
        raise ValueError(
            f'concept "{concept.name}" is not what this clip makes of its words; connect the CLIP that encoded it. '
            "A concept from a conditioning or a picture has no words and cannot be saved in a preset"
        )
    return words


def alike(a: Concept, b: Concept) -> bool:
    """Whether two concepts have the same encodings, but for rounding."""
    both = (*a.phrases, *a.keep), (*b.phrases, *b.keep)
    if len(a.keep) != len(b.keep) or [phrase.own for phrase in both[0]] != [phrase.own for phrase in both[1]]:
        return False
    pairs = [(x.tokens, y.tokens) for x, y in zip(*both, strict=True)]
    if a.baseline is not None and b.baseline is not None:
        pairs.append((a.baseline, b.baseline))
    return (a.baseline is None) == (b.baseline is None) and all(
        x.shape == y.shape and torch.linalg.vector_norm(x - y) <= CLOSE * torch.linalg.vector_norm(x) for x, y in pairs
    )
