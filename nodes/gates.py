"""The gates: whether an edit acts, by a reference picture, by the prompt, or by what takes shape while sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..editing.edits.spec import Concept
from ..editing.gates.gates import DECIDES, Report, image_gate, in_flight_gate, prompt_gate
from .inputs import CATEGORY, choice_input, named
from .show import id_of, show, told
from .types import ConceptType, DiscriminatorType, GateType

LEFT = "\nin the finished pictures, edited: see the account"
IMAGE, PROMPT, IN_FLIGHT = "ConceptGuardImageGate", "ConceptGuardPromptGate", "ConceptGuardInFlightGate"


def threshold_input() -> io.Float.Input:
    return io.Float.Input(
        "threshold",
        default=0.5,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="The gate opens where the confidence reaches this; 0.5 is the paper's rounding, 0 always opens. The "
        "nodes that make a discriminator put out a threshold to connect here.",
    )


def soft_input() -> io.Boolean.Input:
    soft = io.Boolean.Input(
        "soft",
        default=False,
        optional=True,
        tooltip="An open gate multiplies the strength by the confidence, rather than by 1; below the threshold it "
        "stays closed. With threshold 0 the confidence alone decides.",
    )
    soft.extra_dict["advanced"] = True
    return soft


def outputs(what: str) -> list[io.Output]:
    return [
        GateType.Output(display_name="gate", tooltip="For the `gate` input of an edit."),
        io.Boolean.Output(display_name="flagged", tooltip=f"Whether {what} reaches the threshold."),
        io.Float.Output(display_name="score", tooltip="The confidence, the highest if there are several."),
    ]


def verdict(scores: Sequence[float], values: Sequence[float]) -> str:
    """Words for the node."""
    flagged = sum(value > 0 for value in values)
    listed = ", ".join(f"{score:.2f}" for score in scores[:8]) + (", .." if len(scores) > 8 else "")
    if len(scores) == 1:
        return f"{'flagged: gate open' if flagged else 'not flagged: gate closed'}\nconfidence {listed}"
    return f"{flagged} of {len(scores)} flagged\nconfidence {listed}"


def reporting(node_id: str | None) -> Report:
    """Puts what a gate finds while sampling on a node."""
    return lambda scores, values, left: show(node_id, f"{verdict(scores, values)}{LEFT * left}")


class ConceptGuardImageGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=IMAGE,
            display_name="Image Gate",
            category=f"{CATEGORY}/gates",
            description="Opens an edit where a reference picture shows the concept, and leaves the rest untouched, "
            "bit for bit.",
            inputs=[
                DiscriminatorType.Input("discriminator", tooltip="What decides whether the concept is there."),
                io.Image.Input(
                    "image",
                    tooltip="The reference. One picture decides for the whole batch; several decide for the image of "
                    "the same number each, and must be as many as the latent batch has.",
                ),
                threshold_input(),
                soft_input(),
                choice_input(
                    "decides",
                    DECIDES,
                    "each",
                    "With several pictures: each decides for the image of its number, or any of them for all.",
                ),
            ],
            outputs=outputs("a picture"),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, discriminator: Any, image: Tensor, threshold: float = 0.5, soft: bool = False, decides: str = "each"
    ) -> io.NodeOutput:
        with named(IMAGE):
            gate, scores, values = image_gate(discriminator, image, threshold, soft, decides)
        return told(cls, verdict(scores, values), gate, any(values), max(scores))


class ConceptGuardPromptGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=PROMPT,
            display_name="Prompt Gate",
            category=f"{CATEGORY}/gates",
            description="Opens an edit when the prompt asks for the concept, by a discriminator of prompts or by its "
            "likeness to the concept's phrases. A prompt that implies the concept may pass: see In-Flight Gate.",
            inputs=[
                DiscriminatorType.Input(
                    "discriminator", optional=True, tooltip="A discriminator of prompts; goes before `concept`."
                ),
                ConceptType.Input(
                    "concept", optional=True, tooltip="The concept whose phrases the prompt is compared with."
                ),
                io.Clip.Input("clip", tooltip="The text encoder that encodes the prompt."),
                io.String.Input("text", multiline=True, tooltip="The prompt; empty is never flagged."),
                threshold_input(),
                soft_input(),
            ],
            outputs=outputs("the prompt"),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        text: str,
        threshold: float = 0.5,
        discriminator: Any = None,
        concept: Concept | None = None,
        soft: bool = False,
    ) -> io.NodeOutput:
        with named(PROMPT):
            judge = discriminator if discriminator is not None or not isinstance(concept, Concept) else concept
            gate, scores, values = prompt_gate(judge, clip, text, threshold, soft)
        return told(cls, verdict(scores, values), gate, any(values), max(scores))


class ConceptGuardInFlightGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=IN_FLIGHT,
            display_name="In-Flight Gate",
            category=f"{CATEGORY}/gates",
            description="Decides while sampling, for each image of the batch: the picture that the model is about to "
            "make is decoded early and judged; from the next step on the edits act on the flagged ones. Catches "
            "prompts that never name the concept.",
            inputs=[
                DiscriminatorType.Input("discriminator", tooltip="What decides whether the concept is there."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the predicted picture. Not connected: the host's fast preview, rougher.",
                ),
                io.Float.Input(
                    "at_percent",
                    default=0.3,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="When to look, as a fraction of the timesteps; 0 is after the first step, where little is "
                    "to be seen.",
                ),
                threshold_input(),
                soft_input(),
                restart_input(),
            ],
            outputs=[GateType.Output(display_name="gate", tooltip="For the `gate` input of an edit.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        discriminator: Any,
        at_percent: float = 0.3,
        threshold: float = 0.5,
        vae: Any = None,
        soft: bool = False,
        restart: bool = True,
    ) -> io.NodeOutput:
        node_id = id_of(cls)
        with named(IN_FLIGHT):
            gate = in_flight_gate(discriminator, vae, at_percent, threshold, soft, restart, reporting(node_id))
        return told(cls, "decides while sampling", gate)


def restart_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "restart",
        default=True,
        optional=True,
        tooltip="When an image is flagged after the edit's window has begun, sample again from the first noise with "
        "the edit on for that image: as thorough as an edit from the start, for the steps that are done twice. "
        "Looks once more after the last step, for what took shape later; the account tells what it sees there all the "
        "same. Images that are not flagged come out unchanged.",
    )


NODES: list[type[io.ComfyNode]] = [ConceptGuardImageGate, ConceptGuardPromptGate, ConceptGuardInFlightGate]
