"""Measures of pictures, each as its paper defines it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


@dataclass(frozen=True)
class Distance:
    """An estimate with the 95 % interval of its bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """KID's polynomial kernel (x . y / d + 1)^3 of features [n, d] and [m, d]: [n, m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd(xx: Tensor, yy: Tensor, xy: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The unbiased squared MMD of samples that hold picture i a[i] times and picture j b[j] times.

    A picture is never compared with itself, nor with its copies in a resample: those would pass for likeness.
    """

    def within(k: Tensor, w: Tensor) -> Tensor:
        pairs = w[:, None] * w[None]
        pairs = pairs - pairs.diag().diag()
        return (k * pairs).sum() / pairs.sum()

    between = (xy * a[:, None] * b[None]).sum() / (a.sum() * b.sum())
    return within(xx, a) + within(yy, b) - 2 * between


def kid(x: Tensor, y: Tensor, resamples: int = 500, seed: int = 0) -> Distance:
    """Kernel inception distance (Binkowski et al. 2018) of two sets of features [n, d], [m, d], with its interval."""
    if min(len(x), len(y)) < 2:
        raise ValueError(f"KID compares two pictures of each kind at least, not {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    kernels = kernel(x, x), kernel(y, y), kernel(x, y)
    value = mmd(*kernels, torch.ones(len(x)).double(), torch.ones(len(y)).double())
    rng = torch.Generator().manual_seed(seed)

    def again(n: int) -> Tensor:
        return torch.bincount(torch.randint(n, (n,), generator=rng), minlength=n).double()

    spread = torch.stack([mmd(*kernels, again(len(x)), again(len(y))) for _ in range(resamples)])
    spread = spread[spread.isfinite()]  # a tiny set may be drawn as copies of one picture
    low, high = spread.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Distance(value.item(), low, high)
