"""Stand-ins for other packs and for the host's own ways of changing a model: functions MODEL -> MODEL, or what a
conditioning brings. They do what the real ones do to the parts of a model that our edits touch; docstrings say which
packs they model, from their documented behaviour."""

from __future__ import annotations

from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.gligen
import comfy.hooks
import tiny
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

CPU = torch.device("cpu")


def fill(module: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    """Random weights that keep the size of what passes."""
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        fan = weight[0].numel() ** 0.5 if weight.ndim > 1 else 10.0
        weight.data.copy_(scale * torch.randn(weight.shape, generator=generator) / fan)
    return module.eval().requires_grad_(False)


class Attn2Replace:
    """IPAdapter's replacement (ComfyUI_IPAdapter_plus): attention, plus the image tokens' attention, by callbacks."""

    def __init__(self, seed: int) -> None:
        self.callbacks: list[Any] = []
        self.add(seed)

    def add(self, seed: int) -> None:
        self.callbacks.append(seed)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        out = optimized_attention(q, k, v, extra["n_heads"])
        for seed in self.callbacks:
            image = torch.randn(1, 4, k.shape[-1], generator=torch.Generator().manual_seed(seed)).to(q)
            image = image.expand(len(q), -1, -1)
            out = out + optimized_attention(q, image, image, extra["n_heads"])
        return out


def ip_adapter(model: Any, transformer: bool = True) -> Any:
    """As the pack does it: an instance in the slot of each block, `.add` if one is there already.

    InstantID and PuLID nodes of the same family share the slot in the same way.
    """
    model = model.clone()
    replace = model.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault("attn2", {})
    for i, key in enumerate(tiny.SD1_BLOCKS):
        slot = key if transformer else key[:2]
        if slot in replace:
            replace[slot].add(i)
        else:
            replace[slot] = Attn2Replace(i)
    return model


class AttentionCouple:
    """Regional prompts (ComfyUI-ppm's and cgem156's Attention Couple): enlarges the batch inside attn2 to one part per
    region, and blends them after."""

    def __init__(self, regions: int = 2, key: str = "cond_or_uncond_couple") -> None:
        self.regions, self.key = regions, key

    def patch(self, n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        ns, contexts, chunks = [], [], []
        count = len(extra["cond_or_uncond"])
        for part, c, cond in zip(n.chunk(count), context.chunk(count), extra["cond_or_uncond"], strict=True):
            regions = [c]
            if cond != 1:
                more = [tiny.tokens(70 + i).to(c) for i in range(self.regions - 1)]
                regions += [each.repeat(len(c), c.shape[1] // each.shape[1], 1) for each in more]
            ns += [part] * len(regions)
            contexts += regions
            chunks += [int(cond == 1)] * len(regions)
        extra[self.key] = chunks
        enlarged = torch.cat(contexts)
        return torch.cat(ns), enlarged, enlarged

    def output(self, n: Tensor, extra: dict[str, Any]) -> Tensor:
        out, parts, i = [], n.chunk(len(extra[self.key])), 0
        for cond in extra["cond_or_uncond"]:
            count = 1 if cond == 1 else self.regions
            out.append(sum(parts[i : i + count]) / count)
            i += count
        return torch.cat(out)


def couple(model: Any) -> Any:
    model, patches = model.clone(), AttentionCouple()
    model.set_model_attn2_patch(patches.patch)
    model.set_model_attn2_output_patch(patches.output)
    return model


def hooked_couple() -> comfy.hooks.HookGroup:
    """comfyui-prompt-control's: the same patches, with a key of its own, as a hook of one conditioning alone."""
    patches, group = AttentionCouple(key="cond_or_uncond_hook_couple"), comfy.hooks.HookGroup()
    both = {"attn2_patch": [patches.patch], "attn2_output_patch": [patches.output]}
    group.add(comfy.hooks.TransformerOptionsHook({"patches": both}, comfy.hooks.EnumHookScope.HookedOnly))
    return group


def nag(model: Any, scale: float = 3.0, tau: float = 2.5, alpha: float = 0.5) -> Any:
    """Normalised attention guidance (sd-perturbed-attention's NAG node, KJNodes' and ChenDarYen's): a function in the
    slot of each block that guides the positive's attention output away from a negative prompt's, within limits."""
    model, blocks = model.clone(), tiny.Recorder(model).blocks

    def replacement(block: Any) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            out = optimized_attention(q, k, v, extra["n_heads"])
            rows = len(q) // len(extra["cond_or_uncond"])
            for chunk, cond in enumerate(extra["cond_or_uncond"]):
                if cond == 0:
                    part = slice(chunk * rows, (chunk + 1) * rows)
                    negative = tiny.tokens(80).to(q).expand(rows, -1, -1)
                    k_n, v_n = block.attn2.to_k(negative), block.attn2.to_v(negative)
                    z, z_n = out[part], optimized_attention(q[part], k_n, v_n, extra["n_heads"])
                    guided = z * scale - z_n * (scale - 1)
                    ratio = guided.norm(1, -1, keepdim=True) / z.norm(1, -1, keepdim=True)
                    guided = guided * (ratio.clamp_max(tau) / ratio)
                    out = torch.cat([out[: part.start], guided * alpha + z * (1 - alpha), out[part.stop :]])
            return out

        return attend

    for key, block in blocks.items():
        model.set_model_attn2_replace(replacement(block), *key)
    return model


def longer_context(model: Any) -> Any:
    """Tokens appended to keys and values by an attn2_patch (PuLID-like adapters, prompt-control's and NegPip's kin)."""
    model, more = model.clone(), tiny.tokens(90, 77)

    def patch(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        tail = more.to(context).expand(len(context), -1, -1)
        return n, torch.cat([context, tail], 1), torch.cat([value, 0.5 * tail], 1)

    model.set_model_attn2_patch(patch)
    return model


def free_u(model: Any) -> Any:
    """FreeU and its kin: an output_block_patch that rescales what the decoder gets."""
    model = model.clone()
    model.set_model_output_block_patch(lambda h, skip, extra: (h * 1.1, skip * 0.9))
    return model


def lora(model: Any, strength: float = 1.0) -> Any:
    """LoraLoader: low-rank differences of weights, the cross-attentions' among them, patched in when loaded."""
    model = model.clone()
    model.add_patches(weight_differences(model), strength)
    return model


def weight_differences(model: Any) -> dict[str, Any]:
    weights = model.model.state_dict()
    names = [name for name in weights if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight", "attn2.to_q.weight"))]
    out = {}
    for i, name in enumerate(names):
        rows, columns = weights[name].shape
        generator = torch.Generator().manual_seed(i)
        up, down = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
        out[name] = ("diff", (0.5 * up @ down * columns**-0.5,))
    return out


def lora_hook(model: Any) -> comfy.hooks.HookGroup:
    """Create Hook LoRA on a conditioning (the host's own; prompt-control's scheduled LoRAs)."""
    hook, group = comfy.hooks.WeightHook(), comfy.hooks.HookGroup()
    hook.weights, hook.need_weight_init = weight_differences(model), False
    group.add(hook)
    return group


def options_hook() -> comfy.hooks.HookGroup:
    """A TransformerOptionsHook with an attn2_patch of its own (the host's hooks; prompt-control's attention couple)."""

    def patch(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return n, 0.5 * context, value

    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.TransformerOptionsHook({"patches": {"attn2_patch": [patch]}}))
    return group


def control_net() -> comfy.controlnet.ControlNet:
    """The host's ControlNet with a tiny model; its outputs are lists that a model call uses up."""
    shape = {**tiny.sd1().model.model_config.unet_config, "hint_channels": 3, "dtype": torch.float32}
    model = fill(comfy.cldm.cldm.ControlNet(**shape, device=CPU), 11, 0.5)
    control = comfy.controlnet.ControlNet(model, load_device=CPU)
    hint = torch.rand(1, 3, 8 * tiny.SIZE, 8 * tiny.SIZE, generator=torch.Generator().manual_seed(12))
    return control.set_cond_hint(hint)


def gligen(inner: tuple[int, ...]) -> tuple[str, Any, list[Any]]:
    """GLIGEN's boxes as the host's node puts them into a conditioning: a middle_patch between attn1 and attn2.

    inner: the width of each transformer block.
    """
    fusers = [comfy.gligen.GatedSelfAttentionDense(width, tiny.WIDTH, 4, width // 4) for width in inner]
    made = comfy.gligen.Gligen(fusers, comfy.gligen.PositionNet(tiny.WIDTH, tiny.WIDTH), tiny.WIDTH)
    made.requires_grad_(False)
    fill(made, 13)
    for fuser in fusers:
        fuser.alpha_attn.fill_(1.0)
        fuser.alpha_dense.fill_(1.0)
    box = (tiny.tokens(14)[0, :1], tiny.SIZE // 2, tiny.SIZE // 2, 0, 0)
    return "position", ModelPatcher(made, load_device=CPU, offload_device=CPU), [box]
