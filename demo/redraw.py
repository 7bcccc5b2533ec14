"""Latents as the demo UNet gives them back, for the decoder to learn from.

A small UNet's latents are smeared in ways that noise does not teach. In a world of few drawings a decoder that has seen
those smears knows which drawing was meant, and draws it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import model, world
from .train_flow import readers
from .train_unet import IMAGE, cosine_alphas

EARLIEST, LATEST = 0.05, 0.4  # of the schedule: where the latents are noised to; later ones are means of drawings
GUIDANCE = 4.0  # at most


class Redraw:
    """`state`: of a UNet's training, whose average redraws."""

    def __init__(self, state: dict[str, Any], tokenize: Any) -> None:
        self.text, self.reference = readers(state["average"], state["used"])
        self.unet = model.build_unet(torch.bfloat16)
        self.unet.load_state_dict(
            {k.removeprefix("unet."): v for k, v in state["average"].items() if k.startswith("unet.")}
        )
        self.unet.requires_grad_(False)
        self.tokenize, self.alphas = tokenize, cosine_alphas()

    def context(self, captions: list[str]) -> Tensor:
        ids = torch.tensor([model.split_reference(self.tokenize, text, [IMAGE] * 4) for text in captions])
        return self.text(ids, ids.new_zeros(0, model.WIDTH).float())

    @torch.no_grad()
    def __call__(self, pictures: list[world.Picture], z: Tensor) -> Tensor:
        """The clean latents that the UNet sees in noised ones [n, 4, 16, 16], by the captions and some guidance."""
        n, t = len(z), torch.randint(int(1000 * EARLIEST), int(1000 * LATEST), (len(z),))
        a = self.alphas[t].view(-1, 1, 1, 1)
        noised = a.sqrt() * z + (1 - a).sqrt() * torch.randn_like(z)
        captions = [p.caption.replace(world.REFERENCE, " ".join(p.objects)) for p in pictures]
        context = self.context(captions + [""] * n).bfloat16()
        both = self.unet(
            noised.bfloat16().repeat(2, 1, 1, 1), t.float().repeat(2), context=context, transformer_options={}
        )
        with_words, without = both.float().chunk(2)
        guidance = 1 + (GUIDANCE - 1) * torch.rand(n, 1, 1, 1)
        eps = without + guidance * (with_words - without)
        return (noised - (1 - a).sqrt() * eps) / a.sqrt()
