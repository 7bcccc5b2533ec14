"""What all trainings have in common: what they ask of the model, random numbers, steps, and the state between two.

Every draw has a generator of its own, made of the seed and the step: a training that goes on from a checkpoint draws
what an uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Patch = Any  # an attn2_patch of the host: (n, context, value, extra) -> the three


@dataclass(frozen=True)
class Text:
    """What the model reads beside the picture, B rows. c: [B, T, W].

    of: for each row the prompt, by its place among those that the model was given, whose other conditions (SDXL's
    pooled text) go with c. positive: whether the MODEL's own edits apply, as they do to the host's positive prompt.
    """

    c: Tensor
    of: tuple[int, ...] = (0,)
    positive: bool = True

    def rows(self, count: int) -> Text:
        """A single text for `count` pictures."""
        return Text(self.c.expand(count, -1, -1), self.of * count, self.positive)

    @staticmethod
    def stack(texts: Sequence[Text]) -> Text:
        """Shorter ones are repeated, as the host does."""
        longest = max(text.c.shape[1] for text in texts)
        if any(longest % text.c.shape[1] for text in texts):
            raise ValueError(
                f"the prompts are of {sorted({text.c.shape[1] for text in texts})} tokens, which cannot share a "
                "batch; use a batch of 1, or prompts of one length"
            )
        c = torch.cat([text.c.repeat(1, longest // text.c.shape[1], 1) for text in texts])
        return Text(c, tuple(i for text in texts for i in text.of), texts[0].positive)


class Predict(Protocol):
    """eps(z, c) for each of the texts, in fp32, [B, 4, h, w]: noisy latents z of noise levels sigma [B], on the
    schedule of the model (sigma in units of the clean latent). Only the first text may be positive."""

    def __call__(self, z: Tensor, sigma: Tensor, *texts: Text, patch: Patch | None = None) -> list[Tensor]: ...


class Sampling(Protocol):
    """What is needed of the host's model_sampling. sigma: [B], in units of the clean latent; latents [B, 4, h, w]."""

    def percent_to_sigma(self, percent: float) -> float: ...
    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor: ...


class Training(Protocol):
    """Something that learns step by step, and can be put away and taken up again."""

    def step(self, i: int) -> float:
        """Step i; returns its loss. A step that is interrupted has not been made."""

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, flat: [numbers] each."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up where `state` was put away."""

    def preview(self) -> Tensor | None:
        """Clean latents [n, 4, h, w] that show how far it is."""


class Diverged(ValueError):
    """A loss or a gradient is no number any more."""


def draws(seed: int, step: int | None = None) -> torch.Generator:
    """Of a step's random numbers, or of what a training starts from; on the CPU, so that all devices draw alike."""
    return torch.Generator().manual_seed((seed if step is None else seed * 1_000_003 + step) % 2**63)


def sigma_at(sampling: Sampling, percent: float) -> float:
    """The noise level of a fraction of the timesteps; the host answers 0 and 1 with numbers beyond its schedule."""
    return sampling.percent_to_sigma(min(max(percent, 5e-4), 1 - 5e-4))


def learned_state(name: str, adam: torch.optim.Adam) -> dict[str, Tensor]:
    """What Adam learns and its moments, one after the other: {name, name.m, name.v}: [numbers]; name.t: [1], steps."""
    values = torch.cat([p.detach().flatten() for p in parameters(adam)]).cpu()
    states = [adam.state[p] for p in parameters(adam)]
    if not all(states):  # no step yet
        zeros = torch.zeros_like(values)
        return {name: values, f"{name}.m": zeros, f"{name}.v": zeros, f"{name}.t": torch.zeros(1)}
    m, v = (torch.cat([s[key].flatten() for s in states]).cpu() for key in ("exp_avg", "exp_avg_sq"))
    return {
        name: values,
        f"{name}.m": m,
        f"{name}.v": v,
        f"{name}.t": states[0]["step"].reshape(1).float().cpu().clone(),
    }


@torch.no_grad()
def restore_learned(name: str, adam: torch.optim.Adam, state: Mapping[str, Tensor]) -> None:
    sizes = [p.numel() for p in parameters(adam)]
    parts = zip(parameters(adam), *(state[key].split(sizes) for key in (name, f"{name}.m", f"{name}.v")), strict=True)
    for p, value, m, v in parts:
        p.copy_(value.reshape(p.shape))
        adam.state[p] = {
            "step": state[f"{name}.t"][0].clone(),
            "exp_avg": m.reshape(p.shape).to(p, copy=True),
            "exp_avg_sq": v.reshape(p.shape).to(p, copy=True),
        }


def parameters(adam: torch.optim.Adam) -> Iterator[Tensor]:
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
    if not math.isfinite(total) or not all(p.grad is None or p.grad.isfinite().all() for p in inputs):
        raise Diverged
    return total


def carry_on(training: Training, steps: int, losses: list[float], report: Callable[[int], None]) -> None:
    """From step len(losses) on; each step's loss goes to `losses` before `report` hears of it."""
    for i in range(len(losses), steps):
        try:
            losses.append(training.step(i))
        except Diverged:
            raise Diverged(
                f"the loss or its gradient is no number after {i + 1} steps; lower the learning rate, or compute "
                "in fp32"
            ) from None
        report(i + 1)


def take_up(training: Training, state: Mapping[str, Tensor], name: str) -> None:
    """`restore`, after a look at the shapes."""
    wanted = {key: tuple(x.shape) for key, x in training.state().items()}
    if {key: tuple(x.shape) for key, x in state.items()} != wanted:
        raise ValueError(f'the checkpoint "{name}" belongs to another training; delete it, or set resume to off')
    training.restore(state)
