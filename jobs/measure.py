"""Pictures of many prompts at once, alike for every model that draws them, and how sure a share of them is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from .progress import Progress, silent


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; batch: how many at once."""

    steps: int = 20
    cfg: float = 7.0
    sampler: str = "euler"
    scheduler: str = "normal"
    batch: int = 25


@torch.no_grad()  # else each picture keeps what the VAE's decoder computed for it
def pictures(
    model: Any,
    vae: Any,
    prompts: Sequence[Any],
    negative: Any,
    shape: Sequence[int],
    how: Sampling,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """One picture a prompt, each a CONDITIONING: [n, 3, h, w] in [0, 1]. shape: a latent's; picture i always has noise
    i of the seed, whatever the batch. model: a MODEL, or what makes one for the prompts of a batch."""
    noise = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(seed))
    out = []
    for i in range(0, len(prompts), how.batch):
        progress(i, len(prompts))
        x = noise[i : i + how.batch]
        z = comfy.sample.sample(
            model(prompts[i : i + how.batch]) if callable(model) else model,
            x,
            how.steps,
            how.cfg,
            how.sampler,
            how.scheduler,
            together(prompts[i : i + how.batch]),
            negative,
            torch.zeros_like(x),
            seed=seed,
            disable_pbar=True,
        )
        out.append(vae.decode(z).movedim(-1, 1))
    progress(len(prompts), len(prompts))
    return torch.cat(out)


def together(prompts: Sequence[Any]) -> list[Any]:
    """The first entries of CONDITIONINGs of one length as a single one, a row for each."""
    first = [prompt[0] for prompt in prompts]
    pooled = [about.get("pooled_output") for _, about in first]
    about = {} if any(each is None for each in pooled) else {"pooled_output": torch.cat(pooled)}
    return [[torch.cat([c for c, _ in first]), about]]


@dataclass(frozen=True)
class Rate:
    """hits of n, with Wilson's 95 % interval."""

    hits: int
    n: int

    @classmethod
    def of(cls, results: Sequence[bool]) -> Rate:
        return cls(sum(results), len(results))

    @property
    def value(self) -> float:
        return self.hits / self.n

    @property
    def interval(self) -> tuple[float, float]:
        z, p, n = 1.96, self.value, self.n
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * max(low, 0):.0f}-{100 * high:.0f})".replace(".0 %", " %")

    def json(self) -> dict[str, float]:
        return {"hits": self.hits, "n": self.n, "low": self.interval[0], "high": self.interval[1]}
