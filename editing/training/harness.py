"""The one way to train through a MODEL, and beside engine/host.py what knows the host.

A training runs where a sampler would: the MODEL's LoRAs, edits and offloading apply, what a graph has loaded in
inference mode may take part, and every weight and module is afterwards as it was.

Noisy latents z: [B, 4, h, w]; their noise levels sigma: [B], in units of the clean latent.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import comfy.float
import comfy.lora
import comfy.samplers
import torch
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.model_patcher import ModelPatcher, string_to_seed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..edits.digest import digest
from ..engine.host import edits_of
from ..methods.attention import logits, split_heads
from .changes import Changes, chosen
from .loop import Patch, Text
from .mode import copied, gradients

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


class Predictor:
    """eps(z, c) as the model in the middle of a sampling run predicts it: loop.Predict.

    texts: what the given prompts say, each of one row; latents: the given ones, on the model's own scale.
    """

    def __init__(self, guider: Any, options: dict[str, Any], latents: Tensor, until_end: ExitStack) -> None:
        self.model, self.patcher = guider.inner_model, guider.model_patcher
        self.unet, self.sampling = unet_of(self.model), self.model.model_sampling
        self.device: torch.device = self.patcher.load_device
        self.latents, self.until_end = copied(latents), until_end
        # Sage and Flash attention, which an override or the command line may have chosen, have no gradient.
        own = {**options.get("transformer_options", {}), "optimized_attention_override": with_gradient}
        self.options = {**options, "transformer_options": own}
        self.edited, self.trained = bool(edits_of(self.patcher)), False
        self.negative = guider.conds["negative"][0]["uuid"]
        self.prompts = [copied(entry) for entry in guider.conds["positive"]]
        contexts = [entry["model_conds"]["c_crossattn"].cond.to(self.device) for entry in self.prompts]
        self.texts = [Text(c, (i,)) for i, c in enumerate(contexts)]

    def __call__(self, z: Tensor, sigma: Tensor, *texts: Text, patch: Patch | None = None) -> list[Tensor]:
        if self.edited and len(levels := sigma.unique()) > 1:  # an edit's window is asked about one level a call
            return self.by_level(z, sigma, levels, texts, patch)
        if self.trained:  # the engine keeps keys and values for weights of this name: they are others each time
            self.patcher.patches_uuid = uuid.uuid4()
        first = [] if texts[0].positive else [None]  # what the host takes for conditional
        conds = [*first, *([self.entry(text)] for text in texts)]
        found = comfy.samplers.calc_cond_batch(self.model, conds, z, sigma, self.patched(patch))
        return [(z - x0.float()) / sigma[:, None, None, None] for x0 in found[-len(texts) :]]

    def by_level(
        self, z: Tensor, sigma: Tensor, levels: Tensor, texts: tuple[Text, ...], patch: Patch | None
    ) -> list[Tensor]:
        """Rows of unlike noise levels, a level a call."""
        out = [torch.empty_like(z) for _ in texts]
        for level in levels:
            rows = (sigma == level).nonzero()[:, 0]
            own = [Text(text.c[rows], tuple(text.of[i] for i in rows), text.positive) for text in texts]
            found = self(z[rows], sigma[rows], *own, patch=patch)
            out = [all_.index_copy(0, rows, e) for all_, e in zip(out, found, strict=True)]
        return out

    def attentions(self, z: Tensor, sigma: Tensor, text: Text) -> list[Tensor]:
        """What the picture reads of a positive text's tokens in each cross-attention: probabilities [B, H, N, T]."""
        q: dict[Any, Tensor] = {}
        k: dict[Any, Tensor] = {}

        def keys(attn: Any, out: Tensor) -> None:  # the first behind the queries: the others are an edit's own tokens
            if attn in q:
                k.setdefault(attn, out)

        with ExitStack() as stack:
            for attn in (module for path, module in self.unet.named_modules() if path.endswith(".attn2")):
                stack.callback(attn.to_q.register_forward_hook(lambda _, __, out, at=attn: q.update({at: out})).remove)
                stack.callback(attn.to_k.register_forward_hook(lambda _, __, out, at=attn: keys(at, out)).remove)
            self(z, sigma, text)
        return [logits(*(split_heads(x[attn], attn.heads) for x in (q, k))).softmax(-1) for attn in q]

    def changes(self, weights: str, rank: int, seed: int) -> Changes:
        """Changes of the model's weights, which it has until the training ends."""
        if not isinstance(self.unet, UNetModel):
            raise ValueError(f"cannot train {type(self.unet).__name__}: connect an SD1.x, SD2.x or SDXL model")
        self.trained, modules = True, chosen(self.unet, weights)
        for module in modules.values():  # a concept of an edit, say, was encoded in inference mode
            self.until_end.callback(module.register_forward_pre_hook(lambda _, inputs: copied(inputs)).remove)
        return Changes(modules, rank, seed, self.device)

    def entry(self, text: Text) -> dict[str, Any]:
        """A text as one of the host's conds."""
        first, *rest = (self.prompts[i]["model_conds"] for i in text.of)
        joined = {k: v._copy_with(v.concat([other[k] for other in rest])) for k, v in first.items()}
        joined["c_crossattn"] = first["c_crossattn"]._copy_with(text.c)
        own = self.prompts[text.of[0]]
        return {**own, "model_conds": joined, "uuid": own["uuid"] if text.positive else self.negative}

    def patched(self, patch: Patch | None) -> dict[str, Any]:
        if patch is None:
            return self.options
        own = self.options["transformer_options"]
        patches = {**own.get("patches", {})}
        patches["attn2_patch"] = [*patches.get("attn2_patch", ()), patch]
        return {**self.options, "transformer_options": {**own, "patches": patches}}


def unet_of(model: Any) -> nn.Module:
    unet = model.diffusion_model
    return getattr(unet, "_orig_mod", unet)  # compiled


def with_gradient(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """In place of the host's attention."""
    return attention_pytorch(*args, **kwargs)


class _Body(comfy.samplers.Sampler):
    """Not a sampler, but what stands in its place."""

    def __init__(self, body: Callable[[Predictor], None], checkpointing: bool) -> None:
        self.body = body
        self.checkpointing = checkpointing

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Any = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        with gradients(), differentiable(unet_of(model_wrap.inner_model), self.checkpointing) as until_end:
            self.body(Predictor(model_wrap, extra_args["model_options"], latent_image, until_end))
        return latent_image


def train_with(
    model: ModelPatcher,
    positive: Any,
    latent: Tensor,
    body: Callable[[Predictor], None],
    dtype: str = "auto",
    checkpointing: bool = False,
    seed: int = 0,
) -> None:
    """Run `body` with the model's predictions for pictures of the latent's shape [B, 4, h, w]; the model stays as it
    was. positive: a CONDITIONING whose entries are the prompts.

    dtype: what the model computes in; "auto" is its own, but bf16 for one in fp16, whose gradients vanish there.
    checkpointing: compute each block's inner values again for the gradient instead of keeping them.
    """
    model = trainable(model)
    if (wanted := compute_dtype(model, dtype)) is not None:
        model.set_model_compute_dtype(wanted)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive, "negative": positive[:1]})
    guider.sample(latent.clone(), latent, _Body(body, checkpointing), torch.ones(2), disable_pbar=True, seed=seed)


def compute_dtype(model: ModelPatcher, dtype: str) -> torch.dtype | None:
    """What the model is to compute in; None: as it does."""
    if dtype not in DTYPES:
        raise ValueError(f"precision is {dtype!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype] or (torch.bfloat16 if model.model.get_dtype() == torch.float16 else None)


def trainable(model: ModelPatcher) -> ModelPatcher:
    """A clone whose weights are tensors of torch: newer hosts may stream them past autograd (dynamic VRAM)."""
    if "disable_dynamic" not in inspect.signature(model.clone).parameters:
        return model.clone()
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise ValueError(
            f"model: {error} It was loaded so that it cannot be trained on; load it with Load Checkpoint, or start "
            "ComfyUI with --disable-dynamic-vram"
        ) from error


@torch.no_grad()
def weights_key(model: ModelPatcher, dtype: str) -> str:
    """Tells one model's weights from another's, LoRAs included; of the cross-attentions and of all that is patched."""
    sums = []
    patched = type(model).get_key_patches(model, "diffusion_model.")  # also of one with edits, which a merge would lose
    for key, (held, *patches) in patched.items():
        if ".attn2." in key or patches:
            w = held[0].to(model.load_device)
            if patches:
                added = comfy.lora.calculate_weight(patches, w.to(torch.float32, copy=True), key)
                w = comfy.float.stochastic_rounding(added, w.dtype, seed=string_to_seed(key))
            sums.append(float(w.to(DTYPES[dtype] or w.dtype).float().sum()))
    return digest(sums)[:20]


@contextmanager
def differentiable(unet: nn.Module, checkpointing: bool) -> Iterator[ExitStack]:
    """Gradients may flow through the modules, but none to the weights; what is added to them is theirs until the end.
    Weights that the host loaded for inference alone, which autograd refuses, are copied as they are used."""
    with ExitStack() as stack:
        frozen = [p for p in unet.parameters() if p.requires_grad]
        for p in frozen:
            stack.callback(set_grad, p, True)
            set_grad(p, False)
        for module in unet.modules():
            inference = any(p.is_inference() for p in module.parameters(recurse=False))
            for name in ("weight_function", "bias_function"):
                if hasattr(module, name):
                    stack.callback(setattr, module, name, getattr(module, name))
                    if inference:
                        setattr(module, name, [*getattr(module, name), unchanged])
            if checkpointing and isinstance(module, ResBlock | SpatialTransformer) and "forward" not in vars(module):
                stack.callback(delattr, module, "forward")
                module.forward = partial(forgetful, module.forward)
        yield stack


def forgetful(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
    """`forward`, whose inner values are computed again for the gradient. The host writes where it is into the options
    that it passes, which by then would say where it was last."""
    then = [dict(arg) if isinstance(arg, dict) else arg for arg in args]

    def again(*args: Any, **kwargs: Any) -> Any:
        return forward(*(dict(arg) if isinstance(arg, dict) else arg for arg in args), **kwargs)

    return checkpoint(again, *then, use_reentrant=False, **kwargs)


def unchanged(weight: Tensor) -> Tensor:
    """A weight function, of [out, in]: the host gives those a copy."""
    return weight


def set_grad(p: Tensor, value: bool) -> None:
    """Of a parameter of any shape, [...], also one that was made in inference mode."""
    with torch.inference_mode(p.is_inference()):
        p.requires_grad_(value)
