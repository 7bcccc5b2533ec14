"""How a job tells how far it is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Progress(Protocol):
    """Told that `done` of `most` are done, in a few words, and what there is to see: clean latents [n, 4, h, w].

    What it raises ends the job.
    """

    def __call__(self, done: int, most: int, words: str = "", latents: Tensor | None = None) -> None: ...


def silent(done: int, most: int, words: str = "", latents: Tensor | None = None) -> None:
    """Nobody is told, and nobody stops it. latents: [n, 4, h, w]."""
