"""Tiny models with random weights, made of the host's own classes, and the shortest way to sample them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from conceptguard.editing.edits.spec import Concept, EditSpec, Phrase
from conceptguard.editing.engine.backbones.unet import cross_attentions
from conceptguard.editing.engine.host import EDITS, WRAPPERS
from conceptguard.editing.methods.cre import DEFAULTS

WIDTH = 16  # of the text encoding
SIZE = 8  # of the latent, so that blocks have 64 and 16 positions

_COMMON = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[1, 1],
    channel_mult=[1, 2],
    use_spatial_transformer=True,
    legacy=False,
    context_dim=WIDTH,
    num_heads=4,
    num_head_channels=-1,
)
_SD1 = dict(
    adm_in_channels=None,
    use_linear_in_transformer=False,
    use_temporal_attention=False,
    transformer_depth=[1, 1],
    transformer_depth_middle=1,
    transformer_depth_output=[1, 1, 1, 1],
)
_SDXL = dict(
    num_classes="sequential",
    adm_in_channels=2816,
    use_linear_in_transformer=True,
    use_temporal_attention=False,
    transformer_depth=[0, 2],
    transformer_depth_middle=2,
    transformer_depth_output=[0, 0, 2, 2],
)
SD1_BLOCKS = [("input", 1, 0), ("input", 3, 0), ("middle", 0, 0), *(("output", i, 0) for i in range(4))]
SDXL_BLOCKS = [(side, i, j) for side, i in (("input", 3), ("middle", 0), ("output", 0), ("output", 1)) for j in (0, 1)]
CRE = replace(DEFAULTS, floor=0.0)  # random weights find nothing alike


def _patcher(family: type, shape: dict[str, Any], dtype: torch.dtype, seed: int) -> ModelPatcher:
    config = family({**_COMMON, **shape})
    config.unet_config.update({**_COMMON, **shape, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.diffusion_model.named_parameters():
        # Strong enough for the text to matter: a random model with small weights ignores it.
        scale = 1.5 if "attn2.to_" in name else 0.5
        random = torch.randn(weight.shape, generator=generator) * scale * weight[0].numel() ** -0.5
        weight.data.copy_(random if weight.ndim > 1 else 1 + 0.1 * random if "weight" in name else 0.1 * random)
    cpu = torch.device("cpu")
    return ModelPatcher(model.to(dtype), load_device=cpu, offload_device=cpu)


def sd1(dtype: torch.dtype = torch.float32, seed: int = 0) -> ModelPatcher:
    return _patcher(comfy.supported_models.SD15, _SD1, dtype, seed)


def sdxl(dtype: torch.dtype = torch.float32, seed: int = 0) -> ModelPatcher:
    return _patcher(comfy.supported_models.SDXL, _SDXL, dtype, seed)


def tokens(seed: int, length: int = 77, batch: int = 1) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def cond(seed: int, length: int = 77, **extra: Any) -> list[list[Any]]:
    return [[tokens(seed, length), {"pooled_output": torch.zeros(1, 1280), **extra}]]


def concept(name: str = "knife", seed: int = 100, phrases: int = 1, own: tuple[int, ...] = (1, 2)) -> Concept:
    """Phrases that, like real ones, start with the empty prompt's first token."""
    empty = tokens(7)
    encoded = [torch.cat([empty[:, :1], tokens(seed + i)[:, 1:]], 1) for i in range(phrases)]
    return Concept(name, tuple(Phrase(f"{name} {i}", t, own) for i, t in enumerate(encoded)), empty)


def sample(
    model: ModelPatcher,
    positive: Any = None,
    negative: Any = None,
    *,
    batch: int = 1,
    steps: int = 2,
    cfg: float = 4.0,
    sampler: str = "euler",
    scheduler: str = "normal",
    seed: int = 5,
    callback: Callable[..., None] | None = None,
    **options: Any,
) -> Tensor:
    latent = torch.zeros(batch, 4, SIZE, SIZE)
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, seed),
        steps,
        cfg,
        sampler,
        scheduler,
        cond(1) if positive is None else positive,
        cond(2) if negative is None else negative,
        latent,
        callback=callback,
        disable_pbar=True,
        seed=seed,
        **options,
    )


class Recorder:
    """What passes through every cross-attention: q, k, v of the last call and the output before `to_out`, per call."""

    def __init__(self, model: ModelPatcher) -> None:
        self.blocks = cross_attentions(model.model.diffusion_model)
        self.calls: dict[Any, list[dict[str, Tensor]]] = {key: [] for key in self.blocks}
        self.hooks: list[Any] = []

    def __enter__(self) -> Recorder:
        for key, block in self.blocks.items():
            now: dict[str, Tensor] = {}
            for name in ("to_q", "to_k", "to_v"):
                module = getattr(block.attn2, name)
                self.hooks.append(module.register_forward_hook(partial(self._projected, now, name[-1])))
            self.hooks.append(block.attn2.to_out.register_forward_pre_hook(partial(self._output, now, key)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    @staticmethod
    def _projected(now: dict[str, Tensor], name: str, module: Any, args: Any, out: Tensor) -> None:
        now[name] = out.clone()

    def _output(self, now: dict[str, Tensor], key: Any, module: Any, args: Any) -> None:
        self.calls[key].append({**now, "out": args[0].clone()})

    def project(self, key: Any, which: str, tokens: Tensor) -> Tensor:
        """Tokens through a block's key or value weights, by hand. tokens: [T, W]; returns [T, C]."""
        return tokens.double() @ getattr(self.blocks[key].attn2, f"to_{which}").weight.double().T

    def heads(self, key: Any) -> int:
        return self.blocks[key].attn2.heads


_CLIP = dict(hidden_size=WIDTH, intermediate_size=32, num_attention_heads=2, num_hidden_layers=3)


def clip(family: type = comfy.supported_models.SD15, embeddings: str | None = None, seed: int = 0) -> comfy.sd.CLIP:
    """A random text encoder behind the host's own tokenizer: WIDTH wide for SD1, twice that for SDXL."""
    target = family({}).clip_target({})
    shape = {f"clip_{name}_model_config": _CLIP for name in "lgh"}
    encoder = comfy.sd.CLIP(target, embedding_directory=embeddings, model_options={**shape, "dtype": torch.float32})
    generator = torch.Generator().manual_seed(seed)
    for name, weight in encoder.cond_stage_model.named_parameters():
        random = torch.randn(weight.shape, generator=generator)
        weight.data.copy_(random * 0.3 if weight.ndim > 1 else 1 + 0.1 * random if "norm" in name else 0.1 * random)
    return encoder


def auraflow() -> ModelPatcher:
    """A model of a kind that the engine does not know."""
    shape = dict(
        in_channels=4,
        dim=256,
        n_layers=1,
        n_double_layers=1,
        n_heads=1,
        global_conddim=256,
        cond_seq_dim=WIDTH,
        max_seq=64,
    )
    model = comfy.supported_models.AuraFlow(shape).get_model({}, device="cpu")
    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


def hooked(spec: EditSpec) -> dict[str, Any]:
    """An edit of one conditioning alone, as a TransformerOptionsHook takes it: a pack that copies a MODEL's options
    into a hook makes such."""
    return {EDITS: [spec], "wrappers": {kind: {EDITS: [wrapper]} for kind, wrapper in WRAPPERS.items()}}
