"""Diffusion transformers that read the text in a cross-attention of their own: Wan.

Weights alone tell a concept's keys and values there, so all edits act as in a UNet. The blocks are reached by the
host's `optimized_attention_override`, around whatever another pack has put there; their cross-attentions are told from
the others by their keys, as many as the text has tokens, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...edits.blocks import BlockKey
from ...edits.digest import Shared, digest
from ..backbone import Backbone, register_backbone
from ..run import CALL, Call, Run
from ..streams import ModelCall
from .joint import OVERRIDE, through


@dataclass
class CrossAttention(Shared):
    """One block's, from the text as the model is called with it."""

    heads: int
    to_k: Callable[[Tensor], Tensor]
    to_v: Callable[[Tensor], Tensor]


@dataclass
class Place(Shared):
    """text: tokens of the model call; count: cross-attentions that have been called."""

    text: int
    count: int = 0


@register_backbone
class Wan(Backbone):
    supports = "Wan (text to video)"
    sides = ("block",)

    @classmethod
    def of(cls, network: torch.nn.Module, name: str) -> Wan | None:
        model: Any = network
        if type(model).__name__ != "WanModel" or type(model.blocks[0].cross_attn).__name__ != "WanT2VCrossAttention":
            return None

        def attention(attn: Any) -> CrossAttention:
            def to_k(tokens: Tensor) -> Tensor:
                return attn.norm_k(attn.k(model.text_embedding(tokens)))

            def to_v(tokens: Tensor) -> Tensor:
                return attn.v(model.text_embedding(tokens))

            return CrossAttention(attn.num_heads, to_k, to_v)

        blocks: dict[BlockKey, Any] = {
            ("block", i, 0): attention(block.cross_attn) for i, block in enumerate(model.blocks)
        }
        width = model.text_embedding[0].in_features
        return cls(name, width, blocks, f"Wan {digest((width, model.dim, list(blocks)))[:12]}", "Wan")

    def hooks(self, run: Run) -> CrossHooks:
        return CrossHooks(run, self)

    def prepare(self, run: Run, call: Call, made: ModelCall, executor: Callable[..., Tensor]) -> ModelCall:
        """The text as edits of the text make it, for all blocks alike: `admit` has seen to that."""
        call.place = Place(made.context.shape[1])
        if call.plan.texts:
            text, options = made.context, made.more["transformer_options"]
            made.more["c_crossattn"], _ = run.text(next(iter(self.blocks)), text, text, options)
            call.read.update(dict.fromkeys(self.blocks))
        return made

    def admit(self, spec: Any) -> None:
        super().admit(spec)
        if spec.method == "direction" and self.chosen(spec.blocks, spec.node) != set(self.blocks):
            raise spec.error(
                f'blocks is "{spec.blocks}", but {self.name} reads its text once, before the first block; set it to all'
            )


@dataclass
class CrossHooks:
    """One override for all attentions."""

    run: Run
    backbone: Wan

    def install(self, options: dict[str, Any], call: Call) -> dict[str, Any]:
        call.previous = {OVERRIDE: options[OVERRIDE]} if options.get(OVERRIDE) else {}
        return {**options, OVERRIDE: self.attention}

    def attention(self, plain: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **more: Any) -> Tensor:
        """q: [B, N, C]; k, v: [B, L, C]."""
        extra = more["transformer_options"]
        call: Call = extra[CALL]
        A = through(call.previous.get(OVERRIDE), plain, q, k, v, heads, *args, **more)
        if k.shape[1] != call.place.text or q.shape[1] == k.shape[1]:
            return A
        key = tuple(self.backbone.blocks)[call.place.count % len(self.backbone.blocks)]
        call.place.count += 1
        shape = (len(q), 1, 1, q.shape[1])
        return self.run.attended(key, A, q, k, v, {**extra, "activations_shape": shape}) if call.reaches(key) else A
