"""Edits as a preset: what a MODEL carries, in words, numbers and learned files."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..edits.encode import lines_of
from ..edits.spec import Concept, EditSpec, Gate
from ..files import artefacts
from ..files.artefacts import Artefact
from ..gates.discriminator import Discriminator, to_artefact
from .parts import GATES, MAX_LEARNED, AnyGate, Edit, Embedded, LearnedFile, Words

CLOSE = 1e-2  # of an encoding's size: an encoder in half precision does not give the same numbers twice everywhere


class Saver:
    """Turns edits into a preset's. `clip` proves that the words it stores make the same concepts.

    Learned files travel along while there is room; a larger one must lie in the models folder, where `locate` finds it.
    files: those that travel along. notes: what stays behind, for people to read.
    """

    def __init__(self, clip: Any, locate: Callable[[Artefact], LearnedFile | None] = lambda _: None) -> None:
        self.clip, self.locate = clip, locate
        self.files: dict[str, Embedded] = {}
        self.notes: list[str] = []

    def edits(self, specs: Sequence[EditSpec]) -> tuple[Edit, ...]:
        if not specs:
            raise ValueError("model carries no edits; put ConceptGuard edit nodes before this one")
        return tuple(self.edit(spec, i) for i, spec in enumerate(sorted(specs, key=lambda spec: spec.order), 1))

    def edit(self, spec: EditSpec, i: int) -> Edit:
        if spec.gate.drawn:
            raise ValueError(
                f"the edit of {spec.node} draws directions anew with each seed, which no preset says; "
                "keep that node in the workflow"
            )
        common: dict[str, Any] = dict(
            strength=float(spec.strength),
            start_percent=float(spec.start_percent),
            end_percent=float(spec.end_percent),
            gate=self.gate(spec, i),
            rows=spec.rows,
        )
        return spec.how.to_document(spec, self, common)

    def learned(self, spec: EditSpec) -> LearnedFile:
        """The file of a learned source."""
        if spec.source.artefact is None:
            raise ValueError(f'"{spec.source.name}" of {spec.node} has no file, and a preset cannot hold it; learn it')
        return self.file(spec.source.artefact)

    def concept(self, concept: Concept) -> Words | LearnedFile:
        return words_of(concept, self.clip) if concept.artefact is None else self.file(concept.artefact)

    def gate(self, spec: EditSpec, i: int) -> AnyGate | None:
        """What a preset keeps of a gate: its rule. Where it has none to keep, a note says so."""
        rule = spec.gate.rule
        if rule is None:
            if spec.gate != Gate():
                self.notes.append(f"The gate of edit {i} stays behind: no node with a rule made it.")
            return None
        common: dict[str, Any] = dict(threshold=float(rule.threshold), soft=rule.soft)
        if isinstance(rule.judge, Discriminator):
            common["discriminator"] = self.file(to_artefact(rule.judge))
        elif rule.kind != "prompt" or spec.source.key != getattr(rule.judge, "key", None):
            what = f"asks {getattr(rule.judge, 'name', type(rule.judge).__name__)}, which has no file of ours"
            if rule.kind == "prompt":
                what = "compares prompts with another concept than the edit's"
            self.notes.append(f"The gate of edit {i} stays behind: it {what}. The preset's edit is always on.")
            return None
        made: AnyGate = GATES[rule.kind](kind=rule.kind, **common, **rule.options)
        return made

    def file(self, artefact: Artefact) -> LearnedFile:
        data = artefacts.data_of(artefacts.bare(artefact))
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 not in self.files:
            used = sum(len(file.data) for file in self.files.values())
            if used + 4 * (len(data) // 3 + 1) > 4 * MAX_LEARNED // 3:
                return self.left(artefact)
            name = f"{slug(artefact.name) or artefact.kind}-{len(self.files) + 1}.safetensors"
            self.files[sha256] = Embedded(file=name, sha256=sha256, data=base64.b64encode(data).decode())
        along = self.files[sha256]
        return LearnedFile(file=along.file, sha256=along.sha256)

    def left(self, artefact: Artefact) -> LearnedFile:
        """One that is too large to travel along."""
        found = self.locate(artefact)
        if found is None:
            raise ValueError(
                f'the learned "{artefact.name}" is too large to travel along ({MAX_LEARNED // 1024} KB in all); save '
                "it into the models folder with its Save node first, and the preset will name that file"
            )
        self.notes.append(f"{found.file} is too large to travel along: share it beside the preset.")
        return found


def slug(name: str) -> str:
    """A file name that every system takes; empty if nothing of it remains."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]


def words_of(concept: Concept, clip: Any) -> Words:
    """The phrases of a concept, if they are what it was made of."""
    phrases, keep = (tuple(phrase.text for phrase in some) for some in (concept.phrases, concept.keep))
    try:
        neutral, instead = (tuple(lines_of(text)) for text in (concept.neutral_text, concept.instead_text))
        words = Words(
            name=concept.name, phrases=phrases, neutral=neutral, keep=keep, instead=instead, kind=concept.kind
        )
        again = words.encoded(clip)
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
    for x, y in ((a.baseline, b.baseline), (a.instead, b.instead)):
        if (x is None) != (y is None):
            return False
        if x is not None and y is not None:
            pairs.append((x, y))
    return all(
        x.shape == y.shape and torch.linalg.vector_norm(x - y) <= CLOSE * torch.linalg.vector_norm(x) for x, y in pairs
    )
