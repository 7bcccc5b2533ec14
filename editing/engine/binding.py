"""Token sets as one attention's keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods.tokens import TokenSet


@dataclass
class KV:
    """M token sets in one attention. K, V: [M, T, H, d], or [M, R, T, H, d] where they differ from row to row; owner:
    [M], the edit that each belongs to.

    own: the keys of each set's own tokens, M times [1 or R, n, H, d], where they are evidence (methods/eiup.py); scale:
    [M], times the edit's strength.
    """

    owner: Tensor
    K: Tensor
    V: Tensor
    own: list[Tensor]
    scale: Tensor

    @property
    def single(self) -> tuple[Tensor, Tensor]:
        """The keys and values of one set, [1 or R, T, H, d]."""
        return (self.K, self.V) if self.K.ndim == 4 else (self.K[0], self.V[0])

    @classmethod
    def of(cls, tokens: TokenSet, K: Tensor, V: Tensor) -> KV:
        """K, V: what the attention makes of the tokens, and of padding behind them if the model adds any."""
        if tokens.w is not None:
            w = F.pad(tokens.w, (0, 0, 0, 0, 0, V.shape[-3] - tokens.w.shape[1])).to(V.dtype)  # [M, T, 1, 1]
            V = V * (w if V.ndim == 4 else w[:, None])
        own = [(K[m : m + 1] if K.ndim == 4 else K[m])[:, list(p)] for m, p in enumerate(tokens.own)]
        scale = torch.tensor(tokens.scale or [1.0] * len(K), device=K.device)
        return cls(torch.tensor(tokens.owner, device=K.device), K, V, own, scale)
