"""The node of causal representation editing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..editing.edits.spec import ROWS, Concept, EditSpec, Gate
from ..editing.engine.host import add_edit
from ..editing.methods.cre import CHOICES, DEFAULTS
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
    rows_input,
    strength_input,
    where,
    window_inputs,
)
from .show import telling
from .types import ConceptType

NODE = "ConceptGuardCRE"
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
    "evidence": "Follow what the prompt's own words say (tokens): where they ask for the concept the floor is a fifth "
    "of itself, so that no further words hide it; elsewhere it is higher, and spares neighbours that nobody named. Or "
    "ask each position alone (position), as the floor stands.",
}


def floor_input() -> io.Float.Input:
    return folded(
        io.Float.Input(
            "floor", default=DEFAULTS.floor, min=0.0, max=1.0, step=0.05, optional=True, tooltip=TOOLTIPS["floor"]
        )
    )


class ConceptGuardCRE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Erase Concept (CRE)",
            category=f"{CATEGORY}/edits",
            description="Removes a concept while sampling: what cross-attention finds of it is projected out. "
            "May stand anywhere between the model loader and the sampler. SD1.x, SD2.x, SDXL.",
            inputs=[
                io.Model.Input("model", tooltip="The model to edit; the one that comes in stays as it is."),
                ConceptType.Input("concept", tooltip="What to erase."),
                strength_input("How much of the concept is removed: 1 all of it, 0 nothing (the edit is off)."),
                *window_inputs(),
                blocks_input(),
                *link_inputs(),
                *(choice_input(name, CHOICES[name], getattr(DEFAULTS, name), TOOLTIPS[name]) for name in READINGS),
                floor_input(),
                choice_input("evidence", CHOICES["evidence"], DEFAULTS.evidence, TOOLTIPS["evidence"]),
                rows_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model that no longer shows the concept.")],
            hidden=[io.Hidden.unique_id],
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
        rows: str = ROWS[0],
        **options: Any,
    ) -> io.NodeOutput:
        with named(NODE):
            expect(concept, Concept)
            place = where(start_percent, end_percent, blocks, range, gate, rows)
            readings = replace(DEFAULTS, **options)
        spec = EditSpec("projection", concept, strength, **place, options=readings, node=NODE, report=telling(cls))
        return io.NodeOutput(add_edit(model, spec))


NODES: list[type[io.ComfyNode]] = [ConceptGuardCRE]
