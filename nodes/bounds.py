"""Numbers within what a node's schema allows, however they arrive.

The host looks at the bounds of typed numbers alone, not at linked ones, nor at any input that `validate_inputs` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from numbers import Real
from typing import Any

from comfy_api.latest import io


def outside(node: type[io.ComfyNode], values: Mapping[str, Any]) -> str | None:
    """What is wrong with the first of these inputs that its own bounds exclude. None is an input that is linked."""
    for each in schema_of(node).inputs:
        if isinstance(each, io.Float.Input | io.Int.Input) and values.get(each.id) is not None:
            value, low, high = values[each.id], each.min, each.max
            if not isinstance(value, Real) or not low <= value <= high:  # catches NaN as well
                return f"{each.id} is {shown(value)}; give a number from {shown(low)} to {shown(high)}"
    return None


def schema_of(node: type[io.ComfyNode]) -> io.Schema:
    return node.SCHEMA or node.GET_SCHEMA()


def shown(value: Any) -> str:
    """A number as a person writes it; of anything else not too much."""
    return f"{value:.12g}" if isinstance(value, float) else repr(value)[:60]


def guarded(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, whose `execute` refuses numbers out of bounds. It takes inputs by name or in its own order, which is
    the schema's where it does not name them all."""
    inner: Callable[..., io.NodeOutput] = node.execute.__func__
    own = list(signature(inner).parameters.values())[1:]
    named = [] if any(p.kind is p.VAR_KEYWORD for p in own) else [p.name for p in own]

    @wraps(inner)
    def execute(cls: type[io.ComfyNode], *args: Any, **inputs: Any) -> io.NodeOutput:
        schema = schema_of(node)
        order = named or [each.id for each in schema.inputs]
        given = {**dict(zip(order, args, strict=False)), **inputs}
        if problem := outside(node, given):
            raise ValueError(f"{schema.node_id}: {problem}")
        return inner(cls, **given)

    node.execute = classmethod(execute)
    return node
