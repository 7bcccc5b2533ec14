"""PSNR, SSIM and KID against obvious slow implementations."""

from __future__ import annotations

import math

import pytest
import torch

from conceptguard.demo.measures import psnr, ssim
from conceptguard.jobs.report.distances import kid, mmd


def slow_kid(x: list[list[float]], y: list[list[float]]) -> float:
    """Binkowski et al. 2018, equation 4, in three loops."""

    def k(a: list[float], b: list[float]) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    within = [
        sum(k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
        for s in (x, y)
    ]
    return sum(within) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_kid_is_the_papers() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 5), 0.5 * torch.randn(13, 5) + 1
    assert kid(x, y, resamples=2).value == pytest.approx(slow_kid(x.tolist(), y.tolist()), rel=1e-6)


def test_kid_of_one_distribution_is_nothing_and_its_interval_says_so() -> None:
    torch.manual_seed(1)
    same = kid(torch.randn(150, 16), torch.randn(150, 16))
    other = kid(torch.randn(150, 16), torch.randn(150, 16) + 0.5)
    assert same.low < 0 < same.high and abs(same.value) < 0.1
    assert other.low > same.high and other.low < other.value < other.high


def test_copies_in_a_resample_are_not_taken_for_likeness() -> None:
    """Resampled with replacement, the estimate stays around its value; with copies compared it would rise."""
    torch.manual_seed(2)
    x, y = torch.randn(30, 8), torch.randn(30, 8)
    found = kid(x, y, resamples=300)
    assert found.low < found.value < found.high
    weights = torch.tensor([2.0, 0, 1])
    kernels = torch.rand(3, 3), torch.rand(3, 3), torch.rand(3, 3)
    kernels[0].fill_diagonal_(1e6)
    assert mmd(*kernels, weights, torch.ones(3)).abs() < 10


def test_kid_needs_pictures() -> None:
    with pytest.raises(ValueError, match="two pictures"):
        kid(torch.randn(1, 4), torch.randn(5, 4))


def test_psnr_and_ssim() -> None:
    torch.manual_seed(3)
    x = torch.rand(2, 3, 16, 16)
    y = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    error = sum((a - b) ** 2 for a, b in zip(y[1].flatten().tolist(), x[1].flatten().tolist(), strict=True)) / 768
    assert psnr(y, x)[1].item() == pytest.approx(-10 * math.log10(error), rel=1e-4)

    def slow(a: torch.Tensor, b: torch.Tensor) -> float:
        out = []
        for c in range(3):
            for i in range(10):
                for j in range(10):
                    p, q = (t[c, i : i + 7, j : j + 7].double().flatten() for t in (a, b))
                    cov = ((p - p.mean()) * (q - q.mean())).mean()
                    top = (2 * p.mean() * q.mean() + 1e-4) * (2 * cov + 9e-4)
                    under = (p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (p.var(correction=0) + q.var(correction=0) + 9e-4)
                    out.append((top / under).item())
        return sum(out) / len(out)

    assert ssim(y, x)[1].item() == pytest.approx(slow(y[1], x[1]), abs=1e-3)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
