"""Latents to pictures for a discriminator, in the middle of a sampling run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .discriminator import Judge
from .features import weights_digest

Look = Callable[[Tensor, Any], list[float]]  # latents as a VAE decodes them, the model's latent format


def decoder(judge: Judge, vae: Any = None) -> tuple[Look, str, tuple[Any, ...]]:
    """How a gate looks at latents: with the VAE, or with the model's own linear preview; its key; what it loads."""

    def look(latents: Tensor, latent_format: Any) -> list[float]:
        return judge.scores(vae.decode(latents) if vae is not None else preview(latents, latent_format))

    if vae is None:
        return look, f"{judge.key} preview", judge.models
    weights = getattr(vae, "first_stage_model", None)
    patcher = getattr(vae, "patcher", None)
    key = "" if weights is None else weights_digest(weights.state_dict())
    return look, f"{judge.key} vae {key}", (*judge.models, *([] if patcher is None else [patcher]))


def preview(latents: Tensor, latent_format: Any) -> Tensor:
    """The picture that the host shows while it samples, a pixel for each of the latent: [B, h, w, 3] in [0, 1]."""
    factors = latent_format.latent_rgb_factors
    if factors is None or latents.ndim != 4:
        raise ValueError("this model has no fast preview to decode with; connect a VAE to the gate")
    x = latent_format.process_in(latents).movedim(1, -1).float()
    bias = latent_format.latent_rgb_factors_bias
    rgb = x @ torch.tensor(factors).to(x) + (0 if bias is None else torch.tensor(bias).to(x))
    return ((rgb + 1) / 2).clamp(0, 1)
