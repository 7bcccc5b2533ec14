"""Numbers beyond a node's bounds are refused by the node's name, typed or linked, of every node and input."""

from __future__ import annotations

import math
from typing import Any

import pytest
from comfy_api.latest import io

from conceptguard.nodes import NODES, bounds

NUMBERS = [
    pytest.param(node, each, id=f"{node.GET_SCHEMA().node_id}-{each.id}")
    for node in NODES
    for each in node.GET_SCHEMA().inputs
    if isinstance(each, io.Float.Input | io.Int.Input)
]


def beyond(each: Any) -> list[Any]:
    step = 1 if isinstance(each, io.Int.Input) else 1e-3
    return [
        each.min - step,
        each.max + max(step, each.max * 1e-6),
        math.nan,
        math.inf,
        -math.inf,
        1e308,
        "x",
        [each.min],
    ]


def typed(node: type[io.ComfyNode], each: Any, value: Any) -> str | None:
    """What the host says of a typed value: its own check of bounds, or the node's for inputs that it names."""
    names = node.validate_inputs.__func__.__code__  # type: ignore[attr-defined]
    if each.id in names.co_varnames[1 : names.co_argcount]:
        return None if (said := node.validate_inputs(**{each.id: value})) is True else str(said)
    return bounds.outside(node, {each.id: value})


@pytest.mark.parametrize(("node", "each"), NUMBERS)
def test_every_number_has_bounds_that_hold(node: type[io.ComfyNode], each: Any) -> None:
    assert each.min is not None and each.max is not None and each.min <= each.default <= each.max
    node_id = node.GET_SCHEMA().node_id
    for value in beyond(each):
        with pytest.raises(ValueError, match=f"^{node_id}: {each.id} is .*; give a number from "):
            node.execute(**{each.id: value})
        assert f"{each.id} is " in (typed(node, each, value) or "")
    for value in (each.min, each.max, each.default, None):
        assert bounds.outside(node, {each.id: value}) is None


def test_there_are_many() -> None:
    assert len(NUMBERS) > 60


def test_a_number_given_by_its_place_is_looked_at_too() -> None:
    cre = next(node for node in NODES if node.GET_SCHEMA().node_id == "ConceptGuardCRE")
    with pytest.raises(ValueError, match="ConceptGuardCRE: end_percent is 7; give a number from 0 to 1"):
        cre.execute(None, None, 1.0, 0.0, 7)


def test_long_values_are_cut() -> None:
    cre = next(node for node in NODES if node.GET_SCHEMA().node_id == "ConceptGuardCRE")
    assert len(bounds.outside(cre, {"strength": "x" * 10_000}) or "") < 150
