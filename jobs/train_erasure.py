"""Concepts erased from the weights of a MODEL by other papers' trainings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ..editing.edits.digest import digest
from ..editing.edits.spec import Concept
from ..editing.engine.host import fingerprint_of
from ..editing.files.artefacts import FORMAT, package_version
from ..editing.training.changes import LoRA
from ..editing.training.erasure import METHODS
from ..editing.training.erasure.erasing import Erasing, ErasureOptions, Texts
from ..editing.training.harness import Predictor
from ..editing.training.loop import Text
from ..editing.training.mode import gradients
from .train import Course, conduct, encode, latents_for, lines_for


@dataclass(frozen=True)
class ErasureRecipe:
    """What is learned, beside the concept. neutral: what its phrasings are to become, a line for each or one for all;
    empty: what the concept says to draw instead, or the empty prompt. width, height: of the pictures, in pixels."""

    method: str = "ESD-x"
    neutral: str = ""
    width: int = 512
    height: int = 512
    learning_rate: float = ErasureOptions.lr
    rank: int = 16
    eta: float = ErasureOptions.eta
    guidance: float = ErasureOptions.guidance
    path_steps: int = ErasureOptions.path_steps
    pictures: int = ErasureOptions.pictures
    batch_size: int = ErasureOptions.batch
    seed: int = 0
    path: str = ErasureOptions.path

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}")

    @property
    def options(self) -> ErasureOptions:
        return ErasureOptions(
            self.learning_rate,
            self.eta,
            self.guidance,
            self.path,
            self.path_steps,
            self.pictures,
            self.batch_size,
            self.seed,
        )


def train_erasure(
    model: Any, clip: Any, concept: Concept, recipe: ErasureRecipe, course: Course
) -> tuple[LoRA, list[float]]:
    """The weights' changes and the losses."""
    backbone = fingerprint_of(model, course.node)
    guides = lines_for("neutral", recipe.neutral, len(concept.phrases), "phrasings of the concept")
    prompts = list(dict.fromkeys(("", *(phrase.text for phrase in concept.phrases), *guides)))
    encoded = [encode(clip, prompt) for prompt in prompts]
    if encoded[0][0].shape[-1] != concept.width:
        raise ValueError("concept and clip are of different text encoders; make the concept with this clip")
    if len({tokens.shape[1] for tokens in (*(c for c, _ in encoded), *(p.tokens for p in concept.phrases))}) > 1:
        raise ValueError("concept: all texts must fit into one piece of prompt (75 tokens); shorten the longest")
    settings = {
        **asdict(recipe),
        "precision": course.precision,
        "concept": concept.key,
        "texts": digest(c.float().cpu() for c, _ in encoded)[:20],
    }
    latents = latents_for(model, recipe.batch_size, recipe.width, recipe.height)
    training, losses = conduct(
        "erasure",
        course,
        settings,
        model,
        encoded,
        latents,
        lambda predict: started(predict, concept, guides, prompts, recipe),
    )
    with gradients():
        return LoRA(training.lora(), described(concept, recipe, backbone, course.steps)), losses


def started(
    predict: Predictor, concept: Concept, guides: list[str], prompts: list[str], recipe: ErasureRecipe
) -> Erasing:
    """Before its first step. prompts: what the predictor's texts say, the empty one first."""
    method, by_prompt = METHODS[recipe.method], dict(zip(prompts, predict.texts, strict=True))
    empty = by_prompt[""]
    instead = empty if concept.instead is None else Text(concept.instead.to(predict.device), empty.of)
    texts = Texts(
        [Text(phrase.tokens.to(predict.device), by_prompt[phrase.text].of) for phrase in concept.phrases],
        [by_prompt[guide] if guide else instead for guide in guides],
        Text(empty.c, empty.of, positive=False),
        [sorted({*phrase.own, min(phrase.own[-1] + 1, phrase.tokens.shape[1] - 1)}) for phrase in concept.phrases],
    )
    changes = predict.changes(method.weights, recipe.rank, recipe.seed)
    shape = tuple(predict.latents.shape[1:])
    return Erasing(predict, predict.sampling, texts, changes, method, shape, recipe.options)


def described(concept: Concept, recipe: ErasureRecipe, backbone: str, steps: int) -> dict[str, str]:
    """What the LoRA's file says about it."""
    return {
        "format": FORMAT,
        "kind": "weights",
        "method": recipe.method,
        "name": concept.name,
        "backbone": backbone,
        "concepts": json.dumps([phrase.text for phrase in concept.phrases]),
        "training": json.dumps({**asdict(recipe), "steps": steps}),
        "version": package_version(),
    }
