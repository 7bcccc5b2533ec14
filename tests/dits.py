"""Tiny diffusion transformers with random weights, of the host's own classes, and the shortest way to sample them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.ldm.cosmos.predict2
import comfy.ldm.flux.math
import comfy.ldm.hidream.model
import comfy.ldm.lumina.model
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.pixart.blocks
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
import comfy.sample
import comfy.supported_models
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from conceptguard.editing.edits.digest import digest
from conceptguard.editing.edits.spec import Concept, Phrase

WIDTH = 16  # of the text
SIZE = 8  # of the latent: 16 tokens
POOLED = 8
LLAMA_WIDTH, LLAMA_LENGTH = 8, 6  # of a second encoder's states


@dataclass(frozen=True)
class Family:
    """attention: the module and the name of the host's attention there; blocks: attentions of a call that read the
    text; size: of the latent, if other than SIZE; multiple, least: of the tokens that the prompt becomes; heads_first:
    q, k, v are [B, H, L, d], not [B, L, H d]."""

    config: str
    shape: dict[str, Any]
    attention: tuple[Any, str]
    blocks: int
    heads: int = 4
    channels: int = 16
    size: int | None = None
    frames: bool = False
    multiple: int = 1
    least: int = 0
    heads_first: bool = True
    text_first: bool = True
    beside: int = 0  # of the text's tokens, those of a second encoder
    appended: bool = True
    patch: int = 2


# What the classes of newer hosts are told beside: the axes along which text counts, and no pooled text.
NEWER: dict[str, tuple[Any, dict[str, Any]]] = {
    "Flux": (FluxParams, {"txt_ids_dims": []}),
    "Flux2": (FluxParams, {"txt_ids_dims": [3]}),
    "Chroma": (ChromaParams, {"txt_ids_dims": [], "vec_in_dim": None}),
}
_FLUX = dict(
    in_channels=16,
    out_channels=16,
    context_in_dim=WIDTH,
    hidden_size=32,
    mlp_ratio=2.0,
    num_heads=4,
    depth=2,
    depth_single_blocks=2,
    theta=10000,
    patch_size=2,
    qkv_bias=True,
    guidance_embed=True,
)
_LUMINA = dict(
    patch_size=2,
    in_channels=16,
    dim=32,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=4,
    n_kv_heads=2,
    multiple_of=8,
    ffn_dim_multiplier=1.0,
    qk_norm=True,
    cap_feat_dim=WIDTH,
    axes_dims=[2, 2, 4],
    axes_lens=[64, 64, 64],
)
_MATH, _MMDIT = comfy.ldm.flux.math, comfy.ldm.modules.diffusionmodules.mmdit
FAMILIES = {
    "Flux.1": Family(
        "Flux",
        {**_FLUX, "image_model": "flux", "vec_in_dim": POOLED, "axes_dim": [2, 2, 4]},
        (_MATH, "optimized_attention"),
        4,
    ),
    "Flux.2": Family(
        "Flux2",
        {
            **_FLUX,
            "image_model": "flux2",
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "vec_in_dim": None,
            "axes_dim": [2, 2, 2, 2],
            "global_modulation": True,
            "mlp_silu_act": True,
            "qkv_bias": False,
            "ops_bias": False,
        },
        (_MATH, "optimized_attention"),
        4,
        channels=128,
        least=512,
        patch=1,
    ),
    "Chroma": Family(
        "Chroma",
        {
            **{name: value for name, value in _FLUX.items() if name != "guidance_embed"},
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "axes_dim": [2, 2, 4],
            "in_dim": 64,
            "out_dim": 32,
            "hidden_dim": 32,
            "n_layers": 1,
        },
        (_MATH, "optimized_attention"),
        4,
    ),
    "Qwen-Image": Family(
        "QwenImage",
        dict(
            image_model="qwen_image",
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
        ),
        (comfy.ldm.qwen_image.model, "optimized_attention_masked"),
        2,
        frames=True,
    ),
    "Lumina 2": Family(
        "Lumina2",
        {**_LUMINA, "image_model": "lumina2"},
        (comfy.ldm.lumina.model, "optimized_attention_masked"),
        2,
    ),
    "Z-Image": Family(
        "Lumina2",
        {**_LUMINA, "image_model": "lumina2", "pad_tokens_multiple": 32},
        (comfy.ldm.lumina.model, "optimized_attention_masked"),
        2,
        multiple=32,
    ),
    "SD3": Family(
        "SD3",
        dict(
            in_channels=16,
            patch_size=2,
            depth=1,
            num_blocks=2,
            adm_in_channels=POOLED,
            context_embedder_config={
                "target": "torch.nn.Linear",
                "params": {"in_features": WIDTH, "out_features": 64},
            },
            pos_embed_max_size=16,
            pos_embed_scaling_factor=None,
            num_patches=256,
            qk_norm="rms",
            x_block_self_attn_layers=[0],
        ),
        (_MMDIT, "optimized_attention"),
        2,
        heads=1,
        heads_first=False,
    ),
    "HiDream": Family(
        "HiDream",
        dict(
            image_model="hidream",
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[WIDTH, LLAMA_WIDTH],
            text_emb_dim=POOLED,
            axes_dims_rope=(8, 4, 4),
            llama_layers=[2, 0],
        ),
        (comfy.ldm.hidream.model, "optimized_attention"),
        2,
        heads=2,
        heads_first=False,
        text_first=False,
        beside=2 * LLAMA_LENGTH,
        appended=False,
    ),
}
if hasattr(comfy.supported_models, "Krea2"):  # newer hosts
    FAMILIES["Krea 2"] = Family(
        "Krea2",
        dict(
            image_model="krea2",
            features=32,
            tdim=16,
            txtdim=WIDTH // 2,
            heads=2,
            kvheads=1,
            multiplier=2,
            layers=2,
            txtlayers=2,
            txtheads=2,
            txtkvheads=2,
        ),
        (importlib.import_module("comfy.ldm.krea2.model"), "optimized_attention_masked"),
        2,
        heads=2,
        frames=True,
    )
APPENDED = [name for name, family in FAMILIES.items() if family.appended]

CROSS = {  # the text is read by cross-attentions
    "Wan": Family(
        "WAN21_T2V",
        dict(image_model="wan2.1", model_type="t2v", dim=32, ffn_dim=32, num_heads=2, num_layers=2, text_dim=WIDTH),
        (comfy.ldm.wan.model, "optimized_attention"),
        2,
        heads=2,
        frames=True,
    ),
    "Cosmos-Predict2": Family(
        "CosmosT2IPredict2",
        dict(
            image_model="cosmos_predict2",
            max_img_h=16,
            max_img_w=16,
            max_frames=4,
            in_channels=16,
            out_channels=16,
            patch_spatial=2,
            patch_temporal=1,
            model_channels=32,
            concat_padding_mask=True,
            crossattn_emb_channels=WIDTH,
            pos_emb_cls="rope3d",
            use_adaln_lora=True,
            adaln_lora_dim=8,
            num_blocks=2,
            num_heads=2,
        ),
        (comfy.ldm.cosmos.predict2, "optimized_attention"),
        2,
        heads=2,
        frames=True,
    ),
    "PixArt": Family(
        "PixArtSigma",
        dict(
            image_model="pixart_sigma",
            hidden_size=32,
            depth=2,
            num_heads=2,
            mlp_ratio=2.0,
            caption_channels=WIDTH,
            model_max_length=9,
            micro_condition=False,
            pe_interpolation=1,
        ),
        (comfy.ldm.pixart.blocks, "optimized_attention"),
        2,
        heads=2,
        channels=4,
        size=40,  # below 33 its positions divide by zero
    ),
}


_COSMOS = CROSS["Cosmos-Predict2"]  # of whose class Anima's is
ADAPTED = {  # the text passes an adapter first
    "Anima": replace(
        _COSMOS, config="Anima", shape={**_COSMOS.shape, "image_model": "anima", "crossattn_emb_channels": 1024}
    )
}


def weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A random weight of that name: strong enough for the text to matter; what multiplies a norm is near one."""
    random = torch.randn(shape, generator=generator)
    if name.endswith(("scale", "gamma")) or ("norm" in name and len(shape) < 2 and not name.endswith("bias")):
        return 1 + 0.1 * random
    return random * 0.8 * random[0].numel() ** -0.5 if len(shape) > 1 else 0.1 * random


def asked_by_newer(config: str) -> dict[str, Any]:
    """What the host's class of that name is told beside, where the host is newer."""
    params, newer = NEWER.get(config, (FluxParams, {}))
    return {name: value for name, value in newer.items() if name in params.__dataclass_fields__}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> ModelPatcher:
    family = {**FAMILIES, **CROSS, **ADAPTED}[name]
    config = getattr(comfy.supported_models, family.config)({**family.shape, **asked_by_newer(family.config)})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.diffusion_model.named_parameters():
        parameter.data.copy_(weight(key, parameter.shape, generator))
    for buffer in model.diffusion_model.buffers() if name in FAMILIES else ():
        buffer.data.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    model.to(dtype)
    if name == "Wan":
        model.diffusion_model.patch_embedding.float()  # as the host loads it
    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


def tokens(seed: int, length: int) -> Tensor:
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def pooled(seed: int) -> Tensor:
    return torch.randn(1, POOLED, generator=torch.Generator().manual_seed(1000 + seed))


def llama(encodings: Sequence[Tensor]) -> dict[str, Tensor]:
    """A second encoder's states in three layers, of a prompt by its first encoding, or their mean: [1, 3, L, W]."""
    states = []
    for encoding in encodings:
        generator = torch.Generator().manual_seed(int(encoding.double().sum().mul(1e6).abs()))
        states.append(torch.randn(1, 3, LLAMA_LENGTH, LLAMA_WIDTH, generator=generator))
    return {"conditioning_llama3": torch.cat(states).mean(0, keepdim=True)}


def cond(encoding: Tensor, y: Tensor | None = None, **extra: Any) -> list[list[Any]]:
    return [[encoding, {"pooled_output": pooled(1) if y is None else y, **llama([encoding]), **extra}]]


def told(concept: Concept) -> Concept:
    """With what a second encoder says of its prompts."""
    texts = [each.tokens for each in (*concept.phrases, *concept.keep)]
    texts += [each for each in (concept.empty, concept.neutral, concept.instead) if each is not None]
    return replace(concept, beside={digest((each[0],)): (llama([each]),) for each in texts})


def concept(phrases: int = 1, length: int = 7, seed: int = 100, **more: Any) -> Concept:
    """Of phrases that are as long as they are, and of an empty prompt that is shorter."""
    said = tuple(Phrase(f"knife {i}", tokens(seed + i, length), (1, 2)) for i in range(phrases))
    return told(Concept("knife", said, tokens(7, 5), **more))


def latent(name: str, batch: int = 1) -> Tensor:
    family = {**FAMILIES, **CROSS, **ADAPTED}[name]
    size = family.size or SIZE
    return torch.zeros(batch, family.channels, *[1] * family.frames, size, size)


def sample(
    name: str,
    model: ModelPatcher,
    positive: Any = None,
    negative: Any = None,
    *,
    batch: int = 1,
    cfg: float = 1.0,
    steps: int = 1,
    seed: int = 5,
) -> Tensor:
    empty = latent(name, batch)
    noise = comfy.sample.prepare_noise(empty, seed)
    positive = cond(tokens(1, 9)) if positive is None else positive
    negative = cond(tokens(2, 9)) if negative is None else negative
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "simple", positive, negative, empty, disable_pbar=True, seed=seed
    )
