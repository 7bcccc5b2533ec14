"""Where the noisy pictures of a training come from that needs none of its own: DDIM from noise towards a concept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from .loop import Predict, Sampling, Text, draws, sigma_at

PATHS = ("chain", "fresh")


class Walk(Protocol):
    """How a path is walked: at every step of one picture (chain), or to one step of a new picture each time (fresh)."""

    @property
    def path(self) -> str: ...
    @property
    def path_steps(self) -> int: ...
    @property
    def guidance(self) -> float: ...
    @property
    def batch(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Path:
    """z_t of pictures of `texts`, one drawn at random for each, as the network draws them inside `drawing`.

    z, e_c: [B, 4, h, w]; noise levels (sigma, towards) are in units of the clean latent.
    """

    def __init__(
        self,
        predict: Predict,
        sampling: Sampling,
        texts: Sequence[Text],
        empty: Text,
        shape: Sequence[int],
        o: Walk,
        drawing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.predict, self.sampling, self.o = predict, sampling, o
        self.texts, self.empty, self.drawing = texts, empty.rows(o.batch), drawing
        self.shape = (o.batch, *shape)
        self.z = torch.zeros(self.shape, device=empty.c.device)
        self.clean, self.towards = self.z, 0.0

    def levels(self, generator: torch.Generator) -> list[float]:
        """One noise level from each of n equal intervals of the timesteps, falling, and 0."""
        n = self.o.path_steps
        percents = (torch.arange(n) + torch.rand(n, generator=generator)) / n
        return [*(sigma_at(self.sampling, p) for p in percents.tolist()), 0.0]

    def begin(self, sigma: float, generator: torch.Generator) -> None:
        noise = torch.randn(self.shape, generator=generator).to(self.z)
        s = torch.full((self.o.batch,), sigma, device=noise.device)
        self.z = self.sampling.noise_scaling(s, noise, torch.zeros_like(noise))

    def noisy(self, i: int) -> tuple[Tensor, float, list[int]]:
        """z_t [B, 4, h, w] for iteration i, its noise level, and which of the texts each row is drawn towards."""
        n = self.o.path_steps
        start, j = (i // n * n, i % n) if self.o.path == "chain" else (i, 0)
        generator = draws(self.o.seed, start)
        levels = self.levels(generator)
        which = torch.randint(len(self.texts), (self.o.batch,), generator=generator).tolist()
        if self.o.path == "fresh":
            j = int(torch.randint(n, (), generator=generator))
        if self.o.path == "fresh" or j == 0:
            self.begin(levels[0], generator)
        if self.o.path == "fresh":
            self.walk(levels[: j + 1], self.of(which))
        self.towards = levels[j + 1]
        return self.z, levels[j], which

    def of(self, which: Sequence[int]) -> Text:
        return Text.stack([self.texts[w] for w in which])

    def walk(self, levels: Sequence[float], c: Text) -> None:
        """From the first of the levels to the last."""
        for sigma, towards in zip(levels, levels[1:], strict=False):
            self.z = self.onward(self.z, self.answer(self.z, sigma, c), sigma, towards)

    @torch.no_grad()
    def answer(self, z: Tensor, sigma: float, text: Text) -> Tensor:
        """What the network that draws predicts."""
        with self.drawing():
            return self.predict(z, torch.full((len(z),), sigma, device=z.device), text)[0]

    @torch.no_grad()
    def onward(self, z: Tensor, e_c: Tensor, sigma: float, towards: float) -> Tensor:
        """z after one DDIM step. e_c: eps for the concept at z."""
        e_0 = self.answer(z, sigma, self.empty)
        e = e_0 + self.o.guidance * (e_c - e_0)
        self.clean = z - sigma * e
        return z + (towards - sigma) * e
