"""What happens to pictures on their way to a discriminator: blur, crop, exposure, saturation, a photograph of a screen.

The complex scenarios of the CRE paper (section 4.4). All drawn from one generator: the same seed spoils alike. x is
[B, 3, h, w] in [0, 1], and so is what comes back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

LUMA = (0.299, 0.587, 0.114)


def uniform(rng: Generator, batch: int, low: float, high: float) -> Tensor:
    """[batch, 1, 1, 1]"""
    return low + (high - low) * torch.rand(batch, 1, 1, 1, generator=rng)


def blur(x: Tensor, rng: Generator) -> Tensor:
    """Scaled down, for the whole batch to between a fifth and all of its size, and up again."""
    size = x.shape[-1]
    small = max(4, int(size * float(uniform(rng, 1, 0.2, 1.0))))
    x = F.interpolate(x, size=small, mode="area")
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def crop(x: Tensor, rng: Generator) -> Tensor:
    """Turned, mirrored, scaled, shifted, and seen from the side as a photograph of a screen is; the border repeats."""
    b, _, h, w = x.shape
    turn, zoom = uniform(rng, b, -0.2, 0.2)[:, 0, 0, 0], uniform(rng, b, 0.75, 1.15)[:, 0, 0, 0]
    mirror = torch.where(uniform(rng, b, 0, 1)[:, 0, 0, 0] < 0.5, -1.0, 1.0)
    homography = torch.zeros(b, 3, 3)
    homography[:, 0, 0], homography[:, 0, 1] = turn.cos() * zoom * mirror, -turn.sin() * zoom
    homography[:, 1, 0], homography[:, 1, 1] = turn.sin() * zoom * mirror, turn.cos() * zoom
    homography[:, :2, 2] = uniform(rng, 2 * b, -0.12, 0.12).view(b, 2)
    homography[:, 2, :2] = uniform(rng, 2 * b, -0.15, 0.15).view(b, 2)
    homography[:, 2, 2] = 1
    v, u = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    seen = torch.stack([u, v, torch.ones_like(u)], -1).view(1, -1, 3) @ homography.mT
    grid = (seen[..., :2] / seen[..., 2:]).view(b, h, w, 2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def light(x: Tensor, rng: Generator) -> Tensor:
    """Saturation, contrast, and exposure up to where bright parts burn out."""
    b = len(x)
    grey = (x * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    x = grey + (x - grey) * uniform(rng, b, 0.4, 1.6)
    x = 0.5 + (x - 0.5) * uniform(rng, b, 0.75, 1.25)
    return (x * uniform(rng, b, 0.75, 1.5)).clamp(0, 1)


def grain(x: Tensor, rng: Generator) -> Tensor:
    noise = torch.randn(x.shape, generator=rng)
    return (x + uniform(rng, len(x), 0, 0.06) * noise).clamp(0, 1)


def perturbed(x: Tensor, rng: Generator) -> Tensor:
    """Pictures [B, 3, h, w] in [0, 1], each spoiled in all of these ways by chance."""
    return grain(light(crop(blur(x, rng), rng), rng), rng)
