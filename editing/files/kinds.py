"""What each kind of learned file may hold. A kind is a row of KINDS; how a row may change later, migrate.py says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..gates.features import CHANNELS

if TYPE_CHECKING:
    from .artefacts import Artefact

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Feature:
    """What files of a kind may hold since a version, if they say so: more tensors, or other mechanisms."""

    version: int
    tensors: Mapping[str, Shape] = field(default_factory=dict)
    mechanisms: tuple[str, ...] = ()

    def used(self, artefact: Artefact) -> bool:
        names = {name.removesuffix("?") for name in self.tensors}
        return artefact.mechanism in self.mechanisms or not names.isdisjoint(artefact.tensors)


@dataclass(frozen=True)
class Older:
    """A version of a kind whose row was another: that row, and what makes such an artefact one of the next version."""

    tensors: Mapping[str, Shape]
    up: Callable[[Artefact], Artefact]


@dataclass(frozen=True)
class Kind:
    """Tensor name -> shape, all fp32 and finite.

    A letter in a shape stands for any number that is the same in the whole file; W is the metadata's text_width and
    T its tokens. A name that ends in "?" may be missing. unfinished: those that only going on with a training needs.
    """

    tensors: Mapping[str, Shape]
    unfinished: frozenset[str] = frozenset()
    limit: int = 2**26  # bytes of the whole file
    features: Mapping[str, Feature] = field(default_factory=dict)
    older: tuple[Older, ...] = ()  # from version 1 on


def network_tensors() -> dict[str, Shape]:
    return {
        f"layers.{i}.{name}": shape
        for i, (a, b) in enumerate(pairwise(CHANNELS))
        for name, shape in (("0.weight", (b, a, 3, 3)), ("0.bias", (b,)), ("1.weight", (b,)), ("1.bias", (b,)))
    }


KINDS: dict[str, Kind] = {
    "direction": Kind(
        {
            "b": ("T", 1),
            "a": (1, "W"),
            "adam.b?": (2, "T", 1),
            "adam.a?": (2, 1, "W"),
            "z?": ("B", "C", "H", "X"),
            "losses?": ("steps",),
        },
        unfinished=frozenset({"adam.b", "adam.a", "z", "losses"}),
    ),
    "eiup-weight": Kind(
        {
            "mean": ("B",),
            "spread": ("B",),
            "0.weight": (64, "B"),
            "0.bias": (64,),
            "2.weight": (32, 64),
            "2.bias": (32,),
            "4.weight": (1, 32),
            "4.bias": (1,),
        }
    ),
    "discriminator": Kind({"mean": ("F",), "spread": ("F",), "w": ("F",), "b": (1,), "probe": ("F",)}),
    "features": Kind(network_tensors()),
    "prompt": Kind({"k": ("T", "W"), "v": ("T", "W")}),
    "checkpoint": Kind(  # of any training: what is learned and Adam's moments, flat, and what it learns from
        {
            f"{learned}{part}?": (1,) if part == ".t" else (learned,)
            for learned in ("weights", "prompt", "learned", "direction")
            for part in ("", ".m", ".v", ".t")
        }
        | {"z?": ("Z",), "position?": (1,), "losses": ("steps",)},
        limit=2**35,
        features={"an average over the steps": Feature(2, {"average?": ("weights",)})},
    ),
    "kpop-checkpoint": Kind(  # before there was one kind for all
        {
            "weights": ("N",),
            "adam.m": ("N",),
            "adam.v": ("N",),
            "adam.t": (1,),
            "prompt.k": ("P",),
            "prompt.v?": ("P",),
            "prompt.adam.m": ("M",),
            "prompt.adam.v": ("M",),
            "prompt.adam.t": (1,),
            "z": ("Z",),
            "losses": ("steps",),
        },
        limit=2**35,
    ),
    "concept": Kind({"learned": ("T", "W"), "empty": ("L", "W"), "neutral?": ("L", "W")}),
    "concept-checkpoint": Kind(
        {"learned": ("N",), "adam.m": ("N",), "adam.v": ("N",), "adam.t": (1,), "losses": ("steps",)}
    ),
}


def check_tensors(header: Mapping[str, Any], allowed: Mapping[str, Shape], body: int) -> dict[str, int]:
    """The sizes that the letters of a row's shapes stand for. header: a file's, without its metadata; body: the bytes
    behind it. Raises ValueError if a tensor is not as the row says."""
    sizes: dict[str, int] = {}
    shapes = {name.removesuffix("?"): shape for name, shape in allowed.items()}
    if unknown := header.keys() - shapes.keys():
        raise ValueError(f"it has a tensor {min(unknown)[:40]!r}, which does not belong there")
    if missing := {name for name in allowed if not name.endswith("?")} - header.keys():
        raise ValueError(f"it lacks the tensor {min(missing)!r}")
    numbers = sum(check_tensor(name, entry, shapes[name], sizes) for name, entry in header.items())
    if 4 * numbers != body:
        raise ValueError(f"its tensors cannot be read: they take {4 * numbers} bytes, and the file has {body} for them")
    return sizes


def check_tensor(name: str, entry: Any, row: Shape, sizes: dict[str, int]) -> int:
    """How many numbers it has. sizes: of the letters that are known, to which it adds."""
    dtype, shape = (entry.get(key) for key in ("dtype", "shape")) if isinstance(entry, dict) else (None, None)
    if dtype != "F32":
        raise ValueError(f"its tensor {name} has the dtype {str(dtype)[:20]}, not F32")
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"its tensor {name} has no shape")
    known = dict(sizes)
    wanted = [sizes.setdefault(n, m) if isinstance(n, str) else n for n, m in zip(row, shape, strict=False)]
    if shape != wanted or len(shape) != len(row):
        raise ValueError(f"its tensor {name} has the shape {str(shape)[:60]}, not {written(row, known)}")
    return math.prod(shape)


def written(shape: Shape, sizes: Mapping[str, int]) -> str:
    return f"[{', '.join(str(sizes.get(n, n) if isinstance(n, str) else n) for n in shape)}]"
