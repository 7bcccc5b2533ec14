"""The node that erases concepts from the weights (KPOP)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import comfy.sd
from comfy_api.latest import io

from ..editing.edits.digest import digest
from ..editing.edits.spec import Prompt
from ..editing.engine.host import fingerprint_of
from ..editing.files.artefacts import FORMAT, package_version
from ..editing.methods.kpop import MECHANISMS
from ..editing.pictures.chart import curve
from ..editing.training.kpop import (
    KEYS_AND_VALUES,
    KPOP,
    METHOD,
    PATHS,
    STARTS,
    KPOPOptions,
    LearnedPrompt,
    prompt_start,
)
from ..editing.training.learning import Text
from ..editing.training.lora import WEIGHTS, Deltas, LoRA, chosen
from ..editing.training.mode import gradients
from ..editing.training.network import Network
from .inputs import CATEGORY, choice_input, named
from .training import conduct, encode, lines_for, network_of, train_inputs, weights_key
from .types import LoRAType, PromptType

NODE = "ConceptGuardTrainKPOP"
BLOCKS = {"middle": "middle", "middle and up": "middle,output", "all": "all"}
DEFAULTS = KPOPOptions()
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
            "the "
            "result is a LoRA for everybody and, apart from it, a prompt that brings the concepts back, for you. Needs "
            "no pictures. SD1.x, SD2.x, SDXL.",
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
        with named(NODE), gradients():
            lora, prompt, losses = learn(model, clip, text, getattr(cls.hidden, "unique_id", None), **inputs)
            sanitised, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0.0)
            return io.NodeOutput(sanitised, lora, prompt, curve(losses, f"loss of {prompt.name}"))


def kpop_inputs() -> list[io.Input]:
    def number(name: str, tooltip: str, low: float = 0.0, high: float = 1.0, step: float = 1e-6) -> io.Float.Input:
        default = {
            "learning_rate": DEFAULTS.lr,
            "prompt_learning_rate": DEFAULTS.prompt_lr,
            "lam": DEFAULTS.lam,
            "guidance": DEFAULTS.guidance,
            "overshoot": DEFAULTS.overshoot,
        }[name]
        return io.Float.Input(name, default=default, min=low, max=high, step=step, round=False, tooltip=tooltip)

    return [
        io.Model.Input("model", tooltip="The model to erase from; it stays as it is."),
        io.Clip.Input("clip", tooltip="Its text encoder."),
        io.String.Input("text", multiline=True, tooltip="What to erase, one concept a line; all of them at once."),
        io.String.Input(
            "neutral",
            multiline=True,
            default="a photo",
            tooltip="What a prompt that names the concept is to give instead: one line for all concepts, "
            "or a line for each ('a photo of a cat' for 'a photo of a knife': what both say is "
            "kept). Empty: what no prompt gives.",
        ),
        io.String.Input("name", default="", tooltip="What to call the result. Empty: the first concept."),
        io.Int.Input(
            "width",
            default=512,
            min=16,
            max=4096,
            step=8,
            tooltip="Of the pictures it learns from, in pixels: the model's own size. 0 is refused.",
        ),
        io.Int.Input("height", default=512, min=16, max=4096, step=8, tooltip="As width. 0 is refused."),
        io.Int.Input(
            "steps",
            default=1000,
            min=1,
            max=100_000,
            tooltip="How many times prompt and weights are updated; at least 1, not 0.",
        ),
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
        io.Int.Input(
            "prompt_size",
            default=10,
            min=1,
            max=1000,
            tooltip="Tokens of a concatenated prompt; at least 1, not 0. An additive one has the text's length.",
        ),
        io.Combo.Input(
            "mechanism",
            options=list(MECHANISMS),
            default="concat",
            tooltip="Append the prompt to the text (concat), or add it to the text's encoding (additive).",
        ),
        io.Combo.Input(
            "blocks",
            options=list(BLOCKS),
            default="middle",
            tooltip="Which cross-attentions read the prompt. An additive prompt is read by all of them.",
        ),
        io.Combo.Input(
            "weights",
            options=list(WEIGHTS),
            default="cross-attention",
            tooltip="Which weights are changed: those of the cross-attentions, for what words name; the "
            "others, for what pictures show without being asked; or all.",
        ),
        io.Int.Input(
            "rank",
            default=0,
            min=0,
            max=512,
            tooltip="0 changes every number of the weights, as the paper does; above 0 a LoRA of this rank is "
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
        io.Int.Input(
            "path_steps",
            default=DEFAULTS.path_steps,
            min=2,
            max=1000,
            tooltip="Denoising steps of each of those pictures; at least 2, not 0.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=64,
            tooltip="Pictures a step, each of one concept drawn at random; at least 1, not 0.",
        ),
    ]


@dataclass(frozen=True)
class Recipe:
    """The node's inputs beside model, clip and text."""

    neutral: str = "a photo"
    name: str = ""
    width: int = 512
    height: int = 512
    steps: int = 1000
    learning_rate: float = DEFAULTS.lr
    prompt_learning_rate: float = DEFAULTS.prompt_lr
    lam: float = DEFAULTS.lam
    prompt_size: int = 10
    mechanism: str = "concat"
    blocks: str = "middle"
    weights: str = "cross-attention"
    rank: int = 0
    guidance: float = DEFAULTS.guidance
    overshoot: float = DEFAULTS.overshoot
    path_steps: int = DEFAULTS.path_steps
    batch_size: int = 1
    seed: int = 0
    precision: str = "fp32"
    checkpointing: bool = True
    checkpoint_every: int = 100
    resume: bool = True
    path: str = "chain"
    keys_and_values: str = "one"
    prompt_start: str = "noise"

    @property
    def options(self) -> KPOPOptions:
        return KPOPOptions(
            self.learning_rate,
            self.prompt_learning_rate,
            self.lam,
            self.overshoot,
            self.guidance,
            self.path,
            self.path_steps,
            self.batch_size,
            self.seed,
        )

    @property
    def places(self) -> str:
        return "all" if self.mechanism == "additive" else BLOCKS[self.blocks]

    @property
    def about(self) -> dict[str, Any]:
        """All that decides what is learned, but for the number of steps."""
        free = ("name", "steps", "checkpointing", "checkpoint_every", "resume")
        return {key: value for key, value in asdict(self).items() if key not in free}


def learn(
    model: Any, clip: Any, text: str, node_id: str | None = None, **inputs: Any
) -> tuple[LoRA, Prompt, list[float]]:
    """The weights' changes, the prompt, and the losses; inputs: a Recipe's. Within `gradients`."""
    recipe, lines = Recipe(**inputs), [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("text is empty; write what to erase, one concept a line")
    neutral = lines_for("neutral", recipe.neutral, len(lines), "concepts")
    backbone = fingerprint_of(model, NODE)
    encoded = [encode(clip, line) for line in (*lines, *neutral, "")]  # while the card has room for the encoder
    network = network_of(model, recipe.precision, recipe.checkpointing)
    training, texts = training_of(network, encoded, recipe)
    settings = {
        **recipe.about,
        "concepts": lines,
        "texts": digest(t.c.cpu() for t in texts)[:20],
        "model": weights_key(network),
    }
    losses = conduct(
        "kpop-checkpoint", training, recipe.steps, settings, node_id, model, recipe.checkpoint_every, recipe.resume
    )
    made = {**settings, "steps": recipe.steps}
    name = recipe.name.strip() or lines[0]
    prompt = training.prompt.result(name, concepts=tuple(lines), backbone=backbone, training=made)
    about = {
        "format": FORMAT,
        "kind": "weights",
        "method": METHOD,
        "name": name,
        "backbone": backbone,
        "concepts": json.dumps(lines),
        "training": json.dumps(made),
        "version": package_version(),
    }
    return LoRA(training.deltas.lora(), about), prompt, losses


def training_of(network: Network, encoded: Sequence[Any], recipe: Recipe) -> tuple[KPOP, list[Text]]:
    """The training, and all the texts that it reads. encoded: the concepts, the neutral text of each, the empty one."""
    h, w = recipe.height // 8, recipe.width // 8
    texts = [network.text(conditioning, h, w) for conditioning in encoded]
    if len({each.c.shape[1] for each in texts}) > 1:
        raise ValueError("text: every concept must fit into one piece of prompt (75 tokens); shorten the longest line")
    *concepts, empty = texts
    concepts, neutral = concepts[: len(concepts) // 2], concepts[len(concepts) // 2 :]
    start = prompt_start(recipe.prompt_start, recipe.mechanism, recipe.prompt_size, concepts[0].c, recipe.seed)
    prompt = LearnedPrompt(start, recipe.mechanism, recipe.places, recipe.keys_and_values)
    deltas = Deltas(chosen(network.unet, recipe.weights), recipe.rank, recipe.seed)
    training = KPOP(
        network, network.sampling, concepts, neutral, empty, deltas, prompt, network.shape(h, w), recipe.options
    )
    return training, texts


NODES: list[type[io.ComfyNode]] = [ConceptGuardTrainKPOP]
