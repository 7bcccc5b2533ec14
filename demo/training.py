"""What every training of the demo's networks shares: a loop that saves checkpoints, and goes on from the last one as if
never stopped."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from ..editing.files.whole import whole

EVERY = 100  # steps from one checkpoint to the next


class Training(Protocol):
    step: int
    steps: int

    def update(self) -> float: ...

    def state(self) -> dict[str, Any]: ...

    def resume(self, state: dict[str, Any]) -> None: ...


def saved(path: Path, value: Any) -> Any:
    with whole(path) as part:
        torch.save(value, part)
    return value


def run(training: Training, checkpoint: Path) -> None:
    """To the last step, from the checkpoint if there is one."""
    if checkpoint.exists():
        training.resume(torch.load(checkpoint, weights_only=True))
    start, first, shown = time.time(), training.step, 0.0
    while training.step < training.steps:
        loss = training.update()
        if not math.isfinite(loss):
            raise RuntimeError(f"{checkpoint.stem}: the loss is {loss} at step {training.step}")
        shown = 0.99 * shown + 0.01 * loss if shown else loss
        if training.step % 50 == 0:
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
    return {"drawings": rng.getstate(), "rng": torch.get_rng_state()}


def throw(state: dict[str, Any], rng: random.Random) -> None:
    version, numbers, gauss = state["drawings"]
    rng.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["rng"])
