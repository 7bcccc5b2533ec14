"""What looks at a report's pictures: a person's discriminators, with all that their figures need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...editing.edits.digest import digest
from ...editing.gates.classifiers import Classifier
from ...editing.gates.discriminator import Judge
from ...editing.gates.features import weights_digest
from ...editing.gates.packages import NudeNet
from .figures import Scores, exposed
from .prompts import Case

FLAG, EXPOSURE, CLASSES, CLIP_SCORE = "flag", "exposure", "classes", "clip score"


@dataclass(frozen=True)
class Look:
    """see: pictures [B, h, w, 3] in [0, 1] and their cases -> scores of each; flags: whether scores say that what is to
    go is there."""

    name: str
    kind: str
    key: str
    see: Callable[[Tensor, Sequence[Case]], list[Scores]]
    flags: Callable[[Scores], bool]
    labels: int = 1  # that it tells of each picture


def by_judge(judge: Judge, threshold: float = 0.5) -> Look:
    """Any discriminator: one number from 0 to 1. NudeNet is asked for all that it finds, for the exposure rate, and a
    classifier for all of its classes."""
    if isinstance(judge, NudeNet):
        found = judge.found
        return Look(
            judge.name,
            EXPOSURE,
            digest((judge.key, threshold)),
            lambda images, _: found(images),
            lambda scores: exposed(scores, threshold),
        )
    if isinstance(judge, Classifier) and judge.labels:
        return by_chosen(judge, threshold)
    return Look(
        judge.name,
        FLAG,
        digest((judge.key, threshold)),
        lambda images, _: [{judge.name: score} for score in judge.scores(images)],
        lambda scores: any(score >= threshold for score in scores.values()),
    )


def by_chosen(judge: Classifier, threshold: float) -> Look:
    """A classifier of which somebody chose the concept's classes: these flag together, and the figures know all."""
    chosen = [judge.labels[i] for i in judge.chosen]
    return Look(
        judge.name,
        CLASSES,
        digest((judge.key, threshold)),
        lambda images, _: [dict(zip(judge.labels, row, strict=True)) for row in judge.probabilities(images).tolist()],
        lambda scores: sum(scores[label] for label in chosen) >= threshold,
        len(judge.labels),
    )


def by_classes(
    name: str, key: str, labels: Sequence[str], probabilities: Callable[[Tensor], Tensor], gone: frozenset[str]
) -> Look:
    """A classifier of all classes; its surest one flags a picture if it is among those that are to go."""
    wanted = {label.casefold() for label in gone}

    def see(images: Tensor, _: Sequence[Case]) -> list[Scores]:
        return [dict(zip(labels, row, strict=True)) for row in probabilities(images).tolist()]

    def flags(scores: Scores) -> bool:
        return max(scores, key=lambda label: scores[label]).casefold() in wanted

    return Look(name, CLASSES, digest((key, *labels, *sorted(wanted))), see, flags, len(labels))


def clip_score(folder: Path) -> Look:
    """100 max(cos, 0) of a picture's embedding and its prompt's (Hessel et al. 2021), as torchmetrics has it.

    folder: a CLIP model in transformers' form, such as openai/clip-vit-base-patch32, with safetensors. It never flags.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'"{folder.name}" is no CLIP model for the CLIP score ({str(error)[:200]}); give a folder with '
            "config.json, model.safetensors, the tokenizer's and the preprocessor's files"
        ) from None

    @torch.no_grad()
    def see(images: Tensor, cases: Sequence[Case]) -> list[Scores]:
        pixels = [(image[..., :3].clamp(0, 1) * 255).round().byte().numpy() for image in images]
        given = processor(
            text=[case.prompt for case in cases], images=pixels, return_tensors="pt", padding=True, truncation=True
        )
        out = model(**given)
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        return [{"score": value} for value in (100 * cosine.clamp_min(0)).tolist()]

    return Look("CLIP score", CLIP_SCORE, weights_digest(model.state_dict()), see, lambda _: False)
