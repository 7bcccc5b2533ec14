"""What every training of the demo's networks shares: a loop that saves checkpoints, and goes on from the last one as if
never stopped."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..editing.files.whole import whole

EVERY = 100  # steps from one checkpoint to the next
SHOWN = 50  # steps from one line of the log to the next


def device() -> torch.device:
    """Where networks, latents and random numbers are: torch's default device (`make train-demo ARGS=--device=cuda`)."""
    return torch.get_default_device()


class Training(Protocol):
    step: int
    steps: int

    def update(self) -> Tensor: ...

    def state(self) -> dict[str, Any]: ...

    def resume(self, state: dict[str, Any]) -> None: ...


def saved(path: Path, value: Any) -> Any:
    with whole(path) as part:
        torch.save(value, part)
    return value


def run(training: Training, checkpoint: Path) -> None:
    """To the last step, from the checkpoint if there is one."""
    if checkpoint.exists():
        training.resume(torch.load(checkpoint, weights_only=True, map_location="cpu"))
    start, first, mean = time.time(), training.step, None
    while training.step < training.steps:
        loss = training.update()
        mean = loss if mean is None else torch.lerp(mean, loss, 0.01)
        if training.step % SHOWN == 0 or training.step == training.steps:  # reading a loss waits for a GPU
            if not math.isfinite(shown := mean.item()):
                raise RuntimeError(f"{checkpoint.stem}: the loss is {shown} at step {training.step}")
            pace = (time.time() - start) / (training.step - first)
            print(f"{checkpoint.stem} {training.step}/{training.steps} loss {shown:.4f} {pace:.2f} s/step", flush=True)
        if training.step % EVERY == 0 or training.step == training.steps:
            saved(checkpoint, training.state())


def cosine(step: int, steps: int, peak: float) -> float:
    """A learning rate that rises over the first twentieth of the steps and falls along a cosine to its thousandth."""
    return peak * min((step + 1) / (0.05 * steps), 0.5005 + 0.4995 * math.cos(math.pi * min(step / steps, 1.0)))


def step_with(opt: torch.optim.Optimizer, lr: float) -> None:
    """One step of the optimiser at a learning rate, and its gradients forgotten."""
    for group in opt.param_groups:
        group["lr"] = lr
    opt.step()
    opt.zero_grad()


def dice(rng: random.Random) -> dict[str, Any]:
    """Where the random numbers stand: Python's of a training, and torch's."""
    return {"drawings": rng.getstate()} | numbers()


def numbers() -> dict[str, Tensor]:
    """Where torch's random numbers stand, on the processor and where the training computes."""
    return {"rng": torch.get_rng_state()} | ({"gpu": torch.cuda.get_rng_state()} if device().type == "cuda" else {})


def renumber(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["rng"])
    if "gpu" in state and device().type == "cuda":
        torch.cuda.set_rng_state(state["gpu"])


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A stored average where the training computes."""
    return {k: v.to(device()) for k, v in state.items()}


def throw(state: dict[str, Any], rng: random.Random) -> None:
    version, drawn, gauss = state["drawings"]
    rng.setstate((version, tuple(drawn), gauss))
    renumber(state)
