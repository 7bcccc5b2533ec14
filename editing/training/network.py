"""A MODEL's network as something that gradients flow through: a copy of its own, so that the MODEL stays as it is.

Beside engine/host.py the second module that knows the host. Weights that the host loaded while executing a graph cannot
take part in a backward pass (they are inference tensors), and a MODEL's clones share them: both ask for a copy.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..engine.backbones.unet import cross_attentions
from .learning import Patch, Text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Network:
    """A copy of the diffusion network of a MODEL with its LoRAs, without its edits. Make and use it within `gradients`.

    dtype: what it computes in and keeps the weights as; checkpointing: keep few activations, compute them twice.
    """

    def __init__(self, model: ModelPatcher, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> None:
        unet = model.get_model_object("diffusion_model")
        unet = getattr(unet, "_orig_mod", unet)  # compiled
        blocks = cross_attentions(unet) if type(unet).__name__ == "UNetModel" else {}
        if not blocks:
            raise ValueError(
                f"model: cannot train on {type(model.model).__name__} ({type(unet).__name__}); connect an SD1.x, SD2.x "
                "or SDXL model"
            )
        comfy.model_management.load_models_gpu([model], force_full_load=True)  # its LoRAs are in the weights then
        self.blocks = tuple(sorted({key[:2] for key in blocks}))
        self.width: int = next(iter(blocks.values())).attn2.to_k.in_features
        self.base: Any = model.model
        self.device, self.dtype = model.load_device, dtype
        self.unet = own_copy(unet, dtype)
        self.sampling = copy.deepcopy(model.get_model_object("model_sampling")).to("cpu")
        if self.device.type != "cpu":
            comfy.model_management.unload_all_models()
        self.unet.to(self.device)
        self.sampling.to(self.device)
        if checkpointing:
            for module in self.unet.modules():
                if isinstance(module, (BasicTransformerBlock, ResBlock)):
                    recompute(module)

    def __call__(self, z: Tensor, sigma: Tensor, text: Text, patch: Patch | None = None) -> Tensor:
        x = self.sampling.calculate_input(sigma, z).to(self.dtype)
        t = self.sampling.timestep(sigma).float()
        extra = {key: value.to(self.dtype) for key, value in text.extra.items()}
        options: dict[str, Any] = {"optimized_attention_override": attention}
        if patch is not None:
            options["patches"] = {"attn2_patch": [patch]}
        return self.unet(x, t, context=text.c.to(self.dtype), transformer_options=options, **extra).float()

    def text(self, conditioning: Any, height: int, width: int) -> Text:
        """What the model reads of a CONDITIONING's first entry, for latents of this size."""
        c, about = conditioning[0]
        noise = torch.zeros(1, self.base.latent_format.latent_channels, height, width, device=self.device)
        about = {"width": 8 * width, "height": 8 * height, "prompt_type": "positive", **about}
        found = self.base.extra_conds(**{**about, "device": self.device, "noise": noise, "cross_attn": c})
        parts = {k: v.cond.to(self.device, torch.float32, copy=True) for k, v in found.items()}
        if beyond := parts.keys() - {"c_crossattn", "y"}:
            raise ValueError(
                f"model: it reads {', '.join(sorted(beyond))} as well, which cannot be trained with; "
                "connect a text-to-image model"
            )
        return Text(parts.pop("c_crossattn"), parts)

    def latents(self, samples: Tensor) -> Tensor:
        """LATENT samples on the model's own scale."""
        return self.base.process_latent_in(samples.to(self.device, torch.float32, copy=True))

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.base.latent_format.latent_channels, height, width


def own_copy(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """On the CPU, frozen, sharing nothing that can be written to."""
    memo: dict[int, Any] = {}
    for old in (*unet.parameters(), *unet.buffers()):
        new = old.detach().to("cpu", dtype if old.is_floating_point() else old.dtype, copy=True)
        memo[id(old)] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
    return copy.deepcopy(unet, memo).eval()


def recompute(module: nn.Module) -> None:
    """Let a module forget its activations until the backward pass."""
    forward = module.forward

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        # The host changes these as it goes from block to block: what is computed again needs them as they were.
        kwargs = {k: dict(v) if isinstance(v, dict) else v for k, v in kwargs.items()}
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    module.forward = forgetful


def attention(_: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
    """In place of the host's attention, which may have no backward pass (Sage, Flash)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":  # a third less time for the backward pass of short sequences than the fused kernel
        return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
