"""Concept ablation (Kumari et al., ICCV 2023), its model-based loss: the concept is drawn as its anchor is.

z_t is noised from the original model's pictures of the anchor (theirs: 1000 of 200 prompts). The target is of the
weights in training, as in their code. Their crops, and the mask for those, are left out.
"""

from __future__ import annotations

from torch import Tensor

from .moment import Method, Moment


def loss(at: Moment) -> Tensor:
    """|| eps'(z_t, c) - sg eps'(z_t, anchor) ||^2"""
    return (at.trained(at.c) - at.current(at.guide)).square().mean()


CA = Method(loss, "cross-attention", "of the guide")
