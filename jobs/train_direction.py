"""A direction of the text encoding, away from a concept or towards it."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch

from ..editing.edits.spec import Concept, Direction
from ..editing.engine.host import fingerprint_of
from ..editing.methods.safe_region import direction_of
from ..editing.training.direction import LearnedDirection, Settings, about
from ..editing.training.harness import Predictor
from ..editing.training.mode import gradients
from .train import Course, conduct, encode


def train_direction(
    model: Any, clip: Any, concept: Concept, settings: Settings, course: Course, begun: Direction | None = None
) -> tuple[Direction, list[float]]:
    """The direction and the losses; `begun` was learned with the same settings in fewer steps."""
    backbone = fingerprint_of(model, course.node)
    positive = [encode(clip, prompt) for prompt in settings.prompts]
    if positive[0][0].shape[-1] != concept.width:
        raise ValueError("concept and clip are of different text encoders; make the concept with this clip")
    if begun is not None and (not isinstance(begun, Direction) or begun.artefact is None):
        raise ValueError("resume is no learned direction; connect what Load Direction or Train Direction gives")
    held = None if begun is None else begun.artefact
    before = held.tensors["losses"].tolist() if held is not None and "losses" in held.tensors else []

    def make(predict: Predictor) -> LearnedDirection:
        sigmas = comfy.samplers.calculate_sigmas(predict.sampling, settings.scheduler, settings.sampling_steps)
        start, end = (
            float(predict.sampling.percent_to_sigma(p)) for p in (settings.start_percent, settings.end_percent)
        )
        active = [end < float(sigma) <= start for sigma in sigmas[:-1]]
        return LearnedDirection(predict, predict.texts, sigmas, active, concept, settings, held)

    training, losses = conduct(
        "direction", course, about(concept, settings), model, positive, torch.zeros(settings.shape), make, before
    )
    with gradients():  # so that more can be learned through a model that it edits
        return direction_of(training.artefact(losses, backbone)), losses
