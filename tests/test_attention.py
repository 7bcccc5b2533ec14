"""The kernel that tells what an attention finds and how much it weighs, against the same by hand."""

from __future__ import annotations

import pytest
import torch

from conceptguard.editing.methods.attention import found_and_weight

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("d", [8, 128])
def test_what_is_found_and_how_much_it_weighs(device: str, dtype: torch.dtype, close: float, d: int) -> None:
    q, k, v = (torch.randn(2, n, 3, d, device=device).to(dtype) for n in (70, 5, 5))
    found = found_and_weight(q, k, v)
    assert found is not None
    z = torch.einsum("rnhd,rlhd->rnhl", q.double(), k.double()) / d**0.5
    want = torch.einsum("rnhl,rlhd->rnhd", z.softmax(-1), v.double())
    torch.testing.assert_close(found[0].double(), want, rtol=close, atol=close)
    torch.testing.assert_close(found[1].double(), z.logsumexp(-1), rtol=close, atol=close)


def test_gradients_go_another_way() -> None:
    q, k, v = (torch.randn(1, n, 1, 8, requires_grad=True) for n in (4, 5, 5))
    assert found_and_weight(q, k, v) is None
    with torch.no_grad():
        assert found_and_weight(q, k, v) is not None
