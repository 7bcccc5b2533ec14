"""What a training step sees: noisy pictures, the texts, and what the networks answer. And what a method is.

Noise levels (sigma) are in units of the clean latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..changes import Changes
from ..loop import Predict, Text


class Watched(Predict, Protocol):
    def attentions(self, z: Tensor, sigma: Tensor, text: Text) -> list[Tensor]:
        """The probabilities of every cross-attention, each [B, H, N, T]."""


@dataclass
class Moment:
    """One step's pictures z_t [B, 4, h, w] of noise levels sigma [B], and a text of B rows each: the concept c, what it
    is to become, and the empty prompt. said: for each row, the positions that say the concept.

    theta are the original weights, theta' those that are trained.
    """

    predict: Watched
    changes: Changes
    z: Tensor
    sigma: Tensor
    c: Text
    guide: Text
    empty: Text
    said: Sequence[Sequence[int]]
    eta: float
    clean: Tensor | None = None  # the picture in z as theta' last saw it

    def trained(self, text: Text) -> Tensor:
        """eps of theta', with its gradient."""
        (e,) = self.predict(self.z, self.sigma, text)
        self.clean = self.z - self.sigma[:, None, None, None] * e.detach()
        return e

    @torch.no_grad()
    def current(self, text: Text) -> Tensor:
        """eps of theta', as a target."""
        return self.predict(self.z, self.sigma, text)[0]

    @torch.no_grad()
    def original(self, text: Text) -> Tensor:
        """eps of theta."""
        with self.changes.off():
            return self.predict(self.z, self.sigma, text)[0]

    def attentions(self, text: Text) -> list[Tensor]:
        """What the pictures' positions read of a text's tokens in theta', with the gradient: [B, H, N, T] each."""
        return self.predict.attentions(self.z, self.sigma, text)


@dataclass(frozen=True)
class Method:
    """loss: of a moment. weights: which are trained (changes.WEIGHTS). source: where z_t comes from, SOURCES.

    average: m of the average of theta' over its steps that is the result; 0 for theta' itself.
    """

    loss: Callable[[Moment], Tensor]
    weights: str
    source: str
    average: float = 0.0


# A picture of the concept that theta' (or its average, if the method has one) is just drawing; or theta's finished
# pictures of the concept, or of what it is to become, and noise.
SOURCES = ("path", "of the concept", "of the guide")
