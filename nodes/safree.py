"""The node of SAFREE: the prompt's words that lead to a concept are filtered."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..editing.edits.spec import Concept, EditSpec, Gate
from ..editing.engine.host import add_edit
from ..editing.methods.safree import ALPHA, SAFREEOptions, of_prompt
from .inputs import (
    CATEGORY,
    UNLINKED,
    blocks_input,
    check,
    expect,
    folded,
    link_inputs,
    named,
    strength_input,
    where,
    window_inputs,
)
from .types import ConceptType

NODE = "ConceptGuardSAFREE"


class ConceptGuardSAFREE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Filter Prompt (SAFREE)",
            category=f"{CATEGORY}/edits",
            description="Finds the words of a prompt that lead to a concept, and projects them out of the concept's "
            "span, the longer the more that changes. Give it the same text as the CLIP Text Encode of the positive "
            "prompt. SD1.x, SD2.x, SDXL.",
            inputs=[
                io.Model.Input("model", tooltip="The model to edit; the one that comes in stays as it is."),
                ConceptType.Input("concept", tooltip="What to filter; many phrasings, a line each, say it best."),
                io.Clip.Input("clip", tooltip="The text encoder of the prompt and the concept."),
                io.String.Input(
                    "text",
                    multiline=True,
                    tooltip="The positive prompt, the same text that is encoded for the sampler; other prompts stay.",
                ),
                strength_input("How far the words are moved: 1 as the formula says, 0 not at all (the edit is off)."),
                *window_inputs(),
                blocks_input(),
                *link_inputs(),
                folded(
                    io.Float.Input(
                        "alpha",
                        default=ALPHA,
                        min=0.0,
                        max=10.0,
                        step=0.005,
                        optional=True,
                        tooltip="How much farther from the concept the prompt must lie without a word than without "
                        "the others, for that word to be filtered; 0 filters the most words.",
                    )
                ),
                folded(
                    io.Boolean.Input(
                        "svf",
                        default=True,
                        optional=True,
                        tooltip="Self-validating filtering: act for a first part of the steps, at most a fifth, the "
                        "longer the more the prompt was changed. Off: through the whole window.",
                    )
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model that reads the filtered prompt.")],
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
        clip: Any,
        text: str,
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        blocks: str = "all",
        range: tuple[float, float] | None = None,
        gate: Gate | None = None,
        alpha: float = ALPHA,
        svf: bool = True,
    ) -> io.NodeOutput:
        with named(NODE):
            expect(concept, Concept)
            place = where(start_percent, end_percent, blocks, range, gate)
            SAFREEOptions(alpha=alpha)
            prompt = of_prompt(clip, text, concept, alpha)
            options = SAFREEOptions(prompt, alpha, svf)
        spec = EditSpec("filter", concept, strength, **place, options=options, node=NODE)
        logging.info('%s: %d tokens of the prompt lead to "%s"', NODE, len(prompt.triggers), concept.name)
        return io.NodeOutput(add_edit(model, spec))


NODES: list[type[io.ComfyNode]] = [ConceptGuardSAFREE]
