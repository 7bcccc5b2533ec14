"""Safe latent diffusion: guidance away from a concept that the prompt's own prediction is near to (CVPR 2023).

With three predictions of the noise, of the empty (or negative) prompt e_0, the prompt e_p and the concept e_S:

    s     = min(1, |e_p - e_S| s_S)                     elementwise
    mu    = s where e_p - e_S < lambda, else 0
    gamma = mu (e_S - e_0) + s_m nu
    nu    = beta nu + (1 - beta) gamma                  from the first step on, nu_0 = 0
    e     = e_0 + s_g (e_p - e_0 - gamma)               without gamma in the first `warmup` steps

which is what any guidance makes of e_p - gamma instead of e_p, so that is what is handed on. Steps are the sampler's
(the settings were published for 50 of them); where it calls the model between them, nu is the step's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..edits.method import Method, register
from ..edits.spec import Concept, EditSpec
from ..presets.parts import ConceptEdit


@dataclass(frozen=True)
class SLDOptions:
    """scale: s_S, below 1 off; threshold: lambda; warmup: steps; momentum: s_m; beta: beta_m."""

    scale: float = 1000.0
    threshold: float = 0.01
    warmup: int = 10
    momentum: float = 0.3
    beta: float = 0.4

    def __post_init__(self) -> None:
        for name in ("scale", "threshold", "momentum"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; give a finite number")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}; give a number of steps, 0 for none")
        if not 0 <= self.beta < 1:  # catches NaN as well
            raise ValueError(f"beta is {self.beta}; give a number from 0 (forget at once) to below 1")


# As published. Of "weak" two scales are: 200, of most implementations, and 20.
SETTINGS: Mapping[str, SLDOptions] = {
    "weak": SLDOptions(200.0, 0.0, 15, 0.0, 0.0),
    "medium": SLDOptions(),
    "strong": SLDOptions(2000.0, 0.025, 7, 0.5, 0.7),
    "max": SLDOptions(5000.0, 1.0, 0, 0.5, 0.7),
}


def gamma(e_p: Tensor, e_0: Tensor, e_S: Tensor, nu: Tensor | float, options: SLDOptions) -> Tensor:
    """What is taken from e_p, with the momentum nu. All [B, C, ...], fp32."""
    s = ((e_p - e_S).abs() * options.scale).clamp_max(1)
    mu = s.where(e_p - e_S < options.threshold, 0)
    return mu * (e_S - e_0) + options.momentum * nu


@dataclass
class Momentum:
    """nu of one run of sampling. step: the one it stands at; nu: with which that step reckons; then: the next one."""

    step: int = -1
    nu: Tensor | float = 0.0
    then: Tensor | float = 0.0

    def guided(self, e_p: Tensor, e_0: Tensor, e_S: Tensor, step: int, options: SLDOptions) -> Tensor:
        """gamma, or 0 while the guidance warms up; e_p, e_0, e_S: [B, C, ...]."""
        if step != self.step:
            self.step, self.nu = step, self.then
        g = gamma(e_p, e_0, e_S, self.nu, options)
        self.then = options.beta * self.nu + (1 - options.beta) * g
        return g if step >= options.warmup else torch.zeros_like(g)


class SLDEdit(ConceptEdit):
    method: Literal["SLD"]
    scale: Annotated[float, Field(ge=0, le=1e5)] = 1000.0
    threshold: Annotated[float, Field(ge=-10, le=10)] = 0.01
    warmup: Annotated[int, Field(ge=0, le=1000)] = 10
    momentum: Annotated[float, Field(ge=0, le=4)] = 0.3
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.4
    blocks: Literal["all"] = "all"  # it is the whole prediction that is guided


class SLD(Method):
    name, label, order = "guidance", "SLD", 90
    source, options, document = Concept, SLDOptions, SLDEdit
    stage = "guidance"

    def complaint(self, spec: EditSpec) -> str | None:
        if spec.blocks.strip() != "all":
            return f'blocks is "{spec.blocks}", but guidance has no blocks; write "all"'
        if spec.rows != "conditional":
            return (
                f'rows is "{spec.rows}", but guidance changes the prediction of the positive prompt; choose conditional'
            )
        return None

    def admit(self, spec: EditSpec, backbone: Any) -> None:
        if not backbone.adds_noise:
            raise spec.error(
                f"the noise that {backbone.name} predicts is of another kind; use Erase Concept (CRE) there"
            )

    def idle(self, spec: EditSpec) -> bool:
        return spec.options.scale < 1

    def momentum(self, spec: EditSpec) -> Momentum:
        return Momentum()

    def to_document(self, spec: EditSpec, saver: Any, common: dict[str, Any]) -> SLDEdit:
        return SLDEdit(method="SLD", concept=saver.concept(spec.source), **common, **vars(spec.options))

    def from_document(self, edit: SLDEdit, maker: Any) -> dict[str, Any]:
        options = SLDOptions(edit.scale, edit.threshold, edit.warmup, edit.momentum, edit.beta)
        return dict(source=maker.concept(edit.concept), options=options)

    def described(self, edit: SLDEdit) -> str:
        return f"Guides away from {edit.concept.said()} (SLD, scale {edit.scale:g}, strength {edit.strength:g})"


METHOD = register(SLD())
