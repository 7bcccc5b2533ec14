"""A network of one layer for trainings, small enough to be written down again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """A module whose weight the host would change through its weight_function."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator), requires_grad=False)
        self.bias = None
        self.weight_function: list[Any] = []

    def forward(self, c: Tensor) -> Tensor:
        w = self.weight
        for change in self.weight_function:
            w = change(w)
        return c @ w.T


class Line:
    """A schedule in which nothing is hidden."""

    def percent_to_sigma(self, percent: float) -> float:
        return 10 * (1 - percent)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        return latent + sigma[:, None, None, None] * noise


def respond(features: Tensor, z: Tensor) -> Tensor:
    """Some output [B, 4, 2, 2] that depends on both. features: [B, T, 4]."""
    return torch.tanh(features.mean(1)[:, :, None, None] * (1 + 0.1 * z)) + 0.05 * z
