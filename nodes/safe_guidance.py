"""The node of safe latent diffusion: guidance away from a concept."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..editing.edits.spec import Concept, EditSpec, Gate
from ..editing.engine.host import add_edit
from ..editing.methods.sld import SETTINGS, SLDOptions
from .inputs import CATEGORY, UNLINKED, check, expect, link_inputs, named, strength_input, where, window_inputs
from .types import ConceptType

NODE = "ConceptGuardSafeGuidance"
OWN = "own"
MEDIUM = SETTINGS["medium"]


def number(name: str, default: float, high: float, step: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=high, step=step, tooltip=f"Setting own: {tooltip}")


class ConceptGuardSafeGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Safe Guidance (SLD)",
            category=f"{CATEGORY}/edits",
            description="Safe latent diffusion: a third prediction, of the concept, and guidance away from it where "
            "the prompt's own is near to it. Costs half as much again; needs cfg above 1. May stand anywhere between "
            "the model loader and the sampler. SD1.x, SD2.x, SDXL.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guide; the one that comes in stays as it is."),
                ConceptType.Input("concept", tooltip="What to lead away from; several phrasings are one long prompt."),
                io.Combo.Input(
                    "setting",
                    options=[*SETTINGS, OWN],
                    default="medium",
                    tooltip="The published settings, for 50 steps, from weak to max; or the five numbers below (own).",
                ),
                number("scale", MEDIUM.scale, 1e5, 10.0, "how soon a difference counts in full; below 1, as 0, off."),
                number(
                    "threshold",
                    MEDIUM.threshold,
                    10.0,
                    0.005,
                    "how far the prompt's prediction may lie above the concept's to be led away; 0 is not at all.",
                ),
                io.Int.Input(
                    "warmup",
                    default=MEDIUM.warmup,
                    min=0,
                    max=1000,
                    tooltip="Setting own: for how many steps it only gathers momentum; 0 guides from the first on.",
                ),
                number("momentum", MEDIUM.momentum, 4.0, 0.05, "how much of the momentum is added; 0 is none."),
                io.Float.Input(
                    "beta",
                    default=MEDIUM.beta,
                    min=0.0,
                    max=0.99,
                    step=0.05,
                    tooltip="Setting own: how much of the momentum lasts from step to step; 0 is the last step alone.",
                ),
                strength_input("Times the whole of it: 1 as the formula says, 0 nothing (the edit is off)."),
                *window_inputs(),
                *link_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The model that is led away from the concept.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        strength: float | None = 1.0,
        start_percent: float | None = 0.0,
        end_percent: float | None = 1.0,
        range: Any = UNLINKED,
    ) -> bool | str:
        return check(cls, strength, start_percent, end_percent, "all", range)

    @classmethod
    def execute(
        cls,
        model: Any,
        concept: Concept,
        setting: str = "medium",
        scale: float = MEDIUM.scale,
        threshold: float = MEDIUM.threshold,
        warmup: int = MEDIUM.warmup,
        momentum: float = MEDIUM.momentum,
        beta: float = MEDIUM.beta,
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        range: tuple[float, float] | None = None,
        gate: Gate | None = None,
    ) -> io.NodeOutput:
        with named(NODE):
            expect(concept, Concept)
            if setting not in (*SETTINGS, OWN):
                raise ValueError(f"setting is {setting!r}; choose one of {', '.join((*SETTINGS, OWN))}")
            own = SLDOptions(scale, threshold, warmup, momentum, beta)
            place = where(start_percent, end_percent, "all", range, gate)
        options = own if setting == OWN else SETTINGS[setting]
        return io.NodeOutput(
            add_edit(model, EditSpec("guidance", concept, strength, **place, options=options, node=NODE))
        )


NODES: list[type[io.ComfyNode]] = [ConceptGuardSafeGuidance]
