"""The node that learns a direction."""

from __future__ import annotations

from typing import Any

import comfy.sample
from comfy_api.latest import io

from ..editing.edits.encode import lines_of
from ..editing.edits.spec import Concept, Direction, EditSpec
from ..editing.engine.host import add_edit
from ..editing.pictures.chart import curve
from ..editing.training.direction import GOALS, Settings
from ..editing.training.harness import DTYPES
from ..jobs.train_direction import train_direction
from .inputs import CATEGORY, check, choice_input, count, expect, named, number, seed_input
from .show import id_of
from .training import course
from .types import ConceptType, DirectionType

NODE = "ConceptGuardTrainDirection"


class ConceptGuardTrainDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Train Direction",
            category=f"{CATEGORY}/train",
            description="Learns a direction of the text encoding that leads any prompt away from a concept (a safe "
            "region), or towards it (an attribute, for Fair Direction), from the model's own predictions: no pictures "
            "are needed. A few hundred steps; each is three model calls and one gradient. SD1.x, SD2.x, SDXL.",
            inputs=[
                io.Model.Input("model", tooltip="The model to learn from; it stays as it is."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                ConceptType.Input(
                    "concept",
                    tooltip="What to lead away from or towards. With several phrases (the members of a family), the "
                    "training pictures take them in turn.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="What the training pictures show, one prompt a line, taken in turn. Empty: the concept's "
                    "own phrases. For an attribute: neutral prompts such as 'a person'.",
                ),
                io.Latent.Input(
                    "latent", tooltip="An empty latent: the size of the training pictures, and how many at once."
                ),
                io.Combo.Input(
                    "goal",
                    options=list(GOALS),
                    default=Settings.goal,
                    tooltip="Lead away from the concept, or towards it.",
                ),
                count("steps", 400, 1, 100_000, "How many updates; at least 1, 0 is refused."),
                number(
                    "learning_rate",
                    Settings.learning_rate,
                    0.0001,
                    10.0,
                    0.001,
                    "How far each update goes; 0 would learn nothing and is refused.",
                    round=False,
                ),
                number(
                    "guidance",
                    Settings.guidance,
                    0.0,
                    50.0,
                    0.5,
                    "How far away from (or towards) the concept the target lies. At 0 the target "
                    "is the concept's own prediction (away) or the empty prompt's (towards).",
                ),
                seed_input("Of the start and the training pictures; 0 is a seed like any other."),
                count(
                    "sampling_steps",
                    Settings.sampling_steps,
                    1,
                    1000,
                    "Denoising steps of a training picture, one update each; at least 1, not 0.",
                ),
                number(
                    "cfg",
                    Settings.cfg,
                    0.0,
                    50.0,
                    0.5,
                    "Guidance with which the training pictures are drawn; 0 ignores the prompts.",
                ),
                number(
                    "start_percent",
                    Settings.start_percent,
                    0.0,
                    1.0,
                    0.001,
                    "From when on the direction takes part in the training pictures, as a fraction "
                    "of the timesteps; 0 is the start of sampling.",
                ),
                number(
                    "end_percent",
                    Settings.end_percent,
                    0.0,
                    1.0,
                    0.001,
                    "Until when; 1 includes the last step, 0 leaves nothing to learn from.",
                ),
                DirectionType.Input(
                    "resume",
                    optional=True,
                    tooltip="A direction to go on with, learned with the same inputs but fewer steps. The result is "
                    "that of a training without the break.",
                ),
                choice_input(
                    "precision",
                    tuple(DTYPES),
                    Settings.precision,
                    "What the model computes in: its own precision (auto; bf16 for a model in fp16, whose "
                    "gradients would vanish), bf16 or fp32.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    optional=True,
                    tooltip="Needs far less memory, and a third more time. Off is for large cards.",
                ),
            ],
            outputs=[
                DirectionType.Output(display_name="direction", tooltip="What was learned; connect Save Direction."),
                io.Model.Output(display_name="model", tooltip="The model with the direction at strength 1."),
                io.Image.Output(display_name="loss", tooltip="The loss at each update."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, start_percent: float | None = Settings.start_percent, end_percent: float | None = Settings.end_percent
    ) -> bool | str:
        return check(cls, None, start_percent, end_percent)

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        concept: Concept,
        prompts: str,
        latent: dict[str, Any],
        steps: int = 400,
        resume: Direction | None = None,
        checkpointing: bool = True,
        **settings: Any,
    ) -> io.NodeOutput:
        with named(NODE):
            expect(concept, Concept)
            if (complaint := check(cls, None, settings.get("start_percent"), settings.get("end_percent"))) is not True:
                raise ValueError(str(complaint).removeprefix(f"{NODE}: "))
            lines = lines_of(prompts) or [phrase.text for phrase in concept.phrases]
            x = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
            chosen = Settings(tuple(lines), shape=tuple(x.shape), **settings)
            how = course(NODE, id_of(cls), model, steps, chosen.precision, checkpointing)
            direction, losses = train_direction(model, clip, concept, chosen, how, resume)
            plot = curve(losses, f"loss of {concept.name}")
        edit = EditSpec("direction", direction, 1.0, chosen.start_percent, chosen.end_percent, node=NODE)
        return io.NodeOutput(direction, add_edit(model, edit), plot)


NODES: list[type[io.ComfyNode]] = [ConceptGuardTrainDirection]
