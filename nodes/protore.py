"""The node of ProtoRe: what a concept's prototype finds is removed."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..editing.edits.spec import Concept
from ..editing.methods.cre import CHOICES, CREOptions
from ..editing.methods.protore import DEFAULTS, options_of
from .edit import EditNode
from .inputs import CATEGORY, choice_input, edit_inputs, folded, model_input, number
from .types import ConceptType


class ConceptGuardProtoRe(EditNode):
    METHOD = "prototype"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardProtoRe",
            display_name="Erase Concept (ProtoRe)",
            category=f"{CATEGORY}/edits",
            description="Removes what the concept's prototype, the mean of all its phrasings, finds in "
            "cross-attention. The paper's formulas are not public; this is our reading of it. May stand anywhere "
            "between the model loader and the sampler. SD1.x, SD2.x, SDXL.",
            inputs=[
                model_input(),
                ConceptType.Input("concept", tooltip="What to erase; its phrasings, a line each, make the prototype."),
                *edit_inputs("How much of it is removed: 1 all of it, 0 nothing (the edit is off)."),
                choice_input(
                    "baseline",
                    CHOICES["baseline"],
                    DEFAULTS.baseline,
                    "What the attention is compared with: nothing (none), or what the concept's neutral prompts find "
                    "(neutral), so that only what the concept adds is removed.",
                ),
                folded(
                    number(
                        "floor",
                        DEFAULTS.floor,
                        0.0,
                        1.0,
                        0.05,
                        "Edit only where what the prompt finds is at least this similar (cosine) to the "
                        "prototype: higher spares other things more, 1 edits almost nothing, 0 edits everywhere.",
                        optional=True,
                    )
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model that no longer shows the concept.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def options(cls, source: Concept, **readings: Any) -> CREOptions:
        return options_of(**readings)


NODES: list[type[io.ComfyNode]] = [ConceptGuardProtoRe]
