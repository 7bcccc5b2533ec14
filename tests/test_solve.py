"""CRE's least squares on devices that lack what others have."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import nnls

from conceptguard.editing.methods import solve
from conceptguard.editing.methods.cre import least_squares


def systems(concepts: int, alike: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a [positions, 1, d] and x [K, positions, 1, d], whose concepts are alike in so much; some are absent."""
    g = torch.Generator().manual_seed(concepts)
    shared = torch.randn(1, 64, 1, 40, generator=g)
    x = alike * shared + (1 - alike) * torch.randn(concepts, 64, 1, 40, generator=g)
    present = torch.rand(concepts, 64, 1, 1, generator=g) < 0.8
    return torch.randn(64, 1, 40, generator=g), x, present


@pytest.mark.parametrize("alike", [0.0, 0.9])
@pytest.mark.parametrize("concepts", [2, 3, 6, 12])
def test_elimination_and_cholesky_agree(concepts: int, alike: float, monkeypatch: pytest.MonkeyPatch) -> None:
    a, x, present = systems(concepts, alike)
    expected = least_squares(a, x, present)

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError("aten::cholesky_solve")

    monkeypatch.setattr(torch, "cholesky_solve", missing)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", missing)
    monkeypatch.setattr(solve, "WITHOUT_CHOLESKY", {"cpu"})
    found = least_squares(a, x, present)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-4)
    assert (found[~present.expand_as(found)] == 0).all()


def test_dependent_concepts_share_what_they_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    a, x, _ = systems(1, 0.0)
    twice = x.expand(2, *x.shape[1:]).contiguous()
    present = torch.ones(2, 64, 1, 1, dtype=torch.bool)
    expected = least_squares(a, twice, present)
    monkeypatch.setattr(solve, "WITHOUT_CHOLESKY", {"cpu"})
    found = least_squares(a, twice, present)
    assert torch.isfinite(found).all()
    taken = [(c * twice).sum(0) for c in (found, expected)]
    torch.testing.assert_close(*taken, rtol=1e-3, atol=1e-3)


def test_two_phrasings_of_one_thing_take_it_once() -> None:
    """Clipped alone, one of their coefficients would be large, for the other's negative one to undo."""
    g = torch.Generator().manual_seed(0)
    thing = torch.randn(1, 64, 1, 40, generator=g)
    x = thing + 0.05 * torch.randn(2, 64, 1, 40, generator=g)
    a = thing[0] + 0.3 * torch.randn(64, 1, 40, generator=g)
    present = torch.ones(2, 64, 1, 1, dtype=torch.bool)
    c = least_squares(a, x, present, positive=True)
    assert (c >= 0).all() and (c.sum(0) > 0.7).all() and (c.sum(0) < 1.3).all()
    assert least_squares(a, x, present).clamp_min(0).sum(0).max() > 1.5
    for i in range(64):
        expected = torch.from_numpy(nnls(x[:, i, 0].T.double().numpy(), a[i, 0].double().numpy())[0])
        torch.testing.assert_close(c[:, i, 0, 0].double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("phrases", [2, 3, 10])
def test_none_is_negative_and_together_they_are_the_best_of_such(phrases: int, alike: float) -> None:
    a, x, _ = systems(phrases, alike)
    a = a + alike * x.mean(0)
    c = least_squares(a, x, torch.ones(phrases, 64, 1, 1, dtype=torch.bool), positive=True).clamp_min(0)
    best = [nnls(x[:, i, 0].T.double().numpy(), a[i, 0].double().numpy())[0] for i in range(64)]
    expected = (torch.tensor(best).T[..., None, None] * x).sum(0)
    off = ((c * x).sum(0) - expected).norm(dim=-1) / a.norm(dim=-1)
    assert off.max() < 0.02 and (off > 1e-3).float().mean() < 0.05


def test_apples_device_is_among_them() -> None:
    assert "mps" in solve.WITHOUT_CHOLESKY
