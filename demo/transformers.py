"""The demo's diffusion transformers, in ComfyUI's own classes: a Flux (double and single blocks, pooled text) and a
NextDiT as Z-Image sets it (a single stream, text padded to a multiple of 32). Both read the demo's text encoder and its
latents, and predict the flow from picture to noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import model

SHIFT = 1.8  # of the schedule: time t of the flow is SHIFT u / (1 + (SHIFT - 1) u), u even in [0, 1]

FLUX: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "vec_in_dim": model.WIDTH,
    "context_in_dim": model.WIDTH,
    "hidden_size": 192,
    "mlp_ratio": 4.0,
    "num_heads": 6,
    "depth": 2,
    "depth_single_blocks": 4,
    "axes_dim": [8, 12, 12],
    "theta": 100,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
}
LUMINA: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "dim": 256,
    "n_layers": 4,
    "n_refiner_layers": 1,
    "n_heads": 8,
    "n_kv_heads": 8,
    "multiple_of": 32,
    "ffn_dim_multiplier": 2.0,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": model.WIDTH,
    "axes_dims": [8, 12, 12],
    "axes_lens": [128, 16, 16],
    "rope_theta": 100.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
CONFIGS = {"flux": FLUX, "lumina": LUMINA}


def config(architecture: str) -> dict[str, Any]:
    """With what the classes of newer hosts ask for beside: the axes along which text counts."""
    from comfy.ldm.flux.model import FluxParams

    newer = architecture == "flux" and "txt_ids_dims" in FluxParams.__dataclass_fields__
    return {**CONFIGS[architecture], **({"txt_ids_dims": []} if newer else {})}


def build(architecture: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.lumina.model import NextDiT

    kind: Any = {"flux": Flux, "lumina": NextDiT}[architecture]
    return kind(
        **config(architecture),
        dtype=dtype,
        device=torch.get_default_device(),
        operations=comfy.ops.disable_weight_init,
    )


@torch.no_grad()
def initialise(net: nn.Module) -> None:
    """torch's own beginnings where the host expects a checkpoint; what a block adds, and the output, begin silent."""
    from .autoencoder import initialise as weights

    weights(net)
    norms = ("norm1", "norm2", "norm_final", "q_norm", "k_norm", "query_norm", "key_norm")
    ones = ("norm.scale", *(f"{norm}.weight" for norm in norms))
    silent = ("_mod.lin", "modulation.lin", "adaLN_modulation", "final_layer.linear")
    for name, w in net.named_parameters():
        if name.endswith((*ones, "cap_embedder.0.weight")):
            w.fill_(1)
        elif name.endswith("pad_token"):
            w.normal_(std=0.02)
        elif any(part in name for part in silent):
            w.zero_()


def moved(x: Tensor, mod: Any) -> Tensor:
    return x * (1 + mod.scale) + mod.shift


def double_block(block: Any, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Flux's double block as the stock forward computes it, but out of place: autograd needs what `img +=` destroys."""
    from comfy.ldm.flux.math import attention

    mods = {"img": block.img_mod(vec), "txt": block.txt_mod(vec)}
    streams = {"img": img, "txt": txt}

    def part(name: str) -> Any:
        return getattr(block, name)

    def qkv(s: str) -> list[Tensor]:
        attn, x = part(f"{s}_attn"), moved(part(f"{s}_norm1")(streams[s]), mods[s][0])
        q, k, v = attn.qkv(x).unflatten(-1, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return [*attn.norm(q, k, v), v]

    q, k, v = (torch.cat(pair, 2) for pair in zip(qkv("txt"), qkv("img"), strict=True))
    found = attention(q, k, v, pe=pe).split([txt.shape[1], img.shape[1]], 1)
    for s, a in zip(("txt", "img"), found, strict=True):
        first, second = mods[s]
        x = streams[s] + first.gate * part(f"{s}_attn").proj(a)
        streams[s] = x + second.gate * part(f"{s}_mlp")(moved(part(f"{s}_norm2")(x), second))
    return streams["img"], streams["txt"]


def single_block(block: Any, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
    """Flux's single block, out of place."""
    from comfy.ldm.flux.math import attention

    mod, _ = block.modulation(vec)
    h = block.linear1(moved(block.pre_norm(x), mod))
    qkv, mlp = h.split([3 * block.hidden_size, block.mlp_hidden_dim_first], -1)
    q, k, v = qkv.unflatten(-1, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
    a = attention(*block.norm(q, k, v), v, pe=pe)
    return x + mod.gate * block.linear2(torch.cat([a, block.mlp_act(mlp)], 2))


def out_of_place(net: Any) -> dict[str, Any]:
    """transformer_options under which the stock forward of a Flux runs the twins of its blocks."""

    def double(block: Any) -> Callable[..., Any]:
        def run(args: dict[str, Any], _: Any) -> dict[str, Tensor]:
            img, txt = double_block(block, args["img"], args["txt"], args["vec"], args["pe"])
            return {"img": img, "txt": txt}

        return run

    def single(block: Any) -> Callable[..., Any]:
        return lambda args, _: {"img": single_block(block, args["img"], args["vec"], args["pe"])}

    blocks = {("double_block", i): double(block) for i, block in enumerate(net.double_blocks)}
    blocks |= {("single_block", i): single(block) for i, block in enumerate(net.single_blocks)}
    return {"patches_replace": {"dit": blocks}}


@contextmanager
def told_of_training() -> Iterator[None]:
    """Newer hosts have kernels that no gradient passes, and take others while this says so."""
    import comfy.model_management as mm

    before = getattr(mm, "in_training", False)
    mm.in_training = True
    try:
        yield
    finally:
        mm.in_training = before


def flow(architecture: str, net: nn.Module, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """The predicted flow noise - picture at time t [b] of x [b, 4, 16, 16], through which gradients go."""
    with told_of_training():
        if architecture == "flux":
            return net(x, t, context, pooled, transformer_options=out_of_place(net))
        return net(x, t, context, context.shape[1], transformer_options={})  # its blocks are out of place as they are
