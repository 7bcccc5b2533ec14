"""Nothing in a block waits for the device: no number is read from it, and no shape depends on what it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conceptguard.editing.engine.backbones.joint import besides, halves, placed
from conceptguard.editing.methods.cre import DEFAULTS, projection
from conceptguard.editing.methods.found import Found, Kept, Weight
from conceptguard.editing.methods.said import Said

WAITING = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::is_nonzero", "aten::equal"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}


class Watch(TorchDispatchMode):
    """Fails where a device would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in WAITING, f"{name} waits for the device"
        if name in INDEXING:
            assert not any(x is not None and x.dtype == torch.bool for x in args[1]), f"{name} by a mask waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "waits",
    [lambda x: x[x > 0], lambda x: x.max().item(), lambda x: bool((x > 0).any()), lambda x: x.nonzero()],
)
def test_it_sees_who_waits(waits: Callable[[Tensor], Any]) -> None:
    with Watch(), pytest.raises(AssertionError, match="wait"):
        waits(torch.randn(4))


def test_concepts_in_a_block() -> None:
    g = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    said = Said(some(24), some(3, 24), torch.zeros(3), torch.ones(3))
    with Watch():
        told = said(some(2, 77, 24))
        found = Found(some(2, 9, 4, 6), some(3, 2, 9, 4, 6), some(2, 9, 4, 6), some(3, 2, 9, 4, 6), said=told)
        kept, weight = Kept(some(2, 2, 9, 4, 6), torch.ones(3, 2, dtype=torch.bool)), Weight(some(3, 2, 9, 4, 1))
        found = Found(**{**vars(found), "kept": kept, "weight": weight})
        taken = projection(found, torch.ones(3, 2, 1), DEFAULTS)
    assert taken.shape == (2, 9, 4, 6) and weight.gained is not None and weight.gained.shape == (2, 9, 4, 1)


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([0, 3]), slice(None)])
def test_a_joint_attention(rows: slice | Tensor) -> None:
    """And it is the whole attention, put together of the edited rows' and the others'."""
    q, k, v = (torch.randn(4, 7 + 9, 2 * 8) for _ in range(3))
    image, text = slice(7, 16), slice(0, 7)

    def asked(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    with torch.no_grad(), Watch():
        O = besides(asked, q, k, v, rows, image, 2, (), {})
        parts = halves(q[rows, image].unflatten(-1, (2, -1)), *(x[rows].unflatten(-1, (2, -1)) for x in (k, v)), text)
        assert parts is not None
        A, A_i, u = parts
        m = torch.sigmoid(u)
        found = placed(O, m * A + (1 - m) * A_i, rows, image, False)
    torch.testing.assert_close(found, asked(q, k, v, 2), atol=1e-5, rtol=1e-5)
