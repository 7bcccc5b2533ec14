"""The node of the erasure prompt."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..editing.edits.encode import lines_of
from ..editing.edits.spec import Concept
from ..editing.methods.eiup import CHOICES, DEFAULTS, EIUPOptions
from ..editing.methods.eiup_weight import load
from .bounds import outside
from .edit import EditNode
from .files import OFF, changed, choices, file_of
from .inputs import (
    CATEGORY,
    UNLINKED,
    blocks_input,
    check,
    choice_input,
    link_inputs,
    model_input,
    named,
    rows_input,
    window_inputs,
)
from .types import ConceptType

NODE = "ConceptGuardEIUP"
TOOLTIPS = {
    "form": "Give the erasure prompt's tokens a softmax of their own (separate), in which weight 0 leaves the picture "
    "as it was, or let them share the prompt's (joint), in which even weight 0 draws attention away from it.",
    "evidence": "Separate form: count the concept's tokens for what they are (none), or only as far as the picture "
    "turns to them rather than to the prompt (share), so that pictures without the concept change less; or find the "
    "features that are like the concept's, compared with the concept's neutral prompts, and re-weight all of them "
    "(alike), for text encoders that say things in more than their own words. The joint form always weighs both.",
    "weights": "A weight for each phrase of the concept, one number a line; 0 leaves that phrase alone. "
    "Empty: `weight` for all of them.",
    "auto": "Find the weight of each phrase and picture at the first step, with a file of the models folder "
    "concept_guard/ that was trained for this model; `weight` then scales it: -1 as trained, 0 off. "
    "It brings its own evidence setting. Separate form only.",
}


def parse_weights(text: str, weight: float) -> tuple[float, ...]:
    """The `weights` input as numbers; `weight` alone where it is empty."""
    lines = lines_of(text)
    try:
        return tuple(float(line) for line in lines) or (float(weight),)
    except ValueError:
        raise ValueError(
            f"weights: cannot read {text.strip()!r}; give one number a line for each phrase of the concept, or leave "
            "it empty to use `weight` for all"
        ) from None


def bounded(node: type[io.ComfyNode], weights: tuple[float, ...]) -> tuple[float, ...]:
    """The numbers of `weights`, each within the bounds of `weight`."""
    for weight in weights:
        if problem := outside(node, {"weight": weight}):
            raise ValueError(problem.replace("weight is", "weights has", 1))
    return weights


class ConceptGuardEIUP(EditNode):
    METHOD = "erasure"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Erase Concept (EIUP)",
            category=f"{CATEGORY}/edits",
            description="Lets the concept's words take part in every cross-attention and takes away the features that "
            "attend to them, also where the prompt never names the concept. May stand anywhere between the model "
            "loader and the sampler. SD1.x, SD2.x, SDXL.",
            inputs=[
                model_input(),
                ConceptType.Input("concept", tooltip="What to erase."),
                io.Float.Input(
                    "weight",
                    default=DEFAULTS.weights[0],
                    min=-16.0,
                    max=16.0,
                    step=0.05,
                    tooltip="What happens to the features that attend to the concept: below 0 they are taken away, "
                    "0 does nothing (the edit is off, unless the form is joint), above 0 they are added.",
                ),
                *window_inputs(end=0.8),
                blocks_input(),
                *link_inputs(),
                choice_input("form", CHOICES["form"], DEFAULTS.form, TOOLTIPS["form"]),
                io.String.Input("weights", default="", multiline=True, optional=True, tooltip=TOOLTIPS["weights"]),
                choice_input("evidence", CHOICES["evidence"], DEFAULTS.evidence, TOOLTIPS["evidence"]),
                choice_input("auto", (OFF, *choices("eiup-weight")), OFF, TOOLTIPS["auto"]),
                rows_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model that no longer shows the concept.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        weight: float | None = -1.0,
        start_percent: float | None = 0.0,
        end_percent: float | None = 0.8,
        blocks: str | None = "all",
        range: Any = UNLINKED,
        weights: str | None = "",
    ) -> bool | str:
        try:
            with named(NODE):
                bounded(cls, parse_weights(weights or "", -1.0))
        except ValueError as error:
            return str(error)
        return check(cls, None, start_percent, end_percent, blocks, range, weight=weight)

    @classmethod
    def fingerprint_inputs(cls, auto: str | None = OFF, **_: Any) -> Any:
        """Load again when the file of the automatic weight has changed."""
        return changed(auto, "eiup-weight")

    @classmethod
    def options(cls, source: Concept, weight: float, form: str, weights: str, evidence: str, auto: str) -> EIUPOptions:
        regressor = None if auto == OFF else load(file_of(auto, "eiup-weight", "auto"))
        evidence = evidence if regressor is None else regressor.evidence
        return EIUPOptions(form, bounded(cls, parse_weights(weights, weight)), evidence, regressor)


NODES: list[type[io.ComfyNode]] = [ConceptGuardEIUP]
