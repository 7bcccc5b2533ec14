"""The node that erases concepts from the weights (KPOP)."""

from __future__ import annotations

from typing import Any

import comfy.sd
from comfy_api.latest import io

from ..editing.methods.kpop import MECHANISMS
from ..editing.pictures.chart import curve
from ..editing.training.changes import WEIGHTS
from ..editing.training.kpop import KEYS_AND_VALUES, STARTS
from ..editing.training.path import PATHS
from ..jobs.train_kpop import BLOCKS, KPOPRecipe, train_kpop
from .inputs import CATEGORY, choice_input, count, named, path_steps_input, size_inputs
from .show import id_of
from .training import RUN, course, train_inputs
from .types import LoRAType, PromptType

NODE = "ConceptGuardTrainKPOP"
ADVANCED = {
    "path": (
        PATHS,
        "Which noisy pictures it learns from: every step of a picture that is being drawn (chain), or a "
        "new picture each time (fresh), as the authors' code does, at some 25 times the cost.",
    ),
    "keys_and_values": (
        KEYS_AND_VALUES,
        "One learned prompt for the keys and the values of cross-attention, as the "
        "paper writes it, or two, as its code has it. Additive prompts have one.",
    ),
    "prompt_start": (
        STARTS,
        "What the prompt is before it learns: noise as strong as text, or the first concept's own tokens.",
    ),
}


class ConceptGuardTrainKPOP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Train KPOP",
            category=f"{CATEGORY}/train",
            description="Erases concepts from the model's weights, while a learned prompt takes up what was erased: "
            "the result is a LoRA for everybody and, apart from it, a prompt that brings the concepts back, for you. "
            "Needs no pictures. SD1.x, SD2.x, SDXL.",
            inputs=[
                *kpop_inputs(),
                *train_inputs(checkpointing=True),
                *(choice_input(name, options, options[0], tooltip) for name, (options, tooltip) in ADVANCED.items()),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model without the concepts."),
                LoRAType.Output(display_name="weights", tooltip="What to change the weights by: connect Save Weights."),
                PromptType.Output(display_name="prompt", tooltip="The key that brings the concepts back: Save Prompt."),
                io.Image.Output(display_name="loss", tooltip="The loss of the removal (eq. 7) at each step."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, text: str, **inputs: Any) -> io.NodeOutput:
        with named(NODE):
            recipe = {name: value for name, value in inputs.items() if name not in RUN}
            how = course(NODE, id_of(cls), model, **{name: inputs[name] for name in RUN if name in inputs})
            lora, prompt, losses = train_kpop(model, clip, text, KPOPRecipe(**recipe), how)
            sanitised, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0.0)
            return io.NodeOutput(sanitised, lora, prompt, curve(losses, f"loss of {prompt.name}"))


def kpop_inputs() -> list[io.Input]:
    def number(name: str, tooltip: str, low: float = 0.0, high: float = 1.0, step: float = 1e-6) -> io.Float.Input:
        default = getattr(KPOPRecipe, name)
        return io.Float.Input(name, default=default, min=low, max=high, step=step, round=False, tooltip=tooltip)

    return [
        io.Model.Input("model", tooltip="The model to erase from; it stays as it is."),
        io.Clip.Input("clip", tooltip="Its text encoder."),
        io.String.Input("text", multiline=True, tooltip="What to erase, one concept a line; all of them at once."),
        io.String.Input(
            "neutral",
            multiline=True,
            default=KPOPRecipe.neutral,
            tooltip="What a prompt that names the concept is to give instead: one line for all concepts, "
            "or a line for each ('a photo of a cat' for 'a photo of a knife': what both say is "
            "kept). Empty: what no prompt gives.",
        ),
        io.String.Input("name", default="", tooltip="What to call the result. Empty: the first concept."),
        *size_inputs(),
        count("steps", 1000, 1, 100_000, "How many times prompt and weights are updated; at least 1, not 0."),
        number("learning_rate", "How far each step moves the weights; 0 leaves them."),
        number("prompt_learning_rate", "How far each step moves the prompt; 0 leaves it as it starts."),
        number(
            "lam",
            "The paper's lambda: how much the model is to draw the concept with the prompt as before. More "
            "keeps more of the model and erases less. 0 erases without regard to the prompt, which then opens "
            "nothing.",
            0.0,
            100.0,
            0.01,
        ),
        count(
            "prompt_size",
            KPOPRecipe.prompt_size,
            1,
            1000,
            "Tokens of a concatenated prompt; at least 1, not 0. An additive one has the text's length.",
        ),
        io.Combo.Input(
            "mechanism",
            options=list(MECHANISMS),
            default=KPOPRecipe.mechanism,
            tooltip="Append the prompt to the text (concat), or add it to the text's encoding (additive).",
        ),
        io.Combo.Input(
            "blocks",
            options=list(BLOCKS),
            default=KPOPRecipe.blocks,
            tooltip="Which cross-attentions read the prompt. An additive prompt is read by all of them.",
        ),
        io.Combo.Input(
            "weights",
            options=list(WEIGHTS),
            default=KPOPRecipe.weights,
            tooltip="Which weights are changed: those of the cross-attentions, for what words name; the "
            "others, for what pictures show without being asked; or all.",
        ),
        count(
            "rank",
            KPOPRecipe.rank,
            0,
            512,
            "0 changes every number of the weights, as the paper does; above 0 a LoRA of this rank is "
            "learned, which needs far less memory and disk.",
        ),
        number(
            "guidance",
            "With how much guidance the pictures it learns from are drawn; 0 draws them without text.",
            0.0,
            30.0,
            0.1,
        ),
        number(
            "overshoot",
            "How far past the neutral concept the erased one is pushed. 0 is the paper's formula, 1 "
            "what the authors' code does.",
            0.0,
            10.0,
            0.1,
        ),
        path_steps_input(KPOPRecipe.path_steps),
        count(
            "batch_size",
            KPOPRecipe.batch_size,
            1,
            64,
            "Pictures a step, each of one concept drawn at random; at least 1, not 0.",
        ),
    ]


NODES: list[type[io.ComfyNode]] = [ConceptGuardTrainKPOP]
