"""SDD, safe self-distillation (Kim et al., 2023): the concept is denoised as the empty prompt is, by one's own measure.

z_t is of a picture of c that the average of theta' over its steps, the teacher, draws with guidance 3; the average is
the result. Of a low-rank change the two factors are averaged (INF).
"""

from __future__ import annotations

from torch import Tensor

from .moment import Method, Moment


def loss(at: Moment) -> Tensor:
    """|| eps'(z_t, c) - sg eps'(z_t, null) ||^2"""
    return (at.trained(at.c) - at.current(at.guide)).square().mean()


SDD = Method(loss, "cross-attention", "path", average=0.999)
