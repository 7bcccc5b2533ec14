"""The node of AdaVD: the prompt's own values without the concept."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..editing.edits.spec import Concept
from ..editing.methods.adavd import MODES, AdaVDOptions
from .edit import EditNode
from .inputs import CATEGORY, choice_input, edit_inputs, folded, model_input, number
from .types import ConceptType


class ConceptGuardAdaVD(EditNode):
    METHOD = "values"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardAdaVD",
            display_name="Erase Concept (AdaVD)",
            category=f"{CATEGORY}/edits",
            description="Takes the concept out of the prompt's own words: where a token's value is like the concept's, "
            "it loses that part, and no other token changes. Spares neighbours that nobody named, and costs next to "
            "nothing. May stand anywhere between the model loader and the sampler. SD1.x, SD2.x, SDXL.",
            inputs=[
                model_input(),
                ConceptType.Input(
                    "concept",
                    tooltip="What to erase; several phrasings, a line each, let mode auto find a better threshold.",
                ),
                *edit_inputs("How much of it is taken away: 1 as the formula says, 0 nothing (the edit is off)."),
                choice_input(
                    "mode",
                    MODES,
                    "auto",
                    "Find the threshold in each cross-attention from the concept's phrasings and its neutral prompts "
                    "(auto), or use the published formula with the threshold below (published).",
                ),
                folded(
                    number(
                        "steepness",
                        100.0,
                        0.0,
                        1000.0,
                        1.0,
                        "How sharp the threshold is, the paper's a; 0 takes half the factor from each token.",
                        optional=True,
                    )
                ),
                folded(
                    number(
                        "threshold",
                        0.93,
                        -1.0,
                        1.0,
                        0.01,
                        "Published mode: from which cosine to the concept a token counts, the paper's b; lower "
                        "takes more, 0 from every token that points to the concept at all.",
                        optional=True,
                    )
                ),
                folded(
                    number(
                        "factor",
                        2.0,
                        0.0,
                        4.0,
                        0.05,
                        "How much of a token's part of the concept goes: 1 all of it, 2 reflects it, as "
                        "published, 0 nothing (the edit is off).",
                        optional=True,
                    )
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model that no longer shows the concept.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def options(cls, source: Concept, **numbers: Any) -> AdaVDOptions:
        return AdaVDOptions(**numbers)


NODES: list[type[io.ComfyNode]] = [ConceptGuardAdaVD]
