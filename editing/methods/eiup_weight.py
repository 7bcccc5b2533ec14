"""EIUP's automatic weight: a small regressor from the first step's attention to w (GIE's adapter, ICLR 2025).

GIE's code has an MLP 16 -> 64 -> 32 -> 1 with ReLU between; its inputs are a token's A_e at the first step, averaged
over heads and positions in each of the 16 cross-attentions. Labels and loss were not published: here the pairs come
from whoever trains (benchmarks/train_adapter.py), the loss is the mean squared error, and a phrase's own tokens share
one weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..edits.digest import Shared, digest
from ..files import artefacts
from ..files.artefacts import Artefact
from ..training.mode import learns

EVIDENCE = ("none", "share", "alike")  # eiup.py; "share" also multiplies the A_e that are averaged here
MEND = "choose a file that `make train-adapter` wrote, or set auto to off"


@dataclass(frozen=True, eq=False, repr=False)
class Regressor(Shared):
    """w of a phrase from its mean attention in each of a model's cross-attentions.

    blocks: their names, the order of the inputs; mean, spread: [B], of the training inputs; low, high: the least and
    greatest weight it was trained on, and will give.
    """

    name: str
    blocks: tuple[str, ...]
    evidence: str
    mean: Tensor
    spread: Tensor
    low: float
    high: float
    network: nn.Sequential

    def __repr__(self) -> str:
        return f"Regressor({self.key})"

    @cached_property
    def key(self) -> str:
        return digest((self.blocks, self.evidence, self.low, self.high, *tensors_of(self).values()))

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """x: [..., B] mean attentions; returns w: [...]."""
        w = self.network((x.float().cpu() - self.mean) / self.spread)[..., 0]
        return w.clamp(self.low, self.high)


def mlp(inputs: int) -> nn.Sequential:
    """GIE's shape, whatever the number of cross-attentions."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))


@learns
def train(
    x: Tensor,
    w: Tensor,
    blocks: Sequence[str],
    evidence: str = "none",
    steps: int = 2000,
    seed: int = 0,
    name: str = "trained",
) -> Regressor:
    """Fit to pairs. x: [n, B] mean attentions; w: [n] the weights that they call for."""
    if x.ndim != 2 or x.shape != (len(w), len(blocks)) or not len(w):
        raise ValueError(f"{tuple(x.shape)} mean attentions do not suit {len(w)} weights and {len(blocks)} blocks")
    if not (torch.isfinite(x).all() and torch.isfinite(w).all()):
        raise ValueError("the training pairs hold NaN or infinity")
    mean, spread = x.mean(0), x.std(0, correction=0).clamp_min(1e-8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = mlp(len(blocks))
    adam = torch.optim.Adam(network.parameters(), lr=2e-3, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        loss = (network((x - mean) / spread)[:, 0] - w).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
    network = network.eval().requires_grad_(False)
    return Regressor(name, tuple(blocks), evidence, mean, spread, float(w.min()), float(w.max()), network)


def tensors_of(regressor: Regressor) -> dict[str, Tensor]:
    return {"mean": regressor.mean, "spread": regressor.spread, **regressor.network.state_dict()}


def save(regressor: Regressor, path: Path, about: Mapping[str, str] | None = None) -> None:
    """`about` says how it was trained."""
    training = {
        **(about or {}),
        "blocks": regressor.blocks,
        "evidence": regressor.evidence,
        "low": regressor.low,
        "high": regressor.high,
    }
    artefacts.write(Artefact("eiup-weight", path.stem, tensors_of(regressor), method="EIUP", training=training), path)


def load(path: Path) -> Regressor:
    """Raises ValueError, with the mend, for whatever is not a whole file of this kind."""
    found = artefacts.read(path, "eiup-weight")
    try:
        return _assembled(path.name, found.training, dict(found.tensors))
    except (KeyError, TypeError, ValueError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f'cannot use "{path.name}": {why}; {MEND}') from error


def _assembled(name: str, training: Mapping[str, Any], tensors: dict[str, Tensor]) -> Regressor:
    blocks, evidence = tuple(map(str, training["blocks"])), str(training["evidence"])
    low, high = float(training["low"]), float(training["high"])
    if evidence not in EVIDENCE or not -1e6 < low <= high < 1e6:
        raise ValueError(f"its evidence is {evidence[:20]}, its weights from {low} to {high}")
    mean, spread = tensors.pop("mean"), tensors.pop("spread")
    if mean.shape != (len(blocks),) or not (spread > 0).all():
        raise ValueError("its mean and spread do not suit its blocks")
    network = mlp(len(blocks))
    network.load_state_dict(tensors)
    return Regressor(name, blocks, evidence, mean, spread, low, high, network.eval().requires_grad_(False))
