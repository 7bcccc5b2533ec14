"""UNets whose transformer blocks read the text in a cross-attention of their own, `attn2`: SD1.x, SD2.x, SDXL."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialVideoTransformer, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ...edits.blocks import BlockKey
from ...edits.digest import digest
from ..backbone import Backbone, register_backbone
from ..run import CALL, Call, Run

FAMILIES = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}  # by the width of the text


@register_backbone
class UNet(Backbone):
    supports = "SD1.x, SD2.x and SDXL"
    sides = ("input", "middle", "output")

    @classmethod
    def of(cls, network: torch.nn.Module, name: str) -> UNet | None:
        blocks = cross_attentions(network) if isinstance(network, UNetModel) else {}
        if not blocks:
            return None
        width = next(iter(blocks.values())).attn2.to_k.in_features
        family = FAMILIES.get(width, f"width-{width}")
        attentions = {key: block.attn2 for key, block in blocks.items()}
        return cls(name, width, attentions, fingerprint(family, blocks), family)

    def hooks(self, run: Run) -> UNetHooks:
        return UNetHooks(run, self.blocks)


class UNetHooks:
    """`attn2` replacements behind those of other packs, and one `attn2_patch` behind all."""

    def __init__(self, run: Run, blocks: Mapping[BlockKey, Any]) -> None:
        self.run = run
        self.replacements = {key: partial(self.replace, key) for key in blocks}
        self.context_patch = self.patch

    def install(self, options: dict[str, Any], call: Call) -> dict[str, Any]:
        patches, slots = dict(options.get("patches", {})), dict(options.get("patches_replace", {}))
        attn2 = slots["attn2"] = dict(slots.get("attn2", {}))
        previous = {}
        for key in filter(call.reaches, self.replacements):
            if (before := attn2.get(key, attn2.get(key[:2]))) is not None:  # the host's precedence
                previous[key] = before
            attn2[key] = self.replacements[key]
        call.previous = previous
        if call.plan.texts:
            patches["attn2_patch"] = [*patches.get("attn2_patch", ()), self.context_patch]
        return {**options, "patches": patches, "patches_replace": slots}

    def replace(self, key: BlockKey, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        """An `attn2` replacement. q: [B, N, C]; k, v: [B, L, C]; returns [B, N, C], before `to_out`."""
        before = extra[CALL].previous.get(key)
        A = attention(q, k, v, extra) if before is None else before(q, k, v, extra)
        return self.run.attended(key, A, q, k, v, extra, before is not None)

    def patch(self, n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """An `attn2_patch`: the text that keys and values are made of. context, value: [B, L, W]."""
        return n, *self.run.text((*extra["block"], extra.get("block_index", 0)), context, value, extra)


def attention(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    """The host's own attention, as a block without a replacement calls it; Sage and Flash overrides still apply."""
    return optimized_attention(
        q, k, v, extra["n_heads"], attn_precision=extra.get("attn_precision"), transformer_options=extra
    )


def fingerprint(family: str, blocks: Mapping[BlockKey, BasicTransformerBlock]) -> str:
    """Of the family and the shapes of all that reads the text: the same for models that differ in weights alone."""
    shapes = [(key, block.attn2.to_k.in_features, block.attn2.to_k.out_features) for key, block in blocks.items()]
    return f"{family} {digest(shapes)[:12]}"


def cross_attentions(unet: UNetModel) -> dict[BlockKey, BasicTransformerBlock]:
    """The transformer blocks that read the text, by the host's keys."""
    if any(isinstance(module, SpatialVideoTransformer) for module in unet.modules()):
        return {}  # its temporal blocks share their keys with the spatial ones, and it reads an image, not a text
    middle = [] if unet.middle_block is None else [unet.middle_block]
    found = {}
    for side, blocks in (("input", unet.input_blocks), ("middle", middle), ("output", unet.output_blocks)):
        for i, block in enumerate(blocks):
            transformers = [module for module in block.modules() if isinstance(module, BasicTransformerBlock)]
            found.update({(side, i, j): t for j, t in enumerate(transformers) if t.attn2 is not None})
    return found
