"""Measures of pictures, each as its paper defines it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import avg_pool2d


def psnr(y: Tensor, x: Tensor) -> Tensor:
    """Of each picture [n, 3, h, w] in [0, 1]: -10 log10 of its mean squared error, [n]."""
    return -10 * (y - x).square().flatten(1).mean(1).log10()


def ssim(y: Tensor, x: Tensor, size: int = 7) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each picture, the mean over `size`-pixel squares and colours, [n]."""

    def mean(a: Tensor) -> Tensor:
        return avg_pool2d(a, size, 1)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    out = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return out.flatten(1).mean(1)
