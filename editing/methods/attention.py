"""Attention of one pass's own queries over token sets that are the same for every row, such as a concept's prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.encode import CONTEXT

SAME = 8.0  # roundings by which the keys of one token may differ from place to place


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., L, H*d] -> [..., L, H, d]."""
    return x.unflatten(-1, (heads, -1))


def attend(q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """softmax(q K^T / sqrt d) V, M token sets at once. q: [..., H, d]; K, V: [M, T, H, d]; returns [M, ..., H, d].

    Token sets that do not differ from row to row: all rows' pixels form one long query that is shared, not copied, by
    the M sets. Those that do (engine/streams.py) are [M, R, T, H, d], and q [R, N, H, d].
    """
    if K.ndim == 5:
        q = q.transpose(1, 2).expand(K.shape[0], -1, -1, -1, -1).flatten(0, 1)
        k, v = (x.flatten(0, 1).transpose(1, 2) for x in (K, V))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).unflatten(0, K.shape[:2])
    pixels = q.flatten(0, -3).transpose(0, 1)  # [H, P, d]
    out = F.scaled_dot_product_attention(pixels.expand(K.shape[0], -1, -1, -1), K.transpose(1, 2), V.transpose(1, 2))
    return out.transpose(1, 2).unflatten(1, q.shape[:-2])


def attend_and_weigh(q: Tensor, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """`attend` to M token sets that differ from row to row, and the log of their weights: [M, R, N, H, d], and fp32
    [M, R, N, H, 1]. q: [R, N, H, d]; K, V: [M, R, T, H, d]."""
    queries = q.expand(K.shape[0], *q.shape).flatten(0, 1)
    found = found_and_weight(queries, K.flatten(0, 1), V.flatten(0, 1))
    if found is None:
        return attend(q, K, V), torch.stack([logits(q, k).logsumexp(-1).transpose(1, 2)[..., None] for k in K])
    A, Z = (x.unflatten(0, K.shape[:2]) for x in found)
    return A, Z[..., None]


def found_and_weight(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """softmax(q k^T / sqrt d) v, [R, N, H, d], and log sum_j exp(q k_j / sqrt d), fp32 [R, N, H], by a kernel that
    never holds all of q k^T; None where torch has none, or gradients are asked for. q: [R, N, H, d]; k, v: [R, L, H,
    d]."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return None
    aten, half = torch.ops.aten, q.dtype in (torch.float16, torch.bfloat16)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and (half or q.dtype == torch.float32):
        A, Z = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.device.type == "cuda" and q.shape[-1] % 8 == 0:  # the flash kernel is quicker, but not on every card
        A, Z, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    else:
        return None
    return A.transpose(1, 2), Z[..., : q.shape[2]].transpose(1, 2).float()


def logits(q: Tensor, K: Tensor, bias: Tensor | None = None) -> Tensor:
    """q K^T / sqrt d in fp32, and what a mask adds. q: [R, N, H, d]; K: [R or 1, T, H, d]; bias: [R or 1, H or 1, N or
    1, T]; returns [R, H, N, T]."""
    q, K = q.transpose(1, 2).float(), K.transpose(1, 2).float()
    found = q @ K.mT * q.shape[-1] ** -0.5
    return found if bias is None else found + bias


def repetitions(k: Tensor) -> Tensor:
    """How often each row's prompt stands in its keys, 1 for a prompt that is long itself; [R] fp32. k: [R, L, H, d].

    The host repeats a prompt that is batched with a longer one ("padding with repeat doesn't change result"), and so do
    attention couples. Told by the keys alone, on the device, for packs change the context on its way here.
    """
    found = torch.ones(len(k), device=k.device)
    tolerance = SAME * torch.finfo(k.dtype).eps * k.abs().amax((1, 2, 3))
    for n in range(2, k.shape[1] // CONTEXT + 1):
        if k.shape[1] % n == 0:
            pieces = k.unflatten(1, (n, -1))
            alike = (pieces - pieces[:, :1]).abs().amax((1, 2, 3, 4)) <= tolerance
            found = torch.where(alike, float(n), found)
    return found
