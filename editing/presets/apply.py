"""Presets as edits, the same that the nodes make by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..edits.method import labelled
from ..edits.spec import Concept, EditSpec, Gate
from ..files.artefacts import Artefact
from ..gates.discriminator import Discriminator, from_artefact
from ..gates.features import Features
from ..gates.gates import Report
from .document import Preset
from .parts import AnyGate, LearnedFile, Words, parsed


def nowhere(file: LearnedFile, kind: str) -> Artefact:
    raise ValueError(f'"{file.file}" does not travel along; export the preset with its files')


@dataclass(frozen=True)
class Given:
    """What a preset is used with.

    find: reads a file that does not travel along; encoder: what a discriminator's file was trained with, if it is
    here; vae, image, text: what gates look with and at, None where nobody gave them; concept: makes one of words, if
    not `clip` does.
    """

    clip: Any
    find: Callable[[LearnedFile, str], Artefact] = nowhere
    encoder: Callable[[Artefact], Features | None] = lambda _: None
    vae: Any = None
    image: Tensor | None = None
    text: str | None = None
    report: Report | None = None
    concept: Callable[[Words], Concept] | None = None


def specs_of(
    preset: Preset, given: Given, strength: float = 1.0, gate: Gate | None = None, node: str = ""
) -> list[EditSpec]:
    """Its edits. strength and gate count for all of them."""
    maker, specs = Maker(preset, given, strength, gate or Gate(), node), []
    for i, edit in enumerate(preset.edits, 1):
        try:
            specs.append(maker.spec(edit))
        except ValueError as error:
            raise ValueError(f"preset: edit {i}: {str(error).removeprefix(f'{node}: ')}") from None
    return specs


def combined(own: Gate, outer: Gate) -> Gate:
    """Open where both are. Only one of them may decide while sampling, for an edit waits for one gate."""
    if outer == Gate():
        return own  # with its rule
    if own == Gate():
        return outer
    if own.inflight and outer.inflight:
        raise ValueError("it has an in-flight gate of its own; connect another kind of gate to `gate`, or none")
    images = max(len(own.values), len(outer.values))
    values = tuple(a * b for a, b in zip(own.per_image(images), outer.per_image(images), strict=True))
    return Gate(values, own.inflight or outer.inflight)


class Maker:
    """Makes a preset's edits; what several of them share is read, encoded and asked once."""

    def __init__(self, preset: Preset, given: Given, strength: float, gate: Gate, node: str) -> None:
        self.given, self.strength, self.outer, self.node = given, strength, gate, node
        self.along = {file.sha256: file for file in preset.files}
        self.concepts: dict[Words | LearnedFile, Concept] = {}
        self.gates: dict[Any, Gate] = {}

    def spec(self, edit: Any) -> EditSpec:
        how = labelled(edit.method)
        own = {"method": how.name, "blocks": edit.blocks, **how.from_document(edit, self)}
        gate = combined(self.gate(edit.gate, own["source"]), self.outer)
        return EditSpec(
            **own,
            strength=self.strength * edit.strength,
            start_percent=edit.start_percent,
            end_percent=edit.end_percent,
            gate=gate,
            node=self.node,
            rows=edit.rows,
        )

    def concept(self, source: Words | LearnedFile) -> Concept:
        if source not in self.concepts:
            self.concepts[source] = source.concept(self)
        return self.concepts[source]

    def artefact(self, file: LearnedFile, kind: str) -> Artefact:
        along = self.along.get(file.sha256)
        return self.given.find(file, kind) if along is None else parsed(along, kind)

    def gate(self, rule: AnyGate | None, source: Any) -> Gate:
        if rule is None:
            return Gate()
        key = rule, source if rule.discriminator is None else None
        if key not in self.gates:
            judge = source if rule.discriminator is None else self.discriminator(rule.discriminator)
            self.gates[key] = rule.made(judge, self.given)
        return self.gates[key]

    def discriminator(self, file: LearnedFile) -> Discriminator:
        artefact = self.artefact(file, "discriminator")
        return from_artefact(artefact, self.given.encoder(artefact))
