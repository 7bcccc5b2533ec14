"""The node of ProtoRe: what a concept's prototype finds is removed."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..editing.edits.spec import Concept, EditSpec, Gate
from ..editing.engine.host import add_edit
from ..editing.methods.cre import CHOICES
from ..editing.methods.protore import DEFAULTS, options_of
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

NODE = "ConceptGuardProtoRe"


class ConceptGuardProtoRe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Erase Concept (ProtoRe)",
            category=f"{CATEGORY}/edits",
            description="Removes what the concept's prototype, the mean of all its phrasings, finds in "
            "cross-attention. The paper's formulas are not public; this is our reading of it. May stand anywhere "
            "between the model loader and the sampler. SD1.x, SD2.x, SDXL.",
            inputs=[
                io.Model.Input("model", tooltip="The model to edit; the one that comes in stays as it is."),
                ConceptType.Input("concept", tooltip="What to erase; its phrasings, a line each, make the prototype."),
                strength_input("How much of it is removed: 1 all of it, 0 nothing (the edit is off)."),
                *window_inputs(),
                blocks_input(),
                *link_inputs(),
                choice_input(
                    "baseline",
                    CHOICES["baseline"],
                    DEFAULTS.baseline,
                    "What the attention is compared with: nothing (none), or what the concept's neutral prompts find "
                    "(neutral), so that only what the concept adds is removed.",
                ),
                folded(
                    io.Float.Input(
                        "floor",
                        default=DEFAULTS.floor,
                        min=0.0,
                        max=1.0,
                        step=0.05,
                        optional=True,
                        tooltip="Edit only where what the prompt finds is at least this similar (cosine) to the "
                        "prototype: higher spares other things more, 1 edits almost nothing, 0 edits everywhere.",
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
        baseline: str = DEFAULTS.baseline,
        floor: float = DEFAULTS.floor,
    ) -> io.NodeOutput:
        with named(NODE):
            expect(concept, Concept)
            place = where(start_percent, end_percent, blocks, range, gate)
            options = options_of(baseline, floor)
        spec = EditSpec("prototype", concept, strength, **place, options=options, node=NODE)
        return io.NodeOutput(add_edit(model, spec))


NODES: list[type[io.ComfyNode]] = [ConceptGuardProtoRe]
