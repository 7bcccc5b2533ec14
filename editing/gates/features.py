"""What a discriminator's head looks at: numbers that an encoder finds in a picture.

`Vision` takes any CLIP_VISION that the graph supplies. `DrawingsNetwork` is behind the features that come with the pack
(drawings.py), and learned on drawings.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.digest import Shared, digest

CHANNELS = (3, 32, 64, 128, 64)  # channels between its layers, each of which halves the picture
NETWORK_WIDTH = 64 * 16 + 2 * 128
SIDE = 64  # pixels of the pictures that it takes


def squared(images: Tensor, size: int) -> Tensor:
    """IMAGE [B, h, w, 3 or more] in [0, 1] to what features take: [B, 3, size, size]."""
    x = images[..., :3].movedim(-1, 1).float().cpu()
    if min(x.shape[-2:]) >= size:
        return F.interpolate(x, size=size, mode="area")
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def pattern(size: int) -> Tensor:
    """A fixed picture [1, 3, size, size] that tells encoders apart."""
    ramp = torch.linspace(0, 12, size)
    return 0.5 + 0.5 * torch.stack([ramp.sin()[:, None] * (k * ramp).cos()[None] for k in (1, 2, 3)])[None]


class Features(Protocol):
    """Pictures [B, 3, size, size] in [0, 1] -> [B, width] on the CPU. models: patchers for the host to load along."""

    name: str
    kind: str
    size: int
    models: tuple[Any, ...]

    @property
    def width(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def probe(self) -> Tensor: ...
    def __call__(self, x: Tensor) -> Tensor: ...


class Vision(Shared):
    """The host's CLIP_VISION: CLIP, SigLIP, DINOv2. The picture is squashed to a square, not cropped."""

    kind = "vision"
    name = "the connected CLIP_VISION"

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.size = int(getattr(encoder, "image_size", 224))
        patcher = getattr(encoder, "patcher", None)
        self.models: tuple[Any, ...] = () if patcher is None else (patcher,)

    @cached_property
    def probe(self) -> Tensor:
        """[F], what it makes of the pattern, much the same whatever precision it runs in."""
        return self(pattern(self.size))[0]

    @property
    def width(self) -> int:
        return len(self.probe)

    @cached_property
    def key(self) -> str:
        return digest((self.probe,))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        found = []
        for part in x.split(16):
            output = self.encoder.encode_image(part.movedim(1, -1), crop=False)
            embeds = output["image_embeds"]
            found.append((output["last_hidden_state"].mean(1) if embeds is None else embeds).float().cpu())
        return torch.cat(found)


class DrawingsNetwork(torch.nn.Module):
    """A small convolutional network; pictures [B, 3, SIDE, SIDE] in [0, 1] -> [B, NETWORK_WIDTH].

    Of its last layer every place, of the one before the mean and the greatest over all places.
    """

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(8, o), nn.SiLU()) for i, o in pairwise(CHANNELS)
        )

    def forward(self, x: Tensor) -> Tensor:
        *first, last = self.layers
        for layer in first:
            x = layer(x)
        return torch.cat([last(x).flatten(1), x.mean((2, 3)), x.amax((2, 3))], 1)


def weights_digest(tensors: Mapping[str, Any]) -> str:
    """The same text for the same weights, from a few numbers of each tensor: names no file, and takes no minute."""
    parts: list[object] = []
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        step = max(1, len(flat) // 16)
        parts += [name, tuple(tensors[name].shape), flat[::step][:16].float().cpu()]
    return digest(parts)
