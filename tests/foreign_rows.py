"""Stand-ins for packs and guiders that decide which rows of a batch a prompt's are: their order of prompts, and what
they make of the batch. Written from what the real ones do; docstrings name them."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import tiny
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor


class GeometricCFG(comfy.samplers.CFGGuider):
    """The guiders of ComfyUI-Extra-Samplers (Clybius): two positive prompts, passed on behind the negative one."""

    def set_conds(self, positive: Any, positive2: Any, negative: Any) -> None:
        self.inner_set_conds({"positive": positive, "positive2": positive2, "negative": negative})

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = {}, seed: Any = None) -> Tensor:  # noqa: B006
        conds = [self.conds["negative"], self.conds["positive2"], self.conds["positive"]]
        negative, second, first = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return negative + self.cfg * ((first * second).abs().sqrt() * first.sign() - negative)


class Nameless(comfy.samplers.CFGGuider):
    """A guider that goes round the host's batching and its names: the network is called by hand, negative first."""

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = {}, seed: Any = None) -> Tensor:  # noqa: B006
        texts = [self.conds[name][0]["model_conds"]["c_crossattn"].cond for name in ("negative", "positive")]
        options = {**model_options["transformer_options"], "cond_or_uncond": [0, 1], "sigmas": timestep}
        context = torch.cat([text.expand(len(x), -1, -1) for text in texts])
        out = self.inner_model.apply_model(
            torch.cat([x, x]), torch.cat([timestep, timestep]), c_crossattn=context, transformer_options=options
        )
        negative, positive = out.chunk(2)
        return negative + self.cfg * (positive - negative)


def to_size(x: Tensor, rows: int) -> Tensor:
    """Rows repeated until there are so many: the whole list again and again, as the host's helper does."""
    return x.repeat(-(-rows // len(x)), *[1] * (x.ndim - 1))[:rows]


class MultiDiffusion:
    """ComfyUI-TiledDiffusion (shiimizu), which takes the model's function wrapper: tiles of the picture along the
    batch, each of them with all that the host had put into the batch; the options of the call stay as they are."""

    def __init__(self, tile_batch_size: int, tile: int = tiny.SIZE // 2) -> None:
        self.tile_batch_size, self.tile = tile_batch_size, tile

    def __call__(self, model_function: Any, args: dict[str, Any]) -> Tensor:
        x, t, c = args["input"], args["timestep"], args["c"]
        starts = range(0, x.shape[-1], self.tile)
        corners = [(i, j) for i in starts for j in starts]
        out = torch.zeros_like(x)
        for first in range(0, len(corners), self.tile_batch_size):
            some = [
                (..., slice(i, i + self.tile), slice(j, j + self.tile))
                for i, j in corners[first : first + self.tile_batch_size]
            ]
            tiles = torch.cat([x[place] for place in some])
            more = {key: to_size(v, len(tiles)) if isinstance(v, Tensor) else v for key, v in c.items()}
            found = model_function(tiles, to_size(t, len(tiles)), **more)
            for place, part in zip(some, found.split(len(x)), strict=True):
                out[place] = part
        return out


def tiled(model: Any, tile_batch_size: int) -> Any:
    model = model.clone()
    model.set_model_unet_function_wrapper(MultiDiffusion(tile_batch_size))
    return model


def one_after_the_other(model: Any) -> Any:
    """A function wrapper that saves memory: one call a prompt, with the options of the call for both."""

    def wrapper(apply_model: Any, args: dict[str, Any]) -> Tensor:
        parts = len(args["cond_or_uncond"])
        out = []
        for i, x in enumerate(args["input"].chunk(parts)):
            more = {key: v.chunk(parts)[i] if isinstance(v, Tensor) else v for key, v in args["c"].items()}
            out.append(apply_model(x, args["timestep"].chunk(parts)[i], **more))
        return torch.cat(out)

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


class AttentionCouple:
    """Two nodes of this name (laksjdjf).

    cgem156-ComfyUI's enlarges the batch inside attn2, every chunk but the negative one by the number of regions, and
    says so nowhere. The older attention-couple-ComfyUI, from which ComfyCouple is made, takes the slots of attn2 and
    brings keys and values of its own for every region.
    """

    def __init__(self, regions: int = 2) -> None:
        self.conds = [tiny.tokens(70 + i) for i in range(regions - 1)]

    def attention_couple_simple(self, model: Any) -> Any:
        regions = len(self.conds) + 1

        def attn2_patch(q: Tensor, k: Tensor, v: Tensor, extra_options: Any) -> tuple[Tensor, Tensor, Tensor]:
            assert k.mean() == v.mean(), "k and v must be the same."
            chunks = extra_options["cond_or_uncond"]
            self.batch_size = len(q) // len(chunks)
            qs, ks = [], []
            for which, q_i, k_i in zip(chunks, q.chunk(len(chunks)), k.chunk(len(chunks)), strict=True):
                here = 1 if which == 1 else regions
                more = [cond.to(k).repeat(self.batch_size, k.shape[1] // cond.shape[1], 1) for cond in self.conds]
                qs.append(q_i.repeat(here, 1, 1))
                ks.append(torch.cat([k_i, *more[: here - 1]]))
            return torch.cat(qs), torch.cat(ks), torch.cat(ks)

        def attn2_output_patch(out: Tensor, extra_options: Any) -> Tensor:
            parts, outputs = list(out.split(self.batch_size)), []
            for which in extra_options["cond_or_uncond"]:
                here = [parts.pop(0) for _ in range(1 if which == 1 else regions)]
                outputs.append(torch.stack(here).mean(0))
            return torch.cat(outputs)

        model = model.clone()
        model.set_model_attn2_patch(attn2_patch)
        model.set_model_attn2_output_patch(attn2_output_patch)
        return model

    def attention_couple(self, model: Any) -> Any:
        model, blocks = model.clone(), tiny.Recorder(model).blocks
        replace = model.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault("attn2", {})
        for key in tiny.SD1_BLOCKS:
            replace[key[:2]] = self.make_patch(blocks[key].attn2)
        return model

    def make_patch(self, module: Any) -> Any:
        def patch(q: Tensor, k: Tensor, v: Tensor, extra_options: Any) -> Tensor:
            chunks, out = extra_options["cond_or_uncond"], []
            for which, q_i in zip(chunks, q.chunk(len(chunks)), strict=True):
                texts = [tiny.tokens(2)] if which == 1 else [tiny.tokens(1), *self.conds]
                found = []
                for text in texts:
                    text = text.to(q).expand(len(q_i), -1, -1)
                    found.append(optimized_attention(q_i, module.to_k(text), module.to_v(text), module.heads))
                out.append(torch.stack(found).mean(0))
            return torch.cat(out)

        return patch


def windows_of_attention(model: Any, parts: int = 4) -> Any:
    """What regroups the rows of attn2 in a way that nobody declares (window attention, MSW-MSA of HiDiffusion and its
    kin): every picture's positions in several rows."""
    model = model.clone()

    def patch(n: Tensor, context: Tensor, value: Tensor, extra: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows = context.repeat_interleave(parts, 0)
        return n.reshape(len(n) * parts, -1, n.shape[-1]), rows, rows

    model.set_model_attn2_patch(patch)
    model.set_model_attn2_output_patch(lambda n, extra: n.reshape(len(n) // parts, -1, n.shape[-1]))
    return model


def masked(cond: list[list[Any]], start: float, end: float) -> list[list[Any]]:
    """A prompt for one part of the picture, left to right, that works in latents (ConditioningSetArea)."""
    width = round((end - start) * tiny.SIZE)
    area = (tiny.SIZE, width, 0, round(start * tiny.SIZE))
    return [[text, {**extra, "area": area}] for text, extra in cond]
