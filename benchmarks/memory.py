"""What each eraser of the table `peers` takes of memory while a picture is drawn, beside the unedited model.

Counted, not sampled: the bytes of all of torch's tensors that are made in the run and are still there, at their most.
What torch's kernels need within one operation, and the weights that were there before, are no part of it; weights that
the host patches for the run are.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .peers import ARCHITECTURES, METHODS, NAMES, SEED, TRAINED, Eraser, Pictures, phrasings, trained
from .sampling import Demo
from .table import Row, Table


class Peak(TorchDispatchMode):
    """most: of the bytes of the tensors that are made under it and still there."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()  # storages that are there, by id
        self.now = self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.meet((args, kwargs), counted=False)  # what came from elsewhere
        out = func(*args, **(kwargs or {}))
        self.meet(out, counted=True)
        return out

    def meet(self, values: Any, counted: bool) -> None:
        for each in tree_leaves(values):
            if isinstance(each, Tensor) and id(storage := each.untyped_storage()) not in self.known:
                bytes_of = storage.nbytes() if counted else 0
                self.known.add(id(storage))
                self.now += bytes_of
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, id(storage), bytes_of)

    def gone(self, storage: int, bytes_of: int) -> None:
        self.known.discard(storage)
        self.now -= bytes_of


class Undrawn:
    """In the place of a VAE, whose decoder would take more than all of the sampling."""

    def decode(self, z: Tensor) -> Tensor:
        return torch.zeros(len(z), 1, 1, 3)


@cache
def ready(architecture: str) -> Demo:
    """A Demo of its own, of two steps, that only samples."""
    made = Demo.ready(architecture)
    made.steps, made.vae = 2, Undrawn()
    return made


def most_of(work: Pictures, model: Any, name: str) -> int:
    """Bytes at the peak of sampling one picture that names the concept; the unedited model was used before."""
    work.demo.pictures(work.demo.model, ["a cat"], SEED)
    gc.collect()
    with Peak() as peak:
        work.drawn_of(model, [f"a picture of {name}"], [name])
    return peak.most


def eraser(method: str) -> Eraser:
    """As the table has it; what is trained is trained for one step, which takes as much."""
    return trained(method, 1) if method in TRAINED else METHODS[method]


@cache
def unedited(architecture: str, name: str) -> int:
    work = Pictures(ready(architecture), METHODS["unedited"], SEED)
    return most_of(work, work.demo.model, name)


def row(architecture: str, method: str, name: str) -> Row:
    named: Row = {"architecture": architecture, "method": method}
    work = Pictures(ready(architecture), eraser(method), SEED)
    model = work.without(phrasings(name))
    most, plain = most_of(work, model, name), unedited(architecture, name)
    return named | {
        "peak, MB": most / 1e6,
        "more than unedited, MB": (most - plain) / 1e6,
        "times unedited": most / plain,
        "carries, KB": work.carried / 1024,
    }


def rows(
    methods: Sequence[str] = tuple(METHODS),
    architectures: Sequence[str] = ARCHITECTURES,
    name: str = NAMES[0],
) -> Iterator[Row]:
    """A row for each method on each architecture that it is not refused on; the table `peers` says why."""
    for architecture in architectures:
        for method in methods:
            with suppress(ValueError):
                yield row(architecture, method, name)


TABLES = (
    Table(
        "peers-memory",
        "What other erasers take of memory",
        f"One picture's sampling, {NAMES[0]} erased, positive and negative in one batch, two steps, fp32: the most "
        "bytes of tensors that the run made and still held, patched weights among them; the model's own weights and "
        "the VAE are not. What a MODEL carries, patches or texts, is there between runs as well.",
        rows,
        partial(rows, ("unedited", "CRE", "UCE"), ("unet",)),
        ("architecture", "method"),
    ),
)
