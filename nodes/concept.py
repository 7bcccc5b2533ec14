"""Nodes that make a concept: what an edit removes."""

from __future__ import annotations

from comfy_api.latest import io

from ..editing.encode import concept_from_conditioning, concept_from_text
from .inputs import CATEGORY, named
from .types import ConceptType

NAME_TOOLTIP = "What to call the concept in reports and errors; it changes no picture."


class ConceptGuardConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardConcept",
            display_name="Concept",
            category=f"{CATEGORY}/concepts",
            description="A concept to erase, described in words. Connect it to a ConceptGuard edit node.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model that is to be edited."),
                io.String.Input(
                    "text",
                    multiline=True,
                    tooltip="What to erase, one phrasing a line. Every line is erased, and empty lines are skipped. "
                    "Weights such as (knife:1.2) work as in a prompt; 0 takes the word out.",
                ),
                io.String.Input("name", default="", tooltip=NAME_TOOLTIP + " Empty: the first line of the text."),
            ],
            outputs=[ConceptType.Output(display_name="concept", tooltip="The concept, encoded.")],
        )

    @classmethod
    def execute(cls, clip: object, text: str, name: str = "") -> io.NodeOutput:
        with named("ConceptGuardConcept"):
            return io.NodeOutput(concept_from_text(clip, text, name))


class ConceptGuardConceptFromConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardConceptFromConditioning",
            display_name="Concept from Conditioning",
            category=f"{CATEGORY}/concepts",
            description="A concept to erase, taken from a conditioning: an example picture's tokens, a blended prompt. "
            "Every entry is one phrasing.",
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="What to erase, encoded for the model that is to be edited."
                ),
                io.String.Input("name", default="", tooltip=NAME_TOOLTIP + ' Empty: "concept".'),
                io.Conditioning.Input(
                    "empty",
                    optional=True,
                    tooltip="The same text encoder's conditioning for no text at all, for edits whose baseline is the "
                    "empty prompt.",
                ),
            ],
            outputs=[ConceptType.Output(display_name="concept", tooltip="The concept.")],
        )

    @classmethod
    def execute(cls, conditioning: list, name: str = "", empty: list | None = None) -> io.NodeOutput:
        with named("ConceptGuardConceptFromConditioning"):
            return io.NodeOutput(concept_from_conditioning(conditioning, name, empty))


NODES: list[type[io.ComfyNode]] = [ConceptGuardConcept, ConceptGuardConceptFromConditioning]
