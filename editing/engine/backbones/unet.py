"""UNets whose transformer blocks read the text in a cross-attention of their own, `attn2`: SD1.x, SD2.x, SDXL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialVideoTransformer, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ...edits.blocks import BlockKey
from ...edits.digest import digest
from ..backbone import Backbone, register_backbone
from ..obstacles import own_forward
from ..rows import said
from ..run import CALL, Call, Run

# The replacement of attention-couple-ComfyUI and ComfyCouple: attends to the regions' texts, whatever text it is given.
OWN_TEXTS = "AttentionCouple.make_patch."
POOLED = 1280  # of the numbers that SDXL and its refiner are told: CLIP-G's pooled text, before the picture's sizes
FAMILIES = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}  # by the width of the text


@register_backbone
class UNet(Backbone):
    supports = "SD1.x, SD2.x and SDXL"
    adds_noise = True
    values_apart = True
    transformers: tuple[BasicTransformerBlock, ...] = ()
    sides = ("input", "middle", "output")

    @classmethod
    def of(cls, network: torch.nn.Module, name: str) -> UNet | None:
        blocks = cross_attentions(network) if isinstance(network, UNetModel) else {}
        if not blocks:
            return None
        width = next(iter(blocks.values())).attn2.to_k.in_features
        family = FAMILIES.get(width, f"width-{width}")
        attentions = {key: block.attn2 for key, block in blocks.items()}
        unet = cls(name, width, attentions, fingerprint(family, blocks), family)
        unet.transformers = tuple(blocks.values())
        unet.pooled = POOLED if network.num_classes == "sequential" and width in (2048, 1280) else 0
        return unet

    def foreign(self) -> str:
        found = [own_forward(module) for block in self.transformers for module in (block, block.attn2)]
        return ", ".join(dict.fromkeys(name for name in found if name))

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
            self.text_is_read(call, attn2)
            patches["attn2_patch"] = [*patches.get("attn2_patch", ()), self.context_patch]
        return {**options, "patches": patches, "patches_replace": slots}

    def text_is_read(self, call: Call, attn2: Mapping[Any, Any]) -> None:
        """Raise if another pack's replacement reads other texts than the one that is changed."""
        read = [(call.plan.specs[i], key) for i in call.plan.texts for key in call.plan.chosen[i]]
        for spec, key in read:
            before = call.previous.get(key, attn2.get(key, attn2.get(key[:2])))
            if before is not None and OWN_TEXTS in said(before):
                raise spec.error(
                    f"the edit was not applied: {said(before)} gives the attentions keys and values of its own for "
                    "each region, which no change of the prompt reaches. Put the Attention Couple of ComfyUI-ppm or of "
                    "comfyui-prompt-control in its place, or Offset Conditioning behind the prompt of each region"
                )

    def replace(self, key: BlockKey, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        """An `attn2` replacement. q: [B, N, C]; k, v: [B, L, C]; returns [B, N, C], before `to_out`."""
        before = extra[CALL].previous.get(key)
        A = attention(q, k, v, extra) if before is None else before(q, k, v, extra)
        return self.run.attended(key, A, q, k, v, extra, before is not None)

    def patch(self, n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """An `attn2_patch`: the text that keys and values are made of. context, value: [B, L, W]."""
        return n, *self.run.text((*extra["block"], extra.get("block_index", 0)), context, value, extra)


def attention(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    """The host's own attention, as a block without a replacement calls it; Sage and Flash overrides still apply.

    q: [B, N, C]; k, v: [B, T, C], the heads side by side in C.
    """
    return optimized_attention(
        q, k, v, extra["n_heads"], attn_precision=extra.get("attn_precision"), transformer_options=extra
    )


def fingerprint(family: str, blocks: Mapping[BlockKey, BasicTransformerBlock]) -> str:
    """Of the family and the shapes of all that reads the text: the same for models that differ in weights alone."""
    shapes = [(key, block.attn2.to_k.in_features, block.attn2.to_k.out_features) for key, block in blocks.items()]
    return f"{family} {digest(shapes)[:12]}"


def cross_attentions(unet: UNetModel) -> dict[BlockKey, BasicTransformerBlock]:
    """The transformer blocks that read the text, by the host's keys."""
    middle = [] if unet.middle_block is None else [unet.middle_block]
    found = {}
    for side, blocks in (("input", unet.input_blocks), ("middle", middle), ("output", unet.output_blocks)):
        for i, block in enumerate(blocks):
            within = list(down_to_transformers(block))
            if any(isinstance(module, SpatialVideoTransformer) for module in within):
                return {}  # its temporal blocks share their keys with the spatial ones, and it reads an image, no text
            transformers = [module for module in within if isinstance(module, BasicTransformerBlock)]
            found.update({(side, i, j): t for j, t in enumerate(transformers) if t.attn2 is not None})
    return found


def down_to_transformers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A block and all that it is made of, but for what transformer blocks are made of: most of a UNet."""
    yield module
    if not isinstance(module, BasicTransformerBlock):
        for child in module.children():
            yield from down_to_transformers(child)
