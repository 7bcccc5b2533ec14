"""Whatever joins, splits or empties prompts in front of a transformer, every row of the positive is edited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import dits
import nodes
import pytest
import torch
from torch import Tensor

from conceptguard.editing.edits.spec import EditSpec
from conceptguard.editing.engine.host import accounts_of, add_edit
from conceptguard.editing.methods.cre import DEFAULTS

EVERYWHERE = replace(DEFAULTS, floor=0.0, evidence="position")
A, B = (dits.cond(dits.tokens(seed, length)) for seed, length in ((1, 9), (3, 12)))


class Style:
    """A Redux model: what it makes of a picture stands behind the prompt's tokens."""

    def get_cond(self, _: Any) -> Tensor:
        return dits.tokens(9, 5)


def masked(cond: Any, left: bool) -> Any:
    mask = torch.zeros(1, 64, 64)
    mask[..., 32 * (not left) :][..., :32] = 1
    return nodes.ConditioningSetMask().append(cond, mask, "default", 1.0)[0]


def during(cond: Any, start: float, end: float) -> Any:
    return nodes.ConditioningSetTimestepRange().set_range(cond, start, end)[0]


# Each with the rows of the positive that one step has.
JOINED: dict[str, tuple[Callable[[], Any], int]] = {
    "ConditioningCombine": (lambda: nodes.ConditioningCombine().combine(A, B)[0], 2),
    "ConditioningConcat": (lambda: nodes.ConditioningConcat().concat(A, B)[0], 1),
    "ConditioningAverage": (lambda: nodes.ConditioningAverage().addWeighted(A, B, 0.5)[0], 1),
    "of those a combination": (lambda: [*A, *nodes.ConditioningAverage().addWeighted(B, A, 2.0)[0]], 2),
    "ConditioningSetMask": (lambda: [*masked(A, True), *masked(B, False)], 2),
    "ConditioningZeroOut": (lambda: nodes.ConditioningZeroOut().zero_out(A)[0], 1),
    "ConditioningSetTimestepRange": (lambda: [*during(A, 0.0, 0.6), *during(B, 0.0, 1.0)], 2),
    "StyleModelApply": (lambda: nodes.StyleModelApply().apply_stylemodel(A, Style(), None, 1.0, "multiply")[0], 1),
}


@pytest.mark.parametrize("joined", JOINED)
@pytest.mark.parametrize("name", ["Flux.1", "SD3", "Z-Image", "Wan"])
def test_every_row_of_the_positive_is_edited(name: str, joined: str) -> None:
    make, rows = JOINED[joined]
    model = dits.build(name)
    edited = add_edit(model, EditSpec("projection", dits.concept(), options=EVERYWHERE, node="Test"))
    before, after = (dits.sample(name, each, make(), cfg=4.0) for each in (model, edited))
    accounts = accounts_of(edited)
    assert accounts is not None and (account := accounts.of("")) is not None
    (only,) = account.entries.values()
    assert (only.edited, account.prompts) == (rows, {"positive": rows, "negative": 1})
    assert not only.missed and (after - before).norm() > 0.01 * before.norm()
