"""The node that takes a concept out of the weights, in one step."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..editing.edits.concept import NEUTRAL
from ..editing.edits.encode import encode, encode_lines
from ..editing.edits.spec import Concept, complaint_about
from ..editing.engine import weights
from ..editing.engine.weights import PROJECTIONS, with_lora
from ..editing.weights.closed_form import METHODS
from ..editing.weights.edit import erasure
from .inputs import CATEGORY, check, choice_input, expect, folded, named, strength_input
from .types import ConceptType, LoRAType

NODE = "ConceptGuardEditWeights"


class ConceptGuardEditWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Erase from Weights",
            category=f"{CATEGORY}/edits",
            description="Changes, in one step and without training, the weights that make values (and keys) of the "
            "text, so that the concept's texts are read like the empty prompt, or like what is to be drawn instead. "
            "Costs nothing while sampling, and is saved with the model. Stands behind the LoRAs whose share of the "
            "concept is to go as well: it reads the weights with all that comes before it. SD1.x, SD2.x, SDXL; Flux, "
            "Chroma, Qwen-Image, Lumina 2, Z-Image, SD3.",
            inputs=[
                io.Model.Input("model", tooltip="The model to edit; the one that comes in stays as it is."),
                io.Clip.Input("clip", tooltip="The text encoder that the concept was made with."),
                ConceptType.Input(
                    "concept", tooltip="What to erase; several phrasings, a line each, erase it more surely."
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="UCE",
                    tooltip="The formula: UCE; RECE, which looks again for what is left; TIME, without anything "
                    "preserved; SPEED, which changes nothing at all of what is preserved, and less of the rest.",
                ),
                strength_input("How much of the change is made: 1 all of it, 0 nothing (the weights stay)."),
                io.String.Input(
                    "preserve",
                    default=NEUTRAL,
                    multiline=True,
                    tooltip="What is to be read as before, one text a line, beside what the concept keeps. Where "
                    "several concepts are erased, name many. TIME takes none.",
                ),
                choice_input(
                    "projections",
                    tuple(PROJECTIONS),
                    "keys and values",
                    "Which weights: those of the keys as well, as the papers do, or those of the values alone, a "
                    "smaller change that spares others less well on the demo model. Of a transformer, both change what "
                    "all of its text comes in by.",
                ),
                folded(
                    io.Int.Input(
                        "rounds",
                        default=1,
                        min=0,
                        max=10,
                        optional=True,
                        tooltip="RECE: how often it looks again for what is left; 0 is UCE with RECE's constants.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model whose weights no longer know the concept."),
                LoRAType.Output(display_name="weights", tooltip="The same change for Save Weights: a LoRA."),
            ],
        )

    @classmethod
    def validate_inputs(cls, strength: float | None = 1.0) -> bool | str:
        return check(cls, strength)

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        concept: Concept,
        method: str = "UCE",
        strength: float = 1.0,
        preserve: str = NEUTRAL,
        projections: str = "keys and values",
        rounds: int = 1,
    ) -> io.NodeOutput:
        with named(NODE):
            expect(concept, Concept)
            for name, value, known in (("method", method, METHODS), ("projections", projections, PROJECTIONS)):
                if value not in known:
                    raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")
            if complaint := complaint_about(strength, 0.0, 1.0, "all"):
                raise ValueError(complaint)
            changed = weights.projections(model, concept, projections, NODE)
            keep = encode_lines(clip, preserve, "preserve")
            if any(phrase.tokens.shape[-1] != concept.width for phrase in keep):
                raise ValueError("clip is another text encoder than the concept's; connect the one that made it")
            empty = encode(clip, "") if concept.empty is None else concept.empty
            lora = erasure(concept, empty, keep, method, changed, rounds)
        return io.NodeOutput(with_lora(model, lora, strength) if strength else model, lora)


NODES: list[type[io.ComfyNode]] = [ConceptGuardEditWeights]
