"""The node that trains a concept out of the weights as other papers do."""

from __future__ import annotations

from typing import Any

import comfy.sd
from comfy_api.latest import io

from ..editing.edits.spec import Concept
from ..editing.pictures.chart import curve
from ..editing.training.erasure import METHODS
from ..editing.training.path import PATHS
from ..jobs.train_erasure import ErasureRecipe, train_erasure
from .inputs import CATEGORY, choice_input, count, expect, named, number, path_steps_input, size_inputs
from .show import id_of
from .training import RUN, course, train_inputs
from .types import ConceptType, LoRAType

NODE = "ConceptGuardTrainErasure"


class ConceptGuardTrainErasure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Train Erasure",
            category=f"{CATEGORY}/train",
            description="Trains a concept out of the model's weights by the method of another paper: ESD-x, ESD-u, "
            "concept ablation (CA), SDD or forget-me-not (FMN). The result is a LoRA: Save Weights or the host's own "
            "nodes keep it, and nothing is left to do while sampling. Needs no pictures: it draws its own. SD1.x, "
            "SD2.x, SDXL.",
            inputs=[
                *erasure_inputs(),
                *train_inputs(checkpointing=True),
                choice_input(
                    "path",
                    PATHS,
                    ErasureRecipe.path,
                    "ESD, SDD: which noisy pictures it learns from: every step of a picture that is being drawn "
                    "(chain), or a new picture each time (fresh), as the papers do, at some 25 times the cost.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model without the concept."),
                LoRAType.Output(display_name="weights", tooltip="What to change the weights by: connect Save Weights."),
                io.Image.Output(display_name="loss", tooltip="The method's loss at each step."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, concept: Concept, **inputs: Any) -> io.NodeOutput:
        with named(NODE):
            expect(concept, Concept)
            recipe = ErasureRecipe(**{name: value for name, value in inputs.items() if name not in RUN})
            how = course(NODE, id_of(cls), model, **{name: inputs[name] for name in RUN if name in inputs})
            lora, losses = train_erasure(model, clip, concept, recipe, how)
            erased, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0.0)
            return io.NodeOutput(erased, lora, curve(losses, f"{recipe.method}: loss of {concept.name}"))


def erasure_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model to erase from; it stays as it is."),
        io.Clip.Input("clip", tooltip="The text encoder that the concept was made with."),
        ConceptType.Input("concept", tooltip="What to erase; its phrasings, a line each, are learned from in turn."),
        io.Combo.Input(
            "method",
            options=list(METHODS),
            default=ErasureRecipe.method,
            tooltip="ESD-x: cross-attentions are pushed away from the concept. ESD-u: all other weights are, for "
            "what appears unasked. CA: the concept is drawn as `neutral` is. SDD: as the empty prompt is, averaged "
            "over the training. FMN: nothing in the picture is to read its words.",
        ),
        io.String.Input(
            "neutral",
            multiline=True,
            default="",
            tooltip="What the concept's phrasings are to give instead, one line for all or one for each. Empty: what "
            "the concept says to draw instead, or what no prompt gives. CA wants one, such as 'a picture of a spoon'; "
            "FMN takes none.",
        ),
        *size_inputs(),
        count("steps", 300, 1, 100_000, "How many times the weights are updated; at least 1, not 0."),
        number(
            "learning_rate",
            ErasureRecipe.learning_rate,
            0.0,
            1.0,
            1e-6,
            "How far each step moves the weights; 0 leaves them. With rank 0 the papers have 1e-5 (ESD, SDD) and "
            "2e-6 (CA, FMN).",
            round=False,
        ),
        count(
            "rank",
            ErasureRecipe.rank,
            0,
            512,
            "Of the LoRA that is learned; 0 changes every number of the weights, as the papers do, and needs far more "
            "memory and disk.",
        ),
        number(
            "eta",
            ErasureRecipe.eta,
            0.0,
            10.0,
            0.1,
            "ESD: how far past `neutral` the concept is pushed; 0 just to it.",
            round=False,
        ),
        number(
            "guidance",
            ErasureRecipe.guidance,
            0.0,
            30.0,
            0.1,
            "With how much guidance the pictures it learns from are drawn; 0 draws them without text.",
            round=False,
        ),
        path_steps_input(ErasureRecipe.path_steps),
        count(
            "pictures",
            ErasureRecipe.pictures,
            1,
            10_000,
            "CA, FMN: how many pictures it draws to learn from, each once; at least 1, not 0. CA's paper has 1000.",
        ),
        count("batch_size", ErasureRecipe.batch_size, 1, 64, "Noisy pictures a step; at least 1, not 0."),
    ]


NODES: list[type[io.ComfyNode]] = [ConceptGuardTrainErasure]
