"""Edits that change what a guider makes of its prompts' predictions: one more prediction, in the host's own batch.

x: [B, C, h, w], noisy latents; the noise level of a call (sigma) is in units of the clean latent (of a model of flows,
from 0 to 1).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..edits.spec import EditSpec
from .conds import Named, positive

Conds = list[dict[str, Any]]


class Guidance:
    """One call of the host's batching, with the concept in a further list of prompts for each edit.

    A third list has the conditionings of the positive one, each with the concept in the place of its text and all else
    the same: size, area, ControlNet, and the pooled text of SDXL. So the host can put them into one batch.
    """

    def __init__(self, run: Any, specs: Sequence[EditSpec], sigma: float) -> None:
        self.run, self.sigma = run, sigma
        active = run.active(specs, sigma) if any(spec.how.stage == "guidance" for spec in specs) else ()
        self.specs = [spec for spec in active if spec.how.stage == "guidance"]

    def asked(self, conds: Sequence[Conds | None], names: Sequence[str | None]) -> list[Conds]:
        """The further lists. conds, names: the call's own; none where it is not one of guidance: a positive prompt and
        another that it is held against."""
        here = [i for i, each in enumerate(conds) if each]
        self.prompts = [i for i in here if positive(names[i])]
        self.against = [i for i in here if not positive(names[i])]
        if not self.prompts or len(self.against) != 1:
            self.specs = []
        return [instead(conds[self.prompts[0]], spec) for spec in self.specs]  # type: ignore[arg-type]

    def changed(self, out: list[Tensor], x: Tensor, window: Any) -> list[Tensor]:
        """The clean images that the host's own prompts predict, [B, C, ...] each, without those of `asked`; the
        positive ones as the edits leave them."""
        own = list(out[: len(out) - len(self.specs)])
        step = self.run.account.step(self.sigma)
        for spec, third in zip(self.specs, out[len(own) :], strict=True):
            s = torch.tensor(spec.strengths(len(x), window), device=x.device).view(-1, *[1] * (x.ndim - 1))
            for i in self.prompts:
                e_p, e_0, e_S = ((x.float() - D.float()) / self.sigma for D in (out[i], out[self.against[0]], third))
                momentum = self.run.momenta.setdefault((spec, i, window), spec.how.momentum(spec))
                taken = momentum.guided(e_p, e_0, e_S, step, spec.options)
                own[i] = (own[i].float() + s * self.sigma * taken).where(s != 0, own[i].float()).to(own[i].dtype)
            self.run.account.guided(self.run.origin.get(spec, spec), step, len(x))
        return own


def instead(conds: Conds, spec: EditSpec) -> Conds:
    """The conditionings of a prompt with the concept's phrasings in the place of its text, as one long prompt."""
    tokens = torch.cat([phrase.tokens for phrase in spec.source.phrases], 1)
    out = []
    for cond in conds:
        text = cond.get("model_conds", {}).get("c_crossattn")
        if text is None:
            raise spec.error("the prompt has no text encoding that the concept could stand in for; use another edit")
        other = type(text)(tokens.to(text.cond.device, text.cond.dtype))
        out.append({**cond, "model_conds": {**cond["model_conds"], "c_crossattn": other}, "uuid": uuid.uuid4()})
    return out


def batched(
    run: Any,
    specs: Sequence[EditSpec],
    x: Tensor,
    sigma: float,
    conds: Sequence[Any],
    window: Any,
    call: Callable[[list[Any], Named], list[Tensor]],
) -> list[Tensor]:
    """One call of the host's batching, through all edits of guidance. call: the host's, of lists of prompts and who
    they are."""
    guidance = Guidance(run, specs, sigma)
    more = guidance.asked(conds, run.guiders.named(conds, len(x)).names) if guidance.specs else []
    lists = [*conds, *more]
    return guidance.changed(call(lists, run.guiders.named(lists, len(x))), x, window)
