"""Features that come with the pack: a small network that learned on drawings, for when no CLIP_VISION is connected."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..edits.digest import Shared
from ..files.artefacts import Artefact, read, write
from .features import SIDE, DrawingsNetwork, pattern, weights_digest


def save(network: DrawingsNetwork, path: Path, training: Mapping[str, Any]) -> None:
    write(Artefact("features", "drawings", network.state_dict(), training=dict(training)), path)


class Drawings(Shared):
    """The network's features. Raises ValueError if its file cannot be used."""

    kind = "drawings"
    name = "the network for drawings that comes with ConceptGuard"
    size = SIDE
    models: tuple[Any, ...] = ()

    def __init__(self, path: Path) -> None:
        self.network = DrawingsNetwork().eval().requires_grad_(False)
        self.network.load_state_dict(dict(read(path, "features").tensors))

    @cached_property
    def probe(self) -> Tensor:
        return self(pattern(SIDE))[0]

    @property
    def width(self) -> int:
        return len(self.probe)

    @cached_property
    def key(self) -> str:
        return weights_digest(self.network.state_dict())

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.network(part) for part in x.split(64)])
