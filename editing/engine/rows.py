"""Which rows of a model call's batch belong to which cond and image, as the host and known packs say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Window = tuple[int, ...] | None  # the images of a batch that a context window shows


@dataclass
class Rows:
    """The R edited rows of a batch, and s: [edits, R], the strength of each edit times its gate there."""

    index: slice | Tensor
    s: Tensor


def put(x: Tensor, index: slice | Tensor, rows: Tensor) -> Tensor:
    """A copy of x with some rows replaced."""
    rows = rows.to(x.dtype)
    if isinstance(index, slice) and len(rows) == len(x):
        return rows
    x = x.clone()
    x[index] = rows
    return x


def window_of(extra: Mapping[str, Any]) -> Window:
    """The images that a context window shows, the host's or AnimateDiff-Evolved's; None when all are shown."""
    window = extra.get("context_window")
    if window is not None and window.dim == 0:
        return tuple(window.index_list)
    shown = (extra.get("ad_params") or {}).get("sub_idxs")
    return tuple(shown) if shown else None


def chunks_of(extra: Mapping[str, Any]) -> Sequence[int]:
    """Which cond each equal part of the batch serves. Attention Couple enlarges the batch in a block, and says how."""
    for name in ("cond_or_uncond_couple", "cond_or_uncond_hook_couple", "cond_or_uncond"):
        if extra.get(name):
            return extra[name]
    return (0,)
