"""The node of safe latent diffusion: guidance away from a concept."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..editing.edits.spec import Concept
from ..editing.methods.sld import SETTINGS, SLDOptions
from .edit import EditNode
from .inputs import CATEGORY, count, link_inputs, number, strength_input, window_inputs
from .types import ConceptType

OWN = "own"
MEDIUM = SETTINGS["medium"]


class ConceptGuardSafeGuidance(EditNode):
    METHOD = "guidance"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardSafeGuidance",
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
                number(
                    "scale",
                    MEDIUM.scale,
                    0.0,
                    1e5,
                    10.0,
                    "Setting own: how soon a difference counts in full; below 1, as 0, off.",
                ),
                number(
                    "threshold",
                    MEDIUM.threshold,
                    0.0,
                    10.0,
                    0.005,
                    "Setting own: how far the prompt's prediction may lie above the concept's to be led away; 0 is "
                    "not at all.",
                ),
                count(
                    "warmup",
                    MEDIUM.warmup,
                    0,
                    1000,
                    "Setting own: for how many steps it only gathers momentum; 0 guides from the first on.",
                ),
                number(
                    "momentum",
                    MEDIUM.momentum,
                    0.0,
                    4.0,
                    0.05,
                    "Setting own: how much of the momentum is added; 0 is none.",
                ),
                number(
                    "beta",
                    MEDIUM.beta,
                    0.0,
                    0.99,
                    0.05,
                    "Setting own: how much of the momentum lasts from step to step; 0 is the last step alone.",
                ),
                strength_input("Times the whole of it: 1 as the formula says, 0 nothing (the edit is off)."),
                *window_inputs(),
                *link_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The model that is led away from the concept.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def options(cls, source: Concept, setting: str, **numbers: Any) -> SLDOptions:
        if setting not in (*SETTINGS, OWN):
            raise ValueError(f"setting is {setting!r}; choose one of {', '.join((*SETTINGS, OWN))}")
        own = SLDOptions(**numbers)
        return own if setting == OWN else SETTINGS[setting]


NODES: list[type[io.ComfyNode]] = [ConceptGuardSafeGuidance]
