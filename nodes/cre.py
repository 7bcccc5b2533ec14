"""The node of causal representation editing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..editing.edits.spec import Concept
from ..editing.methods.cre import CHOICES, DEFAULTS, CREOptions
from .edit import EditNode
from .inputs import CATEGORY, choice_input, edit_inputs, folded, model_input, number, rows_input
from .types import ConceptType

READINGS = ("width", "tokens", "baseline", "negative", "solve")  # the first released; later ones follow the floor
TOOLTIPS = {
    "width": "One coefficient for each position of the picture (full), or one for each attention head there (head).",
    "tokens": "Which tokens of the concept's text stand for it: all, or only its own words, without start, end and "
    "padding.",
    "baseline": "What the attention is compared with: nothing (none), or what the concept's neutral prompts find "
    "(neutral), so that only what the concept adds is removed.",
    "negative": "Where the picture points away from the concept, leave it (clip) or move it back towards it as the "
    "formula says (keep).",
    "solve": "Several concepts: find together what each explains (joint), or remove each on its own, as the paper "
    "prints it (sum).",
    "floor": "Edit only where what the prompt finds is at least this similar (cosine) to the concept: higher spares "
    "other things more, 1 edits almost nothing, 0 edits everywhere, as the paper does.",
    "evidence": "Follow what the prompt's own words say (tokens): where they ask for the concept the floor is two "
    "fifths of itself, so that no further words hide it; elsewhere it is higher, and spares neighbours that nobody "
    "named. Or ask each position alone (position), as the floor stands.",
}


class ConceptGuardCRE(EditNode):
    METHOD = "projection"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardCRE",
            display_name="Erase Concept (CRE)",
            category=f"{CATEGORY}/edits",
            description="Removes a concept while sampling: what cross-attention finds of it is projected out. "
            "May stand anywhere between the model loader and the sampler. SD1.x, SD2.x, SDXL.",
            inputs=[
                model_input(),
                ConceptType.Input("concept", tooltip="What to erase."),
                *edit_inputs("How much of the concept is removed: 1 all of it, 0 nothing (the edit is off)."),
                *(choice_input(name, CHOICES[name], getattr(DEFAULTS, name), TOOLTIPS[name]) for name in READINGS),
                folded(number("floor", DEFAULTS.floor, 0.0, 1.0, 0.05, TOOLTIPS["floor"], optional=True)),
                choice_input("evidence", CHOICES["evidence"], DEFAULTS.evidence, TOOLTIPS["evidence"]),
                rows_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model that no longer shows the concept.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def options(cls, source: Concept, **readings: Any) -> CREOptions:
        return replace(DEFAULTS, **readings)


NODES: list[type[io.ComfyNode]] = [ConceptGuardCRE]
