"""The projections of a MODEL's text as the host will load them, and changes of them as the host's own LoRAs."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..edits.spec import Concept
from ..weights.edit import Projections
from .host import of_model

PROJECTIONS = {"values": ("to_v",), "keys and values": ("to_k", "to_v")}


def projections(model: ModelPatcher, concept: Concept, which: str, node: str) -> Projections:
    """The weights, fp32 on the CPU, of every attention that reads the text, or of what all of it comes in by, where it
    and the picture share attentions; with all patches that the MODEL carries (LoRAs before this node; those of hooks
    and of nodes behind it are not there yet).

    Raises in the name of `node` if the model has none, or another text encoder than the concept's.
    """
    backbone = of_model(model, node)
    backbone.admit_source(concept, node)
    network = model.get_model_object("diffusion_model")
    paths = {id(module): path for path, module in getattr(network, "_orig_mod", network).named_modules()}
    wanted, norm, pooled = backbone.text_weights(PROJECTIONS[which])
    if not all(id(module) in paths and hasattr(module, "weight") for module in wanted):
        raise ValueError(f"{node}: {backbone.name} has no keys and values of its own for the text; use another edit")
    held = type(model).get_key_patches(model, "diffusion_model.")  # of one with edits too, which a merge would lose

    def found(*modules: Any) -> dict[str, Tensor]:
        return {path: loaded(held, path) for path in (f"diffusion_model.{paths[id(module)]}" for module in modules)}

    more = found(pooled) if pooled is not None else {}
    if norm is None:
        return Projections(found(*wanted), more)
    (scale,) = found(norm).values()
    return Projections(found(*wanted), more, partial(normed, scale=scale.double(), eps=norm.eps))


def normed(rows: Tensor, scale: Tensor, eps: float) -> Tensor:
    """By an RMSNorm. rows: [n, d] fp64; scale: [d]."""
    return torch.nn.functional.rms_norm(rows, rows.shape[-1:], scale, eps)


def loaded(held: dict[str, list[Any]], path: str) -> Tensor:
    """A weight as the host computes it when it loads the MODEL, whichever MODEL of the same weights is loaded now.

    held: the weights and their patches, as the MODEL has them.
    """
    key = f"{path}.weight"
    (weight, convert), *patches = held[key]
    weight = convert(weight.to("cpu", torch.float32, copy=True), inplace=True)
    return comfy.lora.calculate_weight(patches, weight, key) if patches else weight


def with_lora(model: ModelPatcher, lora: dict[str, Tensor], strength: float) -> ModelPatcher:
    """A clone of the MODEL with a LoRA of paths that `projections` gave."""
    names = {name.removesuffix(".lora_up.weight") for name in lora if name.endswith(".lora_up.weight")}
    model = model.clone()
    model.add_patches(comfy.lora.load_lora(lora, {name: f"{name}.weight" for name in names}), strength)
    return model
