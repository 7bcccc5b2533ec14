"""Token sets as one attention's keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.tokens import TokenSet


@dataclass
class KV:
    """M token sets in one attention. K, V: [M, T, H, d]; owner: [M], the edit that each belongs to.

    own: the keys of each set's own tokens, M times [1, n, H, d], where they are evidence (methods/eiup.py); scale: [M],
    times the edit's strength.
    """

    owner: Tensor
    K: Tensor
    V: Tensor
    own: list[Tensor]
    scale: Tensor

    @classmethod
    def of(cls, tokens: TokenSet, K: Tensor, V: Tensor) -> KV:
        """K, V: [M, T, H, d], what the attention makes of the tokens."""
        V = V if tokens.w is None else V * tokens.w.to(V.dtype)
        own = [K[m : m + 1, list(positions)] for m, positions in enumerate(tokens.own)]
        scale = torch.tensor(tokens.scale or [1.0] * len(K), device=K.device)
        return cls(torch.tensor(tokens.owner, device=K.device), K, V, own, scale)
