"""Train a demo transformer by flow matching, on the painted world's latents and the text encoder of the demo UNet."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from . import model, world
from .train_unet import Captions, TextEncoder, learning_rate
from .training import averaged, device, dice, step_with, throw
from .transformers import SHIFT, build, flow, initialise

BATCH, PEAK = 24, 1e-3
NO_WORDS, NO_POOLED = 0.1, 0.4  # the shares of samples without a caption, and without the pooled text
EVERY = 4  # steps between two looks of the average
READERS = ("text.", "reference.")


def readers(weights: dict[str, Tensor], used: list[int]) -> tuple[TextEncoder, model.ReferenceEncoder]:
    """The text and reference encoders of a UNet's training (its averaged weights), which learn no more."""
    text, reference = TextEncoder(used), model.ReferenceEncoder()
    own = {k: v for k, v in weights.items() if k.startswith(READERS)}
    nn.ModuleDict({"text": text, "reference": reference}).load_state_dict(own)
    return text.requires_grad_(False).eval(), reference.requires_grad_(False).eval()


def pooled(ids: Tensor, context: Tensor) -> Tensor:
    """CLIP's pooled text: the encoding [b, 77, W] at the first end of each prompt, [b, W]."""
    return context[torch.arange(len(ids)), (ids == model.END).int().argmax(1)]


def times(count: int) -> Tensor:
    """Times of the flow in (0, 1), as the sampler's schedule spreads them."""
    u = torch.rand(count)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


class FlowTrainer:
    """The network, the average of its weights, and what it reads."""

    def __init__(
        self,
        architecture: str,
        pictures: list[world.Picture],
        data: dict[str, Tensor],
        read_by: tuple[TextEncoder, model.ReferenceEncoder],
        tokenize: Any,
        steps: int,
        seed: int = 0,
        batch: int = BATCH,
    ) -> None:
        torch.manual_seed(seed)
        self.batch = batch
        self.architecture, self.steps, self.step, self.rng = architecture, steps, 0, random.Random(seed)
        self.latents, self.captions = data["latents"].to(device()), Captions(pictures, data["references"], tokenize)
        self.text, self.reference = read_by
        self.net = build(architecture)
        initialise(self.net)
        self.net.requires_grad_(True)
        self.average = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        self.opt = torch.optim.AdamW(self.net.parameters(), lr=PEAK, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)

    def loss(self) -> Tensor:
        """||flow - (noise - picture)||^2 at picture + t (noise - picture)."""
        with torch.no_grad():
            i, ids, context, _, _ = self.captions.batch(self.text, self.reference, self.batch, NO_WORDS)
            y = pooled(ids, context) * (torch.rand(self.batch, 1) >= NO_POOLED)
        x, noise, t = self.latents[i].float(), torch.randn(self.batch, *self.latents.shape[1:]), times(self.batch)
        at = t.view(-1, 1, 1, 1)
        with torch.autocast(device().type, torch.bfloat16):
            found = flow(self.architecture, self.net, (1 - at) * x + at * noise, t, context, y)
        return (found.float() - (noise - x)).square().mean()

    def update(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0, foreach=True)
        step_with(self.opt, learning_rate(self.step, self.steps, PEAK))
        self.step += 1
        if self.step % EVERY == 0:
            now = self.net.state_dict()
            keep = min(0.99, self.step / (self.step + 200))
            torch._foreach_lerp_(list(self.average.values()), [now[k] for k in self.average], 1 - keep)
        return loss.detach()

    def state(self) -> dict[str, Any]:
        return dice(self.rng) | {
            "step": self.step,
            "net": self.net.state_dict(),
            "average": self.average,
            "opt": self.opt.state_dict(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        self.step, self.average = state["step"], averaged(state["average"])
        self.net.load_state_dict(state["net"])
        self.opt.load_state_dict(state["opt"])
        throw(state, self.rng)
