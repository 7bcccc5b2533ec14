"""Where in pictures a concept is found: the model looks at them at a few noise levels, and a Watch at the model.

Noise levels, sigmas: [S], in units of the clean latent.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ..editing.engine.host import add_watch
from ..editing.engine.watch import Watch
from .progress import Progress, silent

EDGES = ("area", "mask", "set_area_to_bounds")  # of a conditioning that serves a part of the picture


def concept_map(
    model: Any,
    watch: Watch,
    positive: list,
    x: Tensor,
    seed: int,
    sigmas: Tensor,
    size: tuple[int, int],
    progress: Progress = silent,
) -> Tensor:
    """The heat of the watch's concept in the pictures x [B, 4, h, w]: [B, *size], unscaled."""
    watched = add_watch(model, watch)
    with closing(watch):
        look(watched, positive, x, seed, sigmas, progress)
        return watch.heat(*size)


def look(model: Any, positive: list, x: Tensor, seed: int, sigmas: Tensor, progress: Progress = silent) -> None:
    """Let the model see the pictures x [B, 4, h, w] at each noise level; its watch remembers."""
    positive = whole_picture(positive)
    noise = comfy.sample.prepare_noise(x, seed)
    # Without guidance the negative prompt is never run; it stands there for what the host reads of it.
    levels = Levels(progress)
    comfy.sample.sample_custom(model, noise, 1.0, levels, sigmas, positive, positive, x, disable_pbar=True, seed=seed)


class Levels(comfy.samplers.Sampler):
    """Not a sampler, but what stands in its place: one model call at each noise level, on the same finished
    pictures [B, 4, h, w]."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    @torch.no_grad()
    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        scale = model_wrap.inner_model.model_sampling.noise_scaling
        for i, sigma in enumerate(sigmas):
            model_wrap(scale(sigma, noise, latent_image), sigma.expand(len(noise)), **extra_args)
            self.progress(i + 1, len(sigmas))
        return latent_image


def noise_levels(model: Any, start: float, end: float, count: int) -> Tensor:
    """The sigmas of `count` percents spread over a window, inside the range that the model knows."""
    sampling = model.get_model_object("model_sampling")
    percents = [start + (end - start) * (i + 0.5) / count for i in range(count)]
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    return torch.tensor([min(max(float(sampling.percent_to_sigma(p)), low), high) for p in percents])


def whole_picture(positive: list) -> list:
    """Conditionings that serve a part alone would be asked about a crop."""
    return [[entry[0], {k: v for k, v in entry[1].items() if k not in EDGES}] for entry in positive]
