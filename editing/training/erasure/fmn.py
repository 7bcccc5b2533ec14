"""FMN, forget-me-not (Zhang et al., 2023): attention resteering. Nothing in the picture is to read the concept's words.

z_t is noised from the original model's pictures of the concept (theirs: a handful of given ones). Their words are first
learned from the pictures (textual inversion); ours are the concept's own, and the end of the text as in their code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .moment import Method, Moment


def loss(at: Moment) -> Tensor:
    """|| A'[:, said] ||, over all cross-attentions, heads and positions of the picture."""
    maps = at.attentions(at.c)
    return torch.cat([A[row, :, :, list(said)].flatten() for A in maps for row, said in enumerate(at.said)]).norm()


FMN = Method(loss, "cross-attention", "of the concept")
