"""What a conditioning says of a prompt beside its encoding, for models that read that as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LLAMA = "conditioning_llama3"  # what HiDream's Llama makes of a prompt in each layer, [1, layers, L, W]
IDS = ("t5xxl_ids", "t5xxl_weights")  # a prompt's T5 tokens and their weights, [n], that Anima's adapter reads
BESIDE = {"llama": (LLAMA,), "qwen3_06b": IDS}  # what is said by text encoders, by the host's names of these


def said_beside(given: Mapping[str, Any], asked: Sequence[str] = (LLAMA, *IDS)) -> dict[str, Tensor]:
    """What a conditioning says of its prompt beside the encoding."""
    return {name: x.detach().to("cpu", copy=True) for name in asked if isinstance(x := given.get(name), Tensor)}


def beside_mean(said: Sequence[Mapping[str, Tensor]], name: str) -> tuple[Mapping[str, Tensor], ...]:
    """Llama's states are as good as their mean; T5's tokens have none: then all of it, each with its encoding."""
    if not all(LLAMA in each for each in said):
        return tuple(said)
    if len({each[LLAMA].shape for each in said}) > 1:
        raise ValueError(f"{name} mixes prompts of several lengths; keep each of its lines under 75 tokens")
    return ({LLAMA: torch.cat([each[LLAMA] for each in said]).mean(0, keepdim=True)},)
