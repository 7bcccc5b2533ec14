"""The pooled text: one vector of the whole prompt, that some models add to the time (SDXL, Flux.1, SD3). It loses its
projection on the concept's,

    p <- p - s max(0, <p - p0, d> / <d, d>) x,      d = p_c - p0,  x = d, or p_c - p_r where p_r is drawn instead

phrase by phrase, p0 being what the concept is compared with. And as in cre.py, p stays where it is more like one of
the concept's kept prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..edits.spec import EditSpec

OnPooled = Callable[[Tensor, Tensor], Tensor]  # (p [R, P], s [R]) to what the model is told instead


@dataclass(frozen=True)
class Pooled:
    """A concept's: p_c and x, [K, P] each; p_0, [P]; kept prompts' less that, [M, P]; all fp32."""

    d: Tensor
    x: Tensor
    base: Tensor
    keep: Tensor

    def __call__(self, p: Tensor, s: Tensor) -> Tensor:
        if p.shape[-1] != len(self.base):
            return p
        a = p.float() - self.base
        near = (a @ torch.nn.functional.normalize(self.keep, dim=-1).T).amax(-1) if len(self.keep) else None
        for d, x in zip(self.d, self.x, strict=True):
            along = a @ d
            c = (along / d.square().sum().clamp_min(1e-12)).clamp_min(0)
            if near is not None:
                c = c * (along / d.norm().clamp_min(1e-12) >= near)
            a = a - (s * c)[:, None] * x
        return (a + self.base).to(p.dtype)


def pooled_edit(spec: EditSpec, device: torch.device) -> OnPooled | None:
    """What an edit of a concept does to the pooled text, if the concept knows its own."""
    concept: Any = spec.source
    if concept.pooled is None:
        return None
    base = concept.pooled.to(device)
    found = [phrase.pooled.to(device) for phrase in concept.phrases if phrase.pooled is not None]
    if not found:
        return None
    p_c = torch.cat(found)
    x = p_c - (base if concept.pooled_instead is None else concept.pooled_instead.to(device))
    kept = [phrase.pooled.to(device) for phrase in concept.keep if phrase.pooled is not None]
    keep = torch.cat(kept) - base if kept else base.new_zeros(0, base.shape[-1])
    return Pooled(p_c - base, x, base[0], keep)
