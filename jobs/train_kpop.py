"""KPOP: concepts erased from the weights of a MODEL, and the prompt that brings them back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..editing.edits.digest import digest
from ..editing.edits.encode import lines_of
from ..editing.edits.spec import PromptTokens
from ..editing.engine.host import fingerprint_of
from ..editing.files.artefacts import FORMAT, package_version
from ..editing.training.changes import LoRA
from ..editing.training.harness import Predictor
from ..editing.training.kpop import KPOP, METHOD, KPOPOptions, LearnedPrompt, prompt_start
from ..editing.training.mode import gradients
from .train import Course, conduct, encode, latents_for, lines_for

BLOCKS = {"middle": "middle", "middle and up": "middle,output", "all": "all"}


@dataclass(frozen=True)
class KPOPRecipe:
    """What is learned, beside the concepts. width, height: of the pictures, in pixels."""

    neutral: str = "a photo"
    name: str = ""
    width: int = 512
    height: int = 512
    learning_rate: float = KPOPOptions.lr
    prompt_learning_rate: float = KPOPOptions.prompt_lr
    lam: float = KPOPOptions.lam
    prompt_size: int = 10
    mechanism: str = "concat"
    blocks: str = "middle"
    weights: str = "cross-attention"
    rank: int = 0
    guidance: float = KPOPOptions.guidance
    overshoot: float = KPOPOptions.overshoot
    path_steps: int = KPOPOptions.path_steps
    batch_size: int = 1
    seed: int = 0
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
        return {key: value for key, value in asdict(self).items() if key != "name"}


def train_kpop(
    model: Any, clip: Any, text: str, recipe: KPOPRecipe, course: Course
) -> tuple[LoRA, PromptTokens, list[float]]:
    """The weights' changes, the prompt, and the losses. text: what to erase, one concept a line."""
    lines = lines_of(text)
    if not lines:
        raise ValueError("text is empty; write what to erase, one concept a line")
    neutral = lines_for("neutral", recipe.neutral, len(lines), "concepts")
    backbone = fingerprint_of(model, course.node)
    encoded = [encode(clip, line) for line in (*lines, *neutral, "")]
    if len({c.shape[1] for c, _ in encoded}) > 1:
        raise ValueError("text: every concept must fit into one piece of prompt (75 tokens); shorten the longest line")
    settings = {
        **recipe.about,
        "precision": course.precision,
        "concepts": lines,
        "texts": digest(c.float().cpu() for c, _ in encoded)[:20],
    }
    latents = latents_for(model, recipe.batch_size, recipe.width, recipe.height)
    training, losses = conduct(
        "kpop", course, settings, model, encoded, latents, lambda predict: started(predict, recipe)
    )
    made = {**settings, "steps": course.steps}
    name = recipe.name.strip() or lines[0]
    with gradients():
        prompt = training.prompt.result(name, concepts=tuple(lines), backbone=backbone, training=made)
        return LoRA(training.changes.lora(), described(name, backbone, lines, made)), prompt, losses


def started(predict: Predictor, recipe: KPOPRecipe) -> KPOP:
    """Before its first step. The prompts are the concepts, the neutral text of each, and the empty one."""
    *texts, empty = predict.texts
    concepts, neutral = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    start = prompt_start(recipe.prompt_start, recipe.mechanism, recipe.prompt_size, concepts[0].c, recipe.seed)
    return KPOP(
        predict,
        predict.sampling,
        concepts,
        neutral,
        replace(empty, positive=False),
        predict.changes(recipe.weights, recipe.rank, recipe.seed),
        LearnedPrompt(start, recipe.mechanism, recipe.places, recipe.keys_and_values),
        tuple(predict.latents.shape[1:]),
        recipe.options,
    )


def described(name: str, backbone: str, concepts: Sequence[str], training: dict[str, Any]) -> dict[str, str]:
    """What the LoRA's file says about it."""
    return {
        "format": FORMAT,
        "kind": "weights",
        "method": METHOD,
        "name": name,
        "backbone": backbone,
        "concepts": json.dumps(concepts),
        "training": json.dumps(training),
        "version": package_version(),
    }
