"""The demo model in ComfyUI's own classes: an SD1-shaped UNet, CLIP's tokenizer and text model, and a small encoder
whose tokens let an example picture stand in a prompt for words."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import world

WIDTH = 128  # of the text tokens
TOKENS = 77
START, END = 49406, 49407  # CLIP's special tokens; END pads
VOCABULARY = 49408
IMAGE_TOKENS = 4  # the first half learns to say the object, the second half its style

UNET_CONFIG: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 3],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "context_dim": WIDTH,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_checkpoint": False,
    "legacy": False,
}
HEADS = {"num_heads": 4, "num_head_channels": -1}
TEXT_CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 4 * WIDTH,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": TOKENS,
    "eos_token_id": END,
}


def build_unet(dtype: torch.dtype = torch.float32) -> nn.Module:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        **UNET_CONFIG, **HEADS, dtype=dtype, device=torch.get_default_device(), operations=comfy.ops.disable_weight_init
    )


class ReferenceEncoder(nn.Sequential):
    """A picture [b, 3, 64, 64] in [0, 1] to the tokens that stand for it: [b, IMAGE_TOKENS, WIDTH]."""

    def __init__(self) -> None:
        def down(i: int, o: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.SiLU()]

        super().__init__(
            *down(3, 32),
            *down(32, 64),
            *down(64, 128),
            *down(128, 64),
            nn.Flatten(),
            nn.Linear(64 * 16, IMAGE_TOKENS * WIDTH),
            nn.Unflatten(1, (IMAGE_TOKENS, WIDTH)),
        )


def split_reference(tokenize, text: str, image_tokens: list[Any]) -> list[Any]:
    """Token ids of a caption with `image_tokens` where `<image>` stands, as CLIP frames and pads them: 77 entries."""
    if text.count(world.REFERENCE) > 1:
        raise ValueError(f"{world.REFERENCE} may stand once in a prompt")
    before, marker, after = text.partition(world.REFERENCE)
    ids = [*tokenize(before), *(image_tokens if marker else []), *tokenize(after)][: TOKENS - 2]
    return [START, *ids, *[END] * (TOKENS - 1 - len(ids))]
