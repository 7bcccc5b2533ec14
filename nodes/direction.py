"""Nodes that use a learned direction: on a MODEL, on a CONDITIONING, or drawn for each image; and its files."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..editing.edits.spec import Direction
from ..editing.engine.host import add_edit
from ..editing.files.artefacts import Artefact
from ..editing.methods.safe_region import direction_of, drawn, offset
from .edit import EditNode, defaults, place_of
from .inputs import (
    CATEGORY,
    blocks_input,
    expect,
    link_inputs,
    model_input,
    named,
    rows_input,
    seed_input,
    strength_input,
    window_inputs,
)
from .learned import load_node, save_node
from .show import telling
from .types import DirectionType

NAMES = [f"direction_{i}" for i in range(1, 9)]  # of what ConceptGuardFairDirection draws from


def learned(direction: Any) -> Artefact:
    if (artefact := expect(direction, Direction).artefact) is None:
        raise ValueError("direction was not learned, and there is nothing to save; connect Train Direction")
    return artefact


ConceptGuardLoadDirection = load_node(
    (
        "ConceptGuardLoadDirection",
        "Load Direction",
        "directions",
        "A learned direction from the models folder concept_guard/. Files are checked before use.",
    ),
    "direction",
    DirectionType,
    direction_of,
)
ConceptGuardSaveDirection = save_node(
    (
        "ConceptGuardSaveDirection",
        "Save Direction",
        "directions",
        "Writes a learned direction into the models folder concept_guard/, always as a new file. "
        "Press R to see it in Load Direction.",
    ),
    "direction",
    DirectionType,
    "The direction that Train Direction learned.",
    learned,
)


class ConceptGuardSafeDirection(EditNode):
    METHOD, SOURCE = "direction", Direction

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardSafeDirection",
            display_name="Safe Direction",
            category=f"{CATEGORY}/edits",
            description="Adds a learned direction to the positive prompt's encoding while sampling, which keeps the "
            "picture within the safe region (or draws it towards an attribute). May stand anywhere between the model "
            "loader and the sampler. SD1.x, SD2.x, SDXL.",
            inputs=[
                model_input(),
                DirectionType.Input("direction", tooltip="The learned direction."),
                strength_input("How much of the direction is added: 1 as learned, 0 nothing (the edit is off)."),
                *window_inputs(start=0.18),
                *link_inputs(),
                blocks_input(),
                rows_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model whose prompts are moved.")],
            hidden=[io.Hidden.unique_id],
        )


class ConceptGuardOffsetConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardOffsetConditioning",
            display_name="Offset Conditioning",
            category=f"{CATEGORY}/edits",
            description="Adds a learned direction to a conditioning, before any sampler or ControlNet sees it; for any "
            "model whose text encoder the direction was learned for. Without a window: use Safe Direction for that.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="What to move; connect the result as the positive."),
                DirectionType.Input("direction", tooltip="The learned direction."),
                strength_input("How much of the direction is added: 1 as learned, 0 nothing."),
                io.Conditioning.Input(
                    "pooled_from",
                    optional=True,
                    tooltip="Models such as SDXL also read a summary of the prompt, the pooled output, which a "
                    "direction does not reach: what the prompt names can come back through it. Connect the encoding "
                    "of a harmless prompt to use its summary instead. Not connected, or strength 0: it stays.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="The conditioning, moved.")],
        )

    @classmethod
    def execute(
        cls, conditioning: list, direction: Direction, strength: float = 1.0, pooled_from: list | None = None
    ) -> io.NodeOutput:
        with named("ConceptGuardOffsetConditioning"):
            return io.NodeOutput(offset(conditioning, expect(direction, Direction), strength, pooled(pooled_from)))


def pooled(conditioning: list | None) -> Tensor | None:
    found = None if not conditioning else conditioning[0][1].get("pooled_output")
    if conditioning is not None and not isinstance(found, torch.Tensor):
        raise ValueError("pooled_from has no pooled output; connect what the same CLIPTextEncode makes, or nothing")
    return found


class ConceptGuardFairDirection(EditNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardFairDirection",
            display_name="Fair Direction",
            category=f"{CATEGORY}/edits",
            description="Draws one of several learned directions for each image of the batch, all of them equally "
            "likely: one direction towards each value of an attribute makes the attribute fair. Put one node behind "
            "another for more attributes. SD1.x, SD2.x, SDXL.",
            inputs=[
                model_input(),
                DirectionType.Input(NAMES[0], tooltip="Towards one value of the attribute."),
                DirectionType.Input(NAMES[1], tooltip="Towards another."),
                seed_input(
                    "Which direction each image draws; 0 is a seed like any other. Change it with the sampler's."
                ),
                strength_input("How much of the direction is added: 1 as learned, 0 nothing (the edit is off)."),
                *window_inputs(start=0.18),
                *link_inputs(),
                *(DirectionType.Input(name, optional=True, tooltip="One more to draw from.") for name in NAMES[2:]),
                rows_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model whose images draw a direction each.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, seed: int = 0, **inputs: Any) -> io.NodeOutput:
        with named(node := "ConceptGuardFairDirection"):
            given = {**defaults(cls), **inputs}
            place: dict[str, Any] = {**place_of(given), "strength": given.pop("strength")}
            towards = [expect(given[name], Direction, name) for name in NAMES if given.get(name) is not None]
        for spec in drawn(towards, seed, place["gate"], {**place, "node": node, "report": telling(cls)}):
            model = add_edit(model, spec)
        return io.NodeOutput(model)


NODES: list[type[io.ComfyNode]] = [
    ConceptGuardLoadDirection,
    ConceptGuardSaveDirection,
    ConceptGuardSafeDirection,
    ConceptGuardOffsetConditioning,
    ConceptGuardFairDirection,
]
