"""The node of AdaVD: the prompt's own values without the concept."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..editing.edits.spec import Concept, EditSpec, Gate
from ..editing.engine.host import add_edit
from ..editing.methods.adavd import MODES, AdaVDOptions
from .inputs import (
    CATEGORY,
    UNLINKED,
    blocks_input,
    check,
    choice_input,
    expect,
    folded,
    link_inputs,
    named,
    strength_input,
    where,
    window_inputs,
)
from .types import ConceptType

NODE = "ConceptGuardAdaVD"


class ConceptGuardAdaVD(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Erase Concept (AdaVD)",
            category=f"{CATEGORY}/edits",
            description="Takes the concept out of the prompt's own words: where a token's value is like the concept's, "
            "it loses that part, and no other token changes. Spares neighbours that nobody named, and costs next to "
            "nothing. May stand anywhere between the model loader and the sampler. SD1.x, SD2.x, SDXL.",
            inputs=[
                io.Model.Input("model", tooltip="The model to edit; the one that comes in stays as it is."),
                ConceptType.Input(
                    "concept",
                    tooltip="What to erase; several phrasings, a line each, let mode auto find a better threshold.",
                ),
                strength_input("How much of it is taken away: 1 as the formula says, 0 nothing (the edit is off)."),
                *window_inputs(),
                blocks_input(),
                *link_inputs(),
                choice_input(
                    "mode",
                    MODES,
                    "auto",
                    "Find the threshold in each cross-attention from the concept's phrasings and its neutral prompts "
                    "(auto), or use the published formula with the threshold below (published).",
                ),
                folded(
                    io.Float.Input(
                        "steepness",
                        default=100.0,
                        min=0.0,
                        max=1000.0,
                        step=1.0,
                        optional=True,
                        tooltip="How sharp the threshold is, the paper's a; 0 takes half the factor from each token.",
                    )
                ),
                folded(
                    io.Float.Input(
                        "threshold",
                        default=0.93,
                        min=-1.0,
                        max=1.0,
                        step=0.01,
                        optional=True,
                        tooltip="Published mode: from which cosine to the concept a token counts, the paper's b; lower "
                        "takes more, 0 from every token that points to the concept at all.",
                    )
                ),
                folded(
                    io.Float.Input(
                        "factor",
                        default=2.0,
                        min=0.0,
                        max=4.0,
                        step=0.05,
                        optional=True,
                        tooltip="How much of a token's part of the concept goes: 1 all of it, 2 reflects it, as "
                        "published, 0 nothing (the edit is off).",
                    )
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model that no longer shows the concept.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        strength: float | None = 1.0,
        start_percent: float | None = 0.0,
        end_percent: float | None = 1.0,
        blocks: str | None = "all",
        range: Any = UNLINKED,
    ) -> bool | str:
        return check(cls, strength, start_percent, end_percent, blocks, range)

    @classmethod
    def execute(
        cls,
        model: Any,
        concept: Concept,
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        blocks: str = "all",
        range: tuple[float, float] | None = None,
        gate: Gate | None = None,
        **numbers: Any,
    ) -> io.NodeOutput:
        with named(NODE):
            expect(concept, Concept)
            place = where(start_percent, end_percent, blocks, range, gate)
            options = AdaVDOptions(**numbers)
        spec = EditSpec("values", concept, strength, **place, options=options, node=NODE)
        return io.NodeOutput(add_edit(model, spec))


NODES: list[type[io.ComfyNode]] = [ConceptGuardAdaVD]
