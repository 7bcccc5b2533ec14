"""The host runs every node in inference mode, in which nothing can be learned. The one way out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def gradients() -> Iterator[None]:
    """Within it gradients are kept, of tensors made in it or `copied` into it."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def copied(value: Any) -> Any:
    """Without tensors of inference mode, which autograd refuses; also inside tuples, lists, dicts and the host's
    conditions."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (list, tuple):
        return type(value)(copied(v) for v in value)
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return value._copy_with(copied(value.cond)) if hasattr(value, "_copy_with") else value


def learns(function: Callable[P, T]) -> Callable[P, T]:
    """A function that takes gradients of what it makes of its arguments, wherever it is called."""

    @wraps(function)
    def free(*args: P.args, **kwargs: P.kwargs) -> T:
        with gradients():
            return function(*copied(args), **copied(kwargs))

    return free
