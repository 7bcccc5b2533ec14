"""The node of SAFREE: the prompt's words that lead to a concept are filtered."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..editing.edits.spec import Concept
from ..editing.methods.safree import ALPHA, SAFREEOptions, of_prompt
from .edit import EditNode
from .inputs import CATEGORY, edit_inputs, folded, model_input, number
from .types import ConceptType

NODE = "ConceptGuardSAFREE"


class ConceptGuardSAFREE(EditNode):
    METHOD = "filter"

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
                model_input(),
                ConceptType.Input("concept", tooltip="What to filter; many phrasings, a line each, say it best."),
                io.Clip.Input("clip", tooltip="The text encoder of the prompt and the concept."),
                io.String.Input(
                    "text",
                    multiline=True,
                    tooltip="The positive prompt, the same text that is encoded for the sampler; other prompts stay.",
                ),
                *edit_inputs("How far the words are moved: 1 as the formula says, 0 not at all (the edit is off)."),
                folded(
                    number(
                        "alpha",
                        ALPHA,
                        0.0,
                        10.0,
                        0.005,
                        "How much farther from the concept the prompt must lie without a word than without "
                        "the others, for that word to be filtered; 0 filters the most words.",
                        optional=True,
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
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def options(cls, source: Concept, clip: Any, text: str, alpha: float, svf: bool) -> SAFREEOptions:
        SAFREEOptions(alpha=alpha)
        prompt = of_prompt(clip, text, source, alpha)
        logging.info('%s: %d tokens of the prompt lead to "%s"', NODE, len(prompt.triggers), source.name)
        return SAFREEOptions(prompt, alpha, svf)


NODES: list[type[io.ComfyNode]] = [ConceptGuardSAFREE]
