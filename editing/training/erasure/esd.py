"""ESD, erased stable diffusion (Gandikota et al., ICCV 2023).

z_t is of a picture of c that theta' draws with guidance 3. The paper's eta is 1 with the empty prompt as the guide;
its authors' later code has eta 2 with c itself for it, which is the same. ESD-x trains the cross-attentions, for what
prompts name; ESD-u all the rest, for what appears unasked.
"""

from __future__ import annotations

from torch import Tensor

from .moment import Method, Moment


def loss(at: Moment) -> Tensor:
    """|| eps'(z_t, c) - [eps(z_t, guide) - eta (eps(z_t, c) - eps(z_t, null))] ||^2"""
    target = at.original(at.guide) - at.eta * (at.original(at.c) - at.original(at.empty))
    return (at.trained(at.c) - target).square().mean()


ESD_X = Method(loss, "cross-attention", "path")
ESD_U = Method(loss, "others", "path")
