"""UNets of the real sizes with random weights: the host's own configurations, nothing downloaded.

The host recognises a diffusers checkpoint by a few of its tensors' names and shapes; `fingerprint` writes those alone,
on torch's meta device, and the host does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_detection
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

BUFFER = 2**22 - 3  # random numbers that all weights are cut from; no divisor of any of their sizes


@dataclass(frozen=True)
class Shape:
    """depth: transformer blocks in each SpatialTransformer, level by level; adm: width of the pooled conditioning."""

    channels: int
    context: int
    adm: int | None
    depth: tuple[int, ...]
    attentions: int  # cross-attentions in all


SHAPES = {
    "SD1.5": Shape(320, 768, None, (1, 1, 1, 0), 16),
    "SD2.1": Shape(320, 1024, None, (1, 1, 1, 0), 16),
    "SDXL": Shape(320, 2048, 2816, (0, 2, 10), 70),
    "SDXL refiner": Shape(384, 1280, 2560, (0, 4, 4, 0), 44),
}


def fingerprint(shape: Shape) -> dict[str, Tensor]:
    """The tensors of a diffusers checkpoint that tell its architecture."""

    def entries() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "conv_in.weight", (shape.channels, 4, 3, 3)
        if shape.adm:
            yield "add_embedding.linear_1.weight", (4 * shape.channels, shape.adm)
        for i, depth in enumerate(shape.depth):
            for j in range(2):
                yield f"down_blocks.{i}.resnets.{j}.conv1.weight", (1,)
                for t in range(depth):
                    key = f"down_blocks.{i}.attentions.{j}.transformer_blocks.{t}.attn2.to_k.weight"
                    yield key, (1, shape.context)

    return {name: torch.empty(size, device="meta") for name, size in entries()}


def build(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ModelPatcher:
    """A MODEL of that shape; device "meta" allocates nothing and serves for looking only."""
    found = comfy.model_detection.unet_config_from_diffusers_unet(fingerprint(SHAPES[name]))
    config = comfy.model_detection.model_config_from_unet_config({**found, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    place = torch.device(device)
    model = config.get_model({}, device=place)
    if device != "meta":
        fill(model.diffusion_model)
        model = model.to(place)
    return ModelPatcher(model, load_device=place, offload_device=place)


@torch.no_grad()
def fill(unet: torch.nn.Module, seed: int = 0) -> None:
    """Weights that keep the size of what passes; cut from one buffer, as drawing billions takes minutes."""
    buffer = torch.randn(BUFFER, generator=torch.Generator().manual_seed(seed))
    at = 0
    for name, weight in unet.named_parameters():
        scale = 0.7 * weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        place, start = weight.view(-1), 0
        while start < len(place):  # from where the last weight ended, round and round
            n = min(len(place) - start, BUFFER - at)
            place[start : start + n] = buffer[at : at + n] * scale
            start, at = start + n, (at + n) % BUFFER
        if weight.ndim == 1 and "norm" in name and name.endswith("weight"):
            weight.add_(1)


def conditioning(name: str, batch: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """What a model call takes besides the latent: text tokens and, for SDXL, the pooled conditioning."""
    shape, generator = SHAPES[name], torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, 77, shape.context, generator=generator).to(device, dtype)
    pooled = torch.randn(batch, shape.adm, generator=generator).to(device, dtype) if shape.adm else None
    return tokens, pooled
