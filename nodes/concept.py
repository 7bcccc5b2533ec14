"""Nodes that make a concept: what an edit removes."""

from __future__ import annotations

from comfy_api.latest import io

from ..editing.edits.concept import KINDS, NEUTRAL, apart, concept_from_conditioning, concept_from_text
from ..editing.edits.encode import lines_of
from .inputs import CATEGORY, choice_input, folded, named
from .show import told
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
                folded(
                    io.String.Input(
                        "neutral",
                        multiline=True,
                        default=NEUTRAL,
                        optional=True,
                        tooltip="Ordinary prompts, one a line. What they have in common with the concept is not "
                        "erased. Empty: only what the empty prompt has in common with it is spared.",
                    )
                ),
                io.String.Input(
                    "keep",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Neighbours that must survive, one a line, such as a spoon for a knife: CRE leaves alone "
                    "what is more like one of them than like the concept. Each line costs as much as one of the text.",
                ),
                io.String.Input(
                    "instead",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What to draw in the concept's place, such as a cup for a mug; several lines are mixed. It "
                    "keeps pictures whole. Empty: 'something', which a model fills as it likes, or what neutral "
                    "lines of your own say.",
                ),
                choice_input(
                    "kind",
                    KINDS,
                    KINDS[0],
                    "What it is. A style is found by what ordinary prompts become with it ('a cat in the style of ..', "
                    "the neutral lines), a thing by its own words. auto: a style if every line of the text says so: "
                    "'in the style of ..', 'watercolour style', 'by ..'.",
                ),
            ],
            outputs=[ConceptType.Output(display_name="concept", tooltip="The concept, encoded.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        clip: object,
        text: str,
        name: str = "",
        neutral: str = NEUTRAL,
        keep: str = "",
        instead: str = "",
        kind: str = KINDS[0],
    ) -> io.NodeOutput:
        with named("ConceptGuardConcept"):
            concept = concept_from_text(clip, text, name, neutral, keep, instead, kind)
        if concept.kind == "style":
            return told(cls, "a style: what the neutral prompts become with it", concept)
        lines = lines_of(neutral)
        if left := [line for line in lines if line not in apart(lines, lines_of(text))]:
            return told(cls, f"not compared with itself: left {', '.join(left)} out of the neutral prompts", concept)
        return io.NodeOutput(concept)


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
                    tooltip="The same text encoder's conditioning for no text at all, for edits that need the empty "
                    "prompt.",
                ),
                io.Conditioning.Input(
                    "neutral",
                    optional=True,
                    tooltip="The same text encoder's conditioning of ordinary prompts (their mean is taken): what "
                    "they have in common with the concept is not erased. Not connected: `empty` stands for it.",
                ),
                io.Conditioning.Input(
                    "keep",
                    optional=True,
                    tooltip="The same text encoder's conditioning of neighbours that must survive: CRE leaves alone "
                    "what is more like one of them than like the concept.",
                ),
                io.Conditioning.Input(
                    "instead",
                    optional=True,
                    tooltip="The same text encoder's conditioning of what to draw in the concept's place (the mean of "
                    "several). Not connected: what ordinary prompts have in common.",
                ),
            ],
            outputs=[ConceptType.Output(display_name="concept", tooltip="The concept.")],
        )

    @classmethod
    def execute(
        cls,
        conditioning: list,
        name: str = "",
        empty: list | None = None,
        neutral: list | None = None,
        keep: list | None = None,
        instead: list | None = None,
    ) -> io.NodeOutput:
        with named("ConceptGuardConceptFromConditioning"):
            return io.NodeOutput(concept_from_conditioning(conditioning, name, empty, neutral, keep, instead))


NODES: list[type[io.ComfyNode]] = [ConceptGuardConcept, ConceptGuardConceptFromConditioning]
