"""A concept from pictures."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..editing.edits.digest import digest
from ..editing.edits.encode import CONTEXT, own_tokens
from ..editing.engine.host import fingerprint_of
from ..editing.files.artefacts import Artefact
from ..editing.training.harness import Predictor
from ..editing.training.mode import gradients
from ..editing.training.textual_inversion import ConceptOptions, LearnedTokens, tokens_start
from .train import CELL, Course, conduct, encode, lines_for


def learn_concept(
    model: Any,
    clip: Any,
    vae: Any,
    images: Tensor,
    name: str,
    options: ConceptOptions,
    course: Course,
    captions: str = "",
    start_from: str = "",
) -> tuple[Artefact, list[float]]:
    """The learned concept as its file holds it, and the losses. images: [P, h, w, 3] in [0, 1]; captions: a line for
    each of them or one for all; start_from: words."""
    backbone, pixels = fingerprint_of(model, course.node), checked(images)
    lines, start_from = lines_for("captions", captions, len(pixels), "pictures"), start_from.strip()
    with torch.no_grad():
        latents = vae.encode(pixels)
    prompts = list(dict.fromkeys(("", start_from, *lines)))
    encoded = [encode(clip, prompt) for prompt in prompts]
    places = [place(clip, line, encoded[prompts.index(line)][0].shape[1], options.tokens) for line in lines]
    scaled = model.model.process_latent_in(latents.to(model.load_device, torch.float32, copy=True))
    settings = {
        **asdict(options),
        "captions": lines,
        "start_from": start_from,
        "precision": course.precision,
        "pictures": digest([scaled.cpu()])[:20],
    }

    def make(predict: Predictor) -> LearnedTokens:
        texts = dict(zip(prompts, predict.texts, strict=True))
        like = texts[start_from].c[0, list(own_tokens(clip, start_from))]
        start = tokens_start(options, texts[""].c, like)
        of = [texts[line] for line in lines]
        return LearnedTokens(predict, predict.sampling, predict.latents, of, places, start, options)

    training, losses = conduct("concept", course, settings, model, encoded, latents, make)
    empty = encoded[prompts.index("")][0]
    about = {"concepts": (name,), "backbone": backbone, "training": {**settings, "steps": course.steps}}
    with gradients():
        return training.artefact(name, empty, **about), losses


def checked(images: Any) -> Tensor:
    """Pixels [n, h, w, 3], cut to whole latents."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or not 1 <= len(images) <= 8:
        count = len(images) if isinstance(images, torch.Tensor) else "no"
        raise ValueError(f"images holds {count} pictures; connect 1 to 8 of one size")
    height, width = (size // CELL * CELL for size in images.shape[1:3])
    if min(height, width) < 16:
        raise ValueError(
            f"images are of {images.shape[2]}x{images.shape[1]} pixels, too small to learn from; scale "
            "them to the model's own size"
        )
    return images[:, :height, :width, :3].float().clone()


def place(clip: Any, caption: str, length: int, tokens: int) -> int:
    """The first position behind a caption's own tokens, where the learned ones go."""
    at = max(own_tokens(clip, caption), default=0) + 1
    if length > CONTEXT or at + tokens >= length:
        raise ValueError(
            f'captions: "{caption[:60]}" leaves no room for {tokens} tokens in one piece of prompt; shorten it'
        )
    return at
