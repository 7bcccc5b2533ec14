"""Attention of one pass's own queries over token sets that are the same for every row, such as a concept's prompt."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., L, H*d] -> [..., L, H, d]."""
    return x.unflatten(-1, (heads, -1))


def attend(q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """softmax(q K^T / sqrt d) V, M token sets at once. q: [..., H, d]; K, V: [M, T, H, d]; returns [M, ..., H, d].

    The token sets do not differ from row to row, so all rows' pixels form one long query that is shared, not copied, by
    the M sets.
    """
    pixels = q.flatten(0, -3).transpose(0, 1)  # [H, P, d]
    out = F.scaled_dot_product_attention(pixels.expand(K.shape[0], -1, -1, -1), K.transpose(1, 2), V.transpose(1, 2))
    return out.transpose(1, 2).unflatten(1, q.shape[:-2])


def logits(q: Tensor, K: Tensor) -> Tensor:
    """q K^T / sqrt d in fp32. q: [R, N, H, d]; K: [R or 1, T, H, d]; returns [R, H, N, T]."""
    q, K = q.transpose(1, 2).float(), K.transpose(1, 2).float()
    return q @ K.mT * q.shape[-1] ** -0.5
