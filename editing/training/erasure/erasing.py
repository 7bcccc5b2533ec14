"""The training of any of the methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..changes import Changes
from ..loop import Sampling, Text, draws, learned_state, parameters, restore_learned, sigma_at, slope
from ..path import Path
from .moment import Method, Moment, Watched


@dataclass(frozen=True)
class ErasureOptions:
    """pictures: how many are drawn for a source of finished ones, at the first step that needs each."""

    lr: float = 1e-4
    eta: float = 1.0
    guidance: float = 3.0
    path: str = "chain"
    path_steps: int = 50
    pictures: int = 50
    batch: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Texts:
    """Of one row each: the concept's phrasings, for each what it is to become, and the empty prompt; said: for each
    phrasing the positions that say it."""

    concept: Sequence[Text]
    guide: Sequence[Text]
    empty: Text
    said: Sequence[Sequence[int]]


class Source(Protocol):
    """Noisy pictures."""

    def noisy(self, i: int) -> tuple[Tensor, Tensor, list[int]]:
        """z_t [B, 4, h, w] of step i, its noise levels [B], and of which phrasing each is."""

    def after(self) -> Tensor:
        """What `z` is for the next step."""

    z: Tensor  # what a step leaves to the next one: [B, 4, h, w], or nothing, [0]


class Drawing:
    """Of a picture of the concept that is being drawn, z: [B, 4, h, w]."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def z(self) -> Tensor:
        return self.path.z

    @z.setter
    def z(self, value: Tensor) -> None:
        self.path.z = value

    def noisy(self, i: int) -> tuple[Tensor, Tensor, list[int]]:
        z, self.level, self.which = self.path.noisy(i)
        return z, torch.full((len(z),), self.level, device=z.device), self.which

    def after(self) -> Tensor:
        path = self.path
        if path.o.path == "fresh":
            return path.z
        return path.onward(path.z, path.answer(path.z, self.level, path.of(self.which)), self.level, path.towards)


class Drawn:
    """Of finished pictures, each drawn when it is first wanted, and noise."""

    def __init__(self, path: Path, options: ErasureOptions) -> None:
        self.path, self.o = path, options
        self.drawn: dict[int, Tensor] = {}
        self.z = torch.zeros(0)

    def noisy(self, i: int) -> tuple[Tensor, Tensor, list[int]]:
        generator, B = draws(self.o.seed, i), self.o.batch
        which = torch.randint(self.o.pictures, (B,), generator=generator).tolist()
        percents = (torch.arange(B) + torch.rand(B, generator=generator)) / B  # one from each part of the timesteps
        latents = torch.cat([self.picture(k) for k in which])
        eps = torch.randn(latents.shape, generator=generator).to(latents)
        sigma = torch.tensor([sigma_at(self.path.sampling, p) for p in percents.tolist()], device=eps.device)
        z = self.path.sampling.noise_scaling(sigma, eps, latents)
        return z, sigma, [k % len(self.path.texts) for k in which]

    def picture(self, k: int) -> Tensor:
        """[1, 4, h, w], of the phrasings in turn."""
        if k not in self.drawn:
            generator = draws(self.o.seed, -1 - k)
            levels = self.path.levels(generator)
            self.path.begin(levels[0], generator)
            self.path.walk(levels, self.path.texts[k % len(self.path.texts)])
            self.drawn[k] = self.path.z
        return self.drawn[k]

    def after(self) -> Tensor:
        return self.z


class Average:
    """Of the changes over the training's steps, m of it the past; in the first steps less, as is usual (INF).

    flat: all of them, [numbers].
    """

    def __init__(self, changes: Changes, m: float) -> None:
        self.m, self.learned = m, list(changes.tensors.values())
        self.values = [p.detach().clone() for p in self.learned]

    @torch.no_grad()
    def add(self, i: int) -> None:
        m = min(self.m, (1 + i) / (10 + i))
        for value, p in zip(self.values, self.learned, strict=True):
            value.lerp_(p, 1 - m)

    @contextmanager
    def on(self) -> Iterator[None]:
        """The changes are their average. Not between a prediction and its backward pass."""
        kept = [p.data for p in self.learned]
        for value, p in zip(self.values, self.learned, strict=True):
            p.data = value
        try:
            yield
        finally:
            for own, p in zip(kept, self.learned, strict=True):
                p.data = own

    @property
    def flat(self) -> Tensor:
        return torch.cat([value.flatten() for value in self.values]).to("cpu", copy=True)

    @flat.setter
    def flat(self, numbers: Tensor) -> None:
        parts = numbers.split([value.numel() for value in self.values])
        for value, part in zip(self.values, parts, strict=True):
            value.copy_(part.reshape(value.shape))


class Erasing:
    """theta' is trained until it no longer knows the concept; what it has learned is in `changes`."""

    def __init__(
        self,
        predict: Watched,
        sampling: Sampling,
        texts: Texts,
        changes: Changes,
        method: Method,
        shape: Sequence[int],
        options: ErasureOptions,
    ) -> None:
        self.predict, self.texts, self.changes = predict, texts, changes
        self.method, self.options = method, options
        self.adam = torch.optim.Adam(changes.tensors.values(), lr=options.lr)
        self.average = Average(changes, method.average) if method.average else None
        self.source = self.sourced(sampling, shape)
        self.clean: Tensor | None = None

    def sourced(self, sampling: Sampling, shape: Sequence[int]) -> Source:
        texts, o = self.texts, self.options

        def path(of: Sequence[Text], batch: int, *drawing: Callable[[], AbstractContextManager[None]]) -> Path:
            return Path(self.predict, sampling, of, texts.empty, shape, replace(o, batch=batch), *drawing)

        if self.method.source == "path":
            return Drawing(path(texts.concept, o.batch, *([self.average.on] if self.average else [])))
        of = texts.guide if self.method.source == "of the guide" else texts.concept
        return Drawn(path(of, 1, self.changes.off), o)

    def step(self, i: int) -> float:
        at = self.moment(i)
        loss = slope(self.adam, lambda: self.method.loss(at))
        onward = self.source.after()
        for p in parameters(self.adam):  # one that has no part in the loss: Adam is to count its steps all the same
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.adam.step()
        if self.average:
            self.average.add(i)
        self.source.z, self.clean = onward, at.clean
        return loss

    def moment(self, i: int) -> Moment:
        z, sigma, which = self.source.noisy(i)
        c, guide = (Text.stack([texts[w] for w in which]) for texts in (self.texts.concept, self.texts.guide))
        empty, said = self.texts.empty.rows(len(which)), [self.texts.said[w] for w in which]
        return Moment(self.predict, self.changes, z, sigma, c, guide, empty, said, self.options.eta)

    def state(self) -> dict[str, Tensor]:
        averaged = {"average": self.average.flat} if self.average else {}
        drawing = {"z": self.source.z.flatten().to("cpu", copy=True)} if len(self.source.z) else {}
        return learned_state("weights", self.adam) | averaged | drawing

    def restore(self, state: Mapping[str, Tensor]) -> None:
        restore_learned("weights", self.adam, state)
        if self.average:
            self.average.flat = state["average"]
        if "z" in state:
            self.source.z = state["z"].reshape(self.source.z.shape).to(self.source.z, copy=True)

    def preview(self) -> Tensor | None:
        return self.clean

    def lora(self) -> dict[str, Tensor]:
        """What the host's LoraLoader reads."""
        if self.average is None:
            return self.changes.lora()
        with self.average.on():
            return self.changes.lora()
