"""A MODEL's noise predictions with gradients: what the learned edits are trained on.

The second module that knows the host. Training runs where a sampler would, so the MODEL's own patches, LoRAs, edits and
offloading apply, and inside a context that leaves every weight and module as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import comfy.samplers
import torch
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .mode import copied, gradients

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


class Predictor:
    """eps(z, c) as the model in the middle of a sampling run predicts it."""

    def __init__(self, guider: Any, options: dict[str, Any], positive: Sequence[dict[str, Any]]) -> None:
        self.model = guider.inner_model
        # Sage and Flash attention, which an override or the command line may have chosen, have no gradient.
        own = {**options.get("transformer_options", {}), "optimized_attention_override": with_gradient}
        self.options = {**options, "transformer_options": own}
        self.positive = [copied(entry) for entry in positive]
        self.device: torch.device = guider.model_patcher.load_device
        self.contexts = [entry["model_conds"]["c_crossattn"].cond for entry in self.positive]

    def __call__(self, z: Tensor, sigma: float, picks: Sequence[int], *contexts: Tensor) -> list[Tensor]:
        """(z - x0(z, c)) / sigma for each of the contexts c [B, L, W], in fp32; z: [B, ...] in the host's scale.

        The first context is the conditional half for the MODEL's own edits, the others are not. What else a prompt
        brings (SDXL's pooled text) is that of the conditioning entries `picks`, one for each row.
        """
        conds = [[self.entry(picks, c)] for c in contexts]
        level = torch.full((len(z),), sigma, device=z.device)
        found = comfy.samplers.calc_cond_batch(self.model, conds, z, level, self.options)
        return [(z - x0.float()) / sigma for x0 in found]

    def entry(self, picks: Sequence[int], context: Tensor) -> dict[str, Any]:
        first, *rest = (self.positive[i]["model_conds"] for i in picks)
        joined = {k: v._copy_with(v.concat([other[k] for other in rest])) for k, v in first.items()}
        joined["c_crossattn"] = first["c_crossattn"]._copy_with(context)
        return {**self.positive[picks[0]], "model_conds": joined}


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
        unet = model_wrap.inner_model.diffusion_model
        with gradients(), differentiable(unet, self.checkpointing):
            self.body(Predictor(model_wrap, extra_args["model_options"], model_wrap.conds["positive"]))
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
    """Run `body` with the model's predictions for pictures of the latent's shape; the model stays as it was.

    dtype: what the model computes in; "auto" is its own, but bf16 for one in fp16, whose gradients vanish there.
    checkpointing: compute each block's inner values again for the gradient instead of keeping them.
    """
    model = model.clone()
    wanted = DTYPES[dtype] or (torch.bfloat16 if model.model.get_dtype() == torch.float16 else None)
    if wanted is not None:
        model.set_model_compute_dtype(wanted)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    guider.sample(latent.clone(), latent, _Body(body, checkpointing), torch.ones(2), disable_pbar=True, seed=seed)


@contextmanager
def differentiable(unet: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Gradients may flow through the modules, but none to the weights. Weights that the host loaded for inference
    alone, which autograd refuses, are copied as they are used."""
    with ExitStack() as stack:
        frozen = [p for p in unet.parameters() if p.requires_grad]
        for p in frozen:
            stack.callback(set_grad, p, True)
            set_grad(p, False)
        for module in unet.modules():
            if any(p.is_inference() for p in module.parameters(recurse=False)):
                for name in ("weight_function", "bias_function"):
                    if hasattr(module, name):
                        stack.callback(setattr, module, name, getattr(module, name))
                        setattr(module, name, [*getattr(module, name), unchanged])
            if checkpointing and isinstance(module, ResBlock | SpatialTransformer) and "forward" not in vars(module):
                stack.callback(delattr, module, "forward")
                module.forward = partial(forgetful, module.forward)
        yield


def forgetful(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
    """`forward`, whose inner values are computed again for the gradient. The host writes where it is into the options
    that it passes, which by then would say where it was last."""
    then = [dict(arg) if isinstance(arg, dict) else arg for arg in args]

    def again(*args: Any, **kwargs: Any) -> Any:
        return forward(*(dict(arg) if isinstance(arg, dict) else arg for arg in args), **kwargs)

    return checkpoint(again, *then, use_reentrant=False, **kwargs)


def unchanged(weight: Tensor) -> Tensor:
    """A weight function: the host gives those a copy."""
    return weight


def set_grad(p: Tensor, value: bool) -> None:
    with torch.inference_mode(p.is_inference()):
        p.requires_grad_(value)
