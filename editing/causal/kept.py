"""Causal periods that were found, each in a small file named by the digest of all that it depends on."""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path
from typing import Any

from torch import Tensor

from ..edits.digest import digest
from ..files.header import json_of
from ..files.whole import put
from .search import Period


def path(user: Path, key: str) -> Path:
    return user / "concept_guard" / "causal-periods" / f"{key}.json"


def plain(value: Any) -> str:
    """A digest of nested lists, dicts, numbers, texts and tensors; anything else is like nothing else."""
    if isinstance(value, dict):
        return digest(("dict", *(f"{key}:{plain(value[key])}" for key in sorted(value, key=str))))
    if isinstance(value, list | tuple):
        return digest(("list", *map(plain, value)))
    if isinstance(value, Tensor):
        return digest((tuple(value.shape), value.detach().float().cpu()))
    if value is None or isinstance(value, str | int | float | bool):
        return digest((value,))
    return uuid.uuid4().hex


def write(file: Path, period: Period) -> None:
    """Whole or not at all."""
    held = {"start": period.start, "end": period.end, "steps": period.steps, "probes": period.probes}
    put(json.dumps(held).encode(), file)


def read(file: Path, steps: int) -> Period | None:
    """None if there is no such file, or it does not hold a period of so many steps."""
    try:
        if file.stat().st_size > 2**20:
            return None
        held = json_of(file.read_bytes())
        probes = tuple((a, b, float(f)) for a, b, f in held["probes"])
        windows = [(held["start"], held["end"]), *((a, b) for a, b, _ in probes)]
        sound = all(type(a) is int and type(b) is int and 0 <= a < b <= steps for a, b in windows)
        if held["steps"] != steps or not sound or not all(math.isfinite(f) for _, _, f in probes):
            return None
        return Period(held["start"], held["end"], steps, probes)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
