"""Heat maps as pictures."""

from __future__ import annotations

import torch
from torch import Tensor

SCALES = ("picture", "batch", "none")
# Black through purple and orange to pale yellow, as plots colour heat: readable in grey, and for the colour-blind.
COLOURS = ((0.0, 0.0, 0.0), (0.34, 0.06, 0.43), (0.73, 0.21, 0.33), (0.98, 0.55, 0.04), (0.99, 1.0, 0.64))


def scaled(heat: Tensor, scale: str) -> Tensor:
    """[images, h, w] from 0 to 1: each "picture" from its least to its greatest, all of the "batch" alike, or as is."""
    if scale != "none":
        over = (1, 2) if scale == "picture" else (0, 1, 2)
        low, high = heat.amin(over, keepdim=True), heat.amax(over, keepdim=True)
        heat = (heat - low) / (high - low).clamp_min(1e-12)
    return heat.clamp(0, 1)


def painted(heat: Tensor, picture: Tensor | None = None) -> Tensor:
    """The heat as colours, over the picture if there is one. heat: [B, h, w] from 0 to 1; picture: [B, h, w, 3]."""
    colours = torch.tensor(COLOURS)
    place = heat.clamp(0, 1) * (len(colours) - 1)
    below = place.floor().long().clamp_max(len(colours) - 2)
    hot = torch.lerp(colours[below], colours[below + 1], (place - below)[..., None])
    if picture is None:
        return hot
    cover = 0.25 + 0.6 * heat[..., None]  # the picture stays visible, most of it where nothing was found
    return torch.lerp(picture[..., :3].float(), hot, cover)
