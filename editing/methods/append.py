"""Tokens appended to the context, without touching the context (KPOP, arXiv 2403.12326: concatenation before W_k, W_v).

One softmax over the prompt's tokens and the appended ones is a mean of both attentions, weighted by their partition
functions Z. Computing it so, after the prompt's own attention, leaves the rows that are not edited bit-identical, and
lets other packs' patches see the context they expect.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import logits

CONTEXT = 77  # tokens of one piece of prompt


def append(A: Tensor, q: Tensor, k: Tensor, extra: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """softmax(q [k; K_1; ..]^T / sqrt d) [v; V_1; ..] - A for A = softmax(q k^T / sqrt d) v: what appending changes.

    A, q: [R, N, H, d]; k: [R, L, H, d]; extra: K_i, V_i: [1, n_i, H, d] and how often to append them, s_i: [R];
    returns fp32 [R, N, H, d].

    Tokens are appended s_i times for every 77 of the context. The host repeats a prompt that is batched with a longer
    one ("padding with repeat doesn't change result"), and a single copy would then count for less.
    """
    repeats = k.shape[1] / CONTEXT
    log_Z = [logits(q, k).logsumexp(-1)]  # [R, H, N]
    attentions = []
    for K, V, s in extra:
        e = logits(q, K)
        log_Z.append(e.logsumexp(-1) + (s * repeats).log()[:, None, None])
        attentions.append((e.softmax(-1) @ V.transpose(1, 2).float()).transpose(1, 2))  # [R, N, H, d]
    share = torch.stack(log_Z).softmax(0).transpose(2, 3)[..., None]  # [1 + len(extra), R, N, H, 1]
    A = A.float()
    return sum((w * (A_i - A) for w, A_i in zip(share[1:], attentions, strict=True)), torch.zeros_like(A))
