"""What the trainings in a graph have in common: the text that a network reads, random numbers, Adam's state as tensors.

Every draw has a generator of its own, made of the seed and the step: a training that goes on from a checkpoint draws
what an uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Patch = Any  # an attn2_patch of the host: (n, context, value, extra) -> the three


@dataclass(frozen=True)
class Text:
    """What a network reads beside the picture. c: [B, T, W]; extra: the rest by name, such as SDXL's y: [B, ...]."""

    c: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, count: int) -> Text:
        """A single text for `count` pictures."""
        return Text(self.c.expand(count, -1, -1), {key: x.expand(count, *x.shape[1:]) for key, x in self.extra.items()})

    @staticmethod
    def stack(texts: Sequence[Text]) -> Text:
        keys = texts[0].extra.keys()
        return Text(torch.cat([t.c for t in texts]), {key: torch.cat([t.extra[key] for t in texts]) for key in keys})


class Predict(Protocol):
    """The network's output (noise or v) in fp32 for noisy latents z [B, 4, h, w] of noise levels sigma [B]."""

    def __call__(self, z: Tensor, sigma: Tensor, text: Text, patch: Patch | None = None) -> Tensor: ...


class Sampling(Protocol):
    """What is needed of the host's model_sampling."""

    def percent_to_sigma(self, percent: float) -> float: ...
    def calculate_denoised(self, sigma: Tensor, output: Tensor, z: Tensor) -> Tensor: ...
    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor: ...


class Training(Protocol):
    """Something that learns step by step, and can be put away and taken up again."""

    def step(self, i: int) -> float:
        """Step i; returns its loss. A step that is interrupted has not been made."""

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up where `state` was put away."""

    def preview(self) -> Tensor | None:
        """A clean latent [4, h, w] that shows how far it is."""


def draws(seed: int, step: int) -> torch.Generator:
    """On the CPU, so that all devices draw alike."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def sigma_at(sampling: Sampling, percent: float) -> float:
    """The noise level of a fraction of the timesteps; the host answers 0 and 1 with numbers beyond its schedule."""
    return sampling.percent_to_sigma(min(max(percent, 5e-4), 1 - 5e-4))


def adam_state(name: str, adam: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's moments, one after the other: {name.m, name.v}: [numbers], and name.t: [1], the steps made."""
    states = [adam.state[p] for p in parameters(adam)]
    if not all(states):  # no step yet
        numbers = sum(p.numel() for p in parameters(adam))
        return {f"{name}.m": torch.zeros(numbers), f"{name}.v": torch.zeros(numbers), f"{name}.t": torch.zeros(1)}
    m, v = (torch.cat([s[key].flatten() for s in states]).cpu() for key in ("exp_avg", "exp_avg_sq"))
    return {f"{name}.m": m, f"{name}.v": v, f"{name}.t": states[0]["step"].reshape(1).float().cpu().clone()}


def restore_adam(name: str, adam: torch.optim.Adam, state: Mapping[str, Tensor]) -> None:
    sizes = [p.numel() for p in parameters(adam)]
    moments = zip(parameters(adam), *(state[f"{name}.{x}"].split(sizes) for x in "mv"), strict=True)
    for p, m, v in moments:
        adam.state[p] = {
            "step": state[f"{name}.t"][0].clone(),
            "exp_avg": m.reshape(p.shape).to(p, copy=True),
            "exp_avg_sq": v.reshape(p.shape).to(p, copy=True),
        }


def parameters(adam: torch.optim.Adam) -> Iterator[nn.Parameter]:
    for group in adam.param_groups:
        yield from group["params"]


def slope(adam: torch.optim.Adam, *losses: Callable[[], Tensor]) -> float:
    """Leave the gradient of the sum of the losses with Adam's parameters; only one graph is in memory at a time."""
    adam.zero_grad(set_to_none=True)
    total, inputs = 0.0, list(parameters(adam))
    for loss in losses:
        value = loss()
        value.backward(inputs=inputs)
        total += value.item()
    return total


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values.reshape(tensor.shape))


def carry_on(training: Training, steps: int, losses: list[float], report: Callable[[int], None]) -> None:
    """From step len(losses) on; each step's loss goes to `losses` before `report` hears of it."""
    for i in range(len(losses), steps):
        loss = training.step(i)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is no number after {i + 1} steps; lower the learning rates, or compute in fp32")
        losses.append(loss)
        report(i + 1)


def take_up(training: Training, state: Mapping[str, Tensor], name: str) -> None:
    """`restore`, after a look at the shapes."""
    wanted = {key: tuple(x.shape) for key, x in training.state().items()}
    if {key: tuple(x.shape) for key, x in state.items()} != wanted:
        raise ValueError(f'the checkpoint "{name}" belongs to another training; delete it, or set resume to off')
    training.restore(state)
