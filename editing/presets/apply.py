"""Presets as edits, the same that the nodes make by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..edits.encode import concept_from_text
from ..edits.spec import Concept, Direction, EditSpec, Gate, Prompt
from ..files.artefacts import Artefact
from ..gates.discriminator import Discriminator, from_artefact
from ..gates.features import Features
from ..gates.gates import Report, image_gate, in_flight_gate, prompt_gate
from ..methods.cre import CREOptions
from ..methods.eiup import EIUPOptions
from ..methods.safe_region import direction_of
from ..training.kpop import edit_of, prompt_of
from ..training.textual_inversion import concept_of
from .document import (
    AnyGate,
    CREEdit,
    DirectionEdit,
    Edit,
    EIUPEdit,
    ImageGate,
    InFlightGate,
    KPOPEdit,
    LearnedFile,
    Preset,
    Words,
    parsed,
)

Source = Concept | Prompt | Direction


def nowhere(file: LearnedFile, kind: str) -> Artefact:
    raise ValueError(f'"{file.file}" does not travel along; export the preset with its files')


@dataclass(frozen=True)
class Given:
    """What a preset is used with.

    find: reads a file that does not travel along; encoder: what a discriminator's file was trained with, if it is
    here; vae, image, text: what gates look with and at, None where nobody gave them.
    """

    clip: Any
    find: Callable[[LearnedFile, str], Artefact] = nowhere
    encoder: Callable[[Artefact], Features | None] = lambda _: None
    vae: Any = None
    image: Tensor | None = None
    text: str | None = None
    report: Report | None = None


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

    def spec(self, edit: Edit) -> EditSpec:
        if isinstance(edit, DirectionEdit):
            direction = direction_of(self.artefact(edit.direction, "direction"))
            return self.edited(edit, "direction", direction)
        if isinstance(edit, KPOPEdit):
            prompt = prompt_of(self.artefact(edit.prompt, "prompt"))
            return self.edited(edit, *edit_of(prompt), blocks=prompt.blocks)
        assert isinstance(edit, CREEdit | EIUPEdit)
        concept = self.concept(edit.concept)
        if isinstance(edit, EIUPEdit):
            return self.edited(edit, "erasure", concept, EIUPOptions(edit.form, edit.weights, edit.evidence))
        options = CREOptions(edit.width, edit.tokens, edit.baseline, edit.negative, edit.solve, edit.floor)
        return self.edited(edit, "projection", concept, options)

    def edited(
        self,
        edit: Edit,
        method: str,
        source: Source,
        options: CREOptions | EIUPOptions | None = None,
        blocks: str | None = None,
    ) -> EditSpec:
        gate = combined(self.gate(edit.gate, source), self.outer)
        return EditSpec(
            method,
            source,
            self.strength * edit.strength,
            edit.start_percent,
            edit.end_percent,
            edit.blocks if blocks is None else blocks,
            gate,
            options,
            self.node,
        )

    def concept(self, source: Words | LearnedFile) -> Concept:
        if source not in self.concepts:
            if isinstance(source, LearnedFile):
                self.concepts[source] = concept_of(self.artefact(source, "concept"))
            else:
                self.concepts[source] = encoded(source, self.given.clip)
        return self.concepts[source]

    def artefact(self, file: LearnedFile, kind: str) -> Artefact:
        along = self.along.get(file.sha256)
        return self.given.find(file, kind) if along is None else parsed(along, kind)

    def gate(self, rule: AnyGate | None, source: Source) -> Gate:
        if rule is None:
            return Gate()
        key = rule, source if rule.discriminator is None else None
        if key not in self.gates:
            self.gates[key] = self.made(rule, source)
        return self.gates[key]

    def made(self, rule: AnyGate, source: Source) -> Gate:
        judge = source if rule.discriminator is None else self.discriminator(rule.discriminator)
        if isinstance(rule, InFlightGate):
            vae = self.needed("vae", "a VAE", self.given.vae) if rule.decode == "vae" else None
            return in_flight_gate(
                judge, vae, rule.at_percent, rule.threshold, rule.soft, rule.restart, self.given.report
            )
        if isinstance(rule, ImageGate):
            image = self.needed("image", "a reference picture", self.given.image)
            return image_gate(judge, image, rule.threshold, rule.soft, rule.decides)[0]
        text = self.needed("text", "the prompt", self.given.text)
        return prompt_gate(judge, self.given.clip, text, rule.threshold, rule.soft)[0]

    def discriminator(self, file: LearnedFile) -> Discriminator:
        artefact = self.artefact(file, "discriminator")
        return from_artefact(artefact, self.given.encoder(artefact))

    @staticmethod
    def needed(input: str, what: str, value: Any) -> Any:
        if value is None:
            raise ValueError(
                f"its gate needs {what}; give it to a Preset Gate node (`{input}`), and connect that to `gate`"
            )
        return value


def encoded(words: Words, clip: Any) -> Concept:
    phrases, neutral, keep = map("\n".join, (words.phrases, words.neutral, words.keep))
    return concept_from_text(clip, phrases, words.name, neutral, keep)
