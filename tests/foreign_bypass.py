"""Stand-ins for packs that can leave an edit out: they go round the host's call of the model, drop what they do not
know, or put a forward of their own in its place. Written from what the real ones do; docstrings name them."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding
from torch import Tensor


class DeepCache:
    """ComfyUI-deepcache (styler00dollar, after laksjdjf): a function wrapper that runs the UNet's blocks itself, so
    that neither the host's apply_model nor its wrappers are called; between two full passes it reuses the deep part."""

    def apply(self, model: Any, cache_interval: int = 3, cache_depth: int = 1) -> Any:
        new_model = model.clone()
        state: dict[str, Any] = {"step": -1, "t": -1.0, "h": None}

        def apply_model(model_function: Any, kwargs: dict[str, Any]) -> Tensor:
            inner, unet = new_model.model, new_model.model.diffusion_model
            x, sigma, options = kwargs["input"], kwargs["timestep"], kwargs["c"]["transformer_options"]
            context = kwargs["c"]["c_crossattn"]
            t = inner.model_sampling.timestep(sigma).float()
            state["step"] = 0 if float(t[0]) > state["t"] else state["step"] + 1
            state["t"] = float(t[0])
            full = state["step"] % cache_interval == 0
            emb = unet.time_embed(timestep_embedding(t, unet.model_channels))
            h, skips = inner.model_sampling.calculate_input(sigma, x), []
            for i, module in enumerate(unet.input_blocks):
                options["block"] = ("input", i)
                h = forward_timestep_embed(module, h, emb, context, options)
                skips.append(h)
                if i == cache_depth and not full:
                    break
            if full:
                options["block"] = ("middle", 0)
                h = forward_timestep_embed(unet.middle_block, h, emb, context, options)
            for i, module in enumerate(unet.output_blocks):
                deep = len(unet.output_blocks) - cache_depth - 1
                if i < deep and not full:
                    continue
                if i == deep:
                    h = state["h"] = h if full else state["h"]
                options["block"] = ("output", i)
                h = torch.cat([h, skips.pop()], 1)
                h = forward_timestep_embed(module, h, emb, context, options, skips[-1].shape if skips else None)
            return inner.model_sampling.calculate_denoised(sigma, unet.out(h), x)

        new_model.set_model_unet_function_wrapper(apply_model)
        return new_model


KNOWN = ("cond_or_uncond", "sigmas", "sample_sigmas", "patches", "patches_replace", "uuids")


def known_options_only(model: Any) -> Any:
    """A function wrapper that makes transformer_options anew, of the keys that its author knew."""

    def wrapper(apply_model: Any, args: dict[str, Any]) -> Tensor:
        c = args["c"]
        options = {key: c["transformer_options"][key] for key in KNOWN if key in c["transformer_options"]}
        return apply_model(args["input"], args["timestep"], **{**c, "transformer_options": options})

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


def new_transformer_options(model: Any) -> Any:
    """A pack that assigns the MODEL's transformer_options instead of adding to them."""
    model = model.clone()
    model.model_options["transformer_options"] = {"patches": {"input_block_patch": [lambda h, options: h]}}
    return model


def several_devices(model: Any) -> Any:
    """MultiGPU CFG Split of newer hosts: a copy of the model for each further device, beside it under a key of its
    own; their prompts are sampled in threads, through other networks than the MODEL's."""
    model = model.clone()
    copied = model.clone()
    copied.set_additional_models("multigpu", [])
    model.set_additional_models("multigpu", [copied])
    return model


def new_wrappers(model: Any) -> Any:
    """The same of the MODEL's wrappers."""
    model = model.clone()
    model.wrappers = {}
    return model


def wrappers_dropped_while_sampling(model: Any) -> Any:
    """A pack that calls the model without any wrapper from within a wrapper of the prediction."""

    def predict(executor: Any, x: Tensor, timestep: Tensor, model_options: Any, *args: Any) -> Tensor:
        options = {**model_options["transformer_options"], "wrappers": {}}
        return executor(x, timestep, {**model_options, "transformer_options": options}, *args)

    model = model.clone()
    model.add_wrapper_with_key("predict_noise", "bare", predict)
    return model


def own_forward(model: Any) -> Any:
    """A pack that puts a forward of its own into every transformer block (older Inspyrenet-, ToMe- and Flux-like
    ports, TGATE): plain attention, no patches."""
    model = model.clone()

    def forward(block: BasicTransformerBlock, x: Tensor, context: Any = None, transformer_options: Any = {}) -> Tensor:  # noqa: B006
        x = x + block.attn1(block.norm1(x))
        x = x + block.attn2(block.norm2(x), context=context)
        return x + block.ff(block.norm3(x))

    for name, module in model.model.named_modules():
        if isinstance(module, BasicTransformerBlock):
            model.add_object_patch(f"{name}.forward", MethodType(forward, module))
    return model


def ends_early(model: Any, blocks: int = 2) -> Any:
    """A pack that leaves out some transformer blocks altogether (T-GATE, skip-layer nodes for UNets)."""
    model = model.clone()
    names = [name for name, module in model.model.named_modules() if isinstance(module, BasicTransformerBlock)]
    for name in names[:blocks]:
        model.add_object_patch(f"{name}.forward", lambda x, context=None, transformer_options={}: x)
    return model


class PatchTypeTransformerReplace:
    """A slot that ModelPatchConditional fills: what the two models have there, or plain attention."""

    def __init__(self, name: str) -> None:
        self.name = name

    def of(self, model_options: Any) -> dict[Any, Any]:
        return model_options.get("transformer_options", {}).get("patches_replace", {}).get(self.name, {})

    def __call__(self, key: Any, model_options: Any, *args: Any) -> Tensor:
        patch = self.of(model_options).get(key)
        return patch(*args) if patch else optimized_attention(*args[:-1], heads=args[-1]["n_heads"])


class PatchTypeTransformer:
    """The same for the patches of which there is a list."""

    def __init__(self, name: str) -> None:
        self.name = name

    def of(self, model_options: Any) -> list[Any]:
        return model_options.get("transformer_options", {}).get("patches", {}).get(self.name, [])

    def __call__(self, key: Any, model_options: Any, result: Any, options: Any) -> Any:
        for patch in self.of(model_options):
            result = patch(result, options)
        return result


class PatchTypeSamplerPostCfgFunction(PatchTypeTransformer):
    """And for functions behind the guidance."""

    def of(self, model_options: Any) -> list[Any]:
        return model_options.get(self.name, [])

    def __call__(self, key: Any, model_options: Any, said: Any) -> Any:
        for patch in self.of(model_options):
            said = {**said, "denoised": patch(said)}
        return said["denoised"]


class ModelPatchConditional:
    """ComfyUI-bleh (blepping): one MODEL's patches within a range of the timesteps, another's outside of it. It copies
    the kinds of patches that it has a list of, from the options of both, into a clone of one, functions behind the
    guidance among them; no wrapper, no other key of transformer_options is."""

    def __init__(
        self, model_default: Any, model_matched: Any, start_percent: float = 0.0, end_percent: float = 1.0
    ) -> None:
        self.options_default = dict(**model_default.model_options)
        self.options_matched = dict(**model_matched.model_options)
        self.start_percent, self.end_percent = start_percent, end_percent
        self.base = model_default

    def mk_patch_handler(self, pt: Any, key: Any = None) -> Any:
        sampling = self.base.get_model_object("model_sampling")
        start, end = (sampling.percent_to_sigma(percent) for percent in (self.start_percent, self.end_percent))

        def handler(*args: Any) -> Tensor:
            said = args[-1]
            matched = end <= float(said["sigmas" if "sigmas" in said else "sigma"][0]) <= start
            return pt(key, self.options_matched if matched else self.options_default, *args)

        return handler

    def patch(self) -> Any:
        made = self.base.clone()
        for name in ("input_block_patch", "middle_patch"):
            pt = PatchTypeTransformer(name)
            if pt.of(self.options_default) or pt.of(self.options_matched):
                patches = made.model_options["transformer_options"].setdefault("patches", {})
                patches[name] = [self.mk_patch_handler(pt)]
        for name in ("attn1", "attn2"):
            slots = PatchTypeTransformerReplace(name)
            keys = slots.of(self.options_default).keys() | slots.of(self.options_matched).keys()
            if keys:
                replace = made.model_options["transformer_options"].setdefault("patches_replace", {})
                replace[name] = {key: self.mk_patch_handler(slots, key) for key in keys}
        guided = PatchTypeSamplerPostCfgFunction("sampler_post_cfg_function")
        if guided.of(self.options_default) or guided.of(self.options_matched):
            made.model_options[guided.name] = [self.mk_patch_handler(guided)]
        made.model_options["disable_cfg1_optimization"] = False
        return made


class NAGCFGGuider(comfy.samplers.CFGGuider):
    """ChenDarYen's ComfyUI-NAG: while it samples, the UNet's forward and every attn2's are its own; the context has
    more rows than the picture, the last of them NAG's negative prompt. Its wrappers of a prediction are left out, and
    where sampling fails the UNet keeps its forward."""

    nag_scale = 5.0

    def set_nag(self, nag_negative: Any, nag_scale: float = 5.0, batch_size: int = 1) -> None:
        self.nag_negative_cond = copy.deepcopy(nag_negative)
        self.nag_scale, self.batch_size = nag_scale, batch_size

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.predict_noise(*args, **kwargs)

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        unet = self.model_patcher.model.diffusion_model
        negative = self.nag_negative_cond[0][0].expand(self.batch_size, -1, -1)
        unet.forward = MethodType(partial(nag_unet_forward, negative=negative, scale=self.nag_scale), unet)
        out = super().sample(*args, **kwargs)
        del unet.forward
        return out


def nag_unet_forward(
    unet: Any,
    x: Tensor,
    timesteps: Any = None,
    context: Any = None,
    y: Any = None,
    control: Any = None,
    transformer_options: Any = {},  # noqa: B006
    negative: Any = None,
    scale: float = 1.0,
    **kwargs: Any,
) -> Tensor:
    context = torch.cat([context, negative.to(context)])
    blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
    for block in blocks:
        block.attn2.forward = MethodType(partial(nag_attention, rows=len(negative), scale=scale), block.attn2)
    wrappers = comfy.patcher_extension.get_all_wrappers("diffusion_model", transformer_options)
    out = comfy.patcher_extension.WrapperExecutor.new_class_executor(unet._forward, unet, wrappers).execute(
        x, timesteps, context, y, control, transformer_options, **kwargs
    )
    for block in blocks:
        del block.attn2.forward
    return out


def nag_attention(
    attn: Any,
    x: Tensor,
    context: Any = None,
    value: Any = None,
    mask: Any = None,
    transformer_options: Any = None,
    rows: int = 1,
    scale: float = 1.0,
) -> Tensor:
    q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
    out = optimized_attention(q, k[:-rows], v[:-rows], attn.heads)
    guided = optimized_attention(q[-rows:], k[-rows:], v[-rows:], attn.heads)
    out = torch.cat([out[:-rows], out[-rows:] * scale - guided * (scale - 1)])
    return attn.to_out(out)


def negpip_clip(clip: Any) -> Any:
    """ComfyUI-ppm's CLIP NegPip (and cd-tuner's): every token twice in the encoding, once for keys and once for
    values, one after the other."""
    clip = clip.clone()
    clip.patcher.model_options["ppm_negpip"] = True
    for name in ("clip_l", "clip_g"):
        inner = getattr(clip.patcher.model, name, None)
        if inner is not None:
            plain = MethodType(type(inner).encode_token_weights, inner)

            def doubled(token_weight_pairs: Any, plain: Any = plain) -> Any:
                out, *rest = plain(token_weight_pairs)
                return (out.repeat_interleave(2, 1), *rest)

            clip.patcher.add_object_patch(f"{name}.encode_token_weights", doubled)
    return clip


def negpip_model(model: Any) -> Any:
    """The other half of it: keys from the even tokens of the context, values from the odd ones."""
    model = model.clone()
    model.set_model_attn2_patch(lambda q, k, v, extra_options: (q, k[:, 0::2], v[:, 1::2]))
    model.model_options["ppm_negpip"] = True
    return model


def doubled(cond: list[list[Any]]) -> list[list[Any]]:
    """A CONDITIONING as NegPip's CLIP makes it, of a plain one."""
    return [[tokens.repeat_interleave(2, 1), extra] for tokens, extra in cond]


class WanVideoNAG:
    """KJNodes': a forward of its own in each of Wan's cross-attentions, which reads the prompt and then a text of its
    own, by the host's attention and with the host's options. looked: q, k, v and what each found."""

    def __init__(self, negative: Tensor, scale: float = 3.0, alpha: float = 0.25, tau: float = 2.5) -> None:
        self.negative, self.scale, self.alpha, self.tau = negative, scale, alpha, tau
        self.looked: list[tuple[Tensor, ...]] = []

    def patch(self, model: Any) -> Any:
        model = model.clone()
        network = model.get_model_object("diffusion_model")
        with torch.no_grad():
            text = network.text_embedding(self.negative)
        for i, block in enumerate(network.blocks):
            forward = MethodType(partial(self.forward, text), block.cross_attn)
            model.add_object_patch(f"diffusion_model.blocks.{i}.cross_attn.forward", forward)
        return model

    def forward(self, text: Tensor, attn: Any, x: Tensor, context: Tensor, **more: Any) -> Tensor:
        """text, context: [b, L, C]; x: [b, N, C]."""
        q = attn.norm_q(attn.q(x))
        options = more.get("transformer_options", {})
        found = []
        for each in (context, text.expand(len(x), -1, -1)):
            k, v = attn.norm_k(attn.k(each)), attn.v(each)
            found.append(optimized_attention(q, k, v, heads=attn.num_heads, transformer_options=options))
            self.looked.append((q, k, v, found[-1].clone()))
        z, z_n = found
        guided = z * self.scale - z_n * (self.scale - 1)
        longer = guided.norm(p=1, dim=-1, keepdim=True) / z.norm(p=1, dim=-1, keepdim=True)
        guided = guided * (self.tau / longer).clamp(max=1)
        return attn.o(guided * self.alpha + z * (1 - self.alpha))


def longer_text(model: Any, more: Tensor) -> Any:
    """A pack's wrapper of the network that puts tokens [1, n, W] behind the text it is called with."""

    def theirs(executor: Any, *args: Any, **kwargs: Any) -> Any:
        texts = [x if not is_text(x) else torch.cat([x, more.expand(len(x), -1, -1)], 1) for x in args]
        return executor(*texts, **kwargs)

    def is_text(x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim == 3 and x.shape[-1] == more.shape[-1]

    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "theirs", theirs)
    return model


def step_cache(model: Any, start: float, near: float) -> Any:
    """As TeaCache and its like, by a wrapper of the network: from a noise level on, what it last made of the prompts
    of the same places is given back while the noise level is near to that of then."""
    kept: dict[tuple[int, ...], tuple[float, Tensor]] = {}

    def cached(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = kwargs.get("transformer_options") or next(a for a in reversed(args) if isinstance(a, dict))
        places, sigma = tuple(options["cond_or_uncond"]), float(options["sigmas"].max())
        if places in kept and sigma <= start and kept[places][0] - sigma < near:
            return kept[places][1].clone()
        kept[places] = sigma, executor(x, *args, **kwargs)
        return kept[places][1].clone()

    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "step cache", cached)
    return model


def late_attention(model: Any, below: float, asks: bool) -> Any:
    """A pack's wrapper of the network that sets the override of attentions below a noise level; asks: it asks the one
    that stood there."""

    def theirs(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("transformer_options") or next(a for a in reversed(args) if isinstance(a, dict))
        before = options.get("optimized_attention_override")

        def attention(plain: Any, *args: Any, **more: Any) -> Tensor:
            return before(plain, *args, **more) if asks and before else plain(*args, **more)

        if float(options["sigmas"].max()) < below:
            options["optimized_attention_override"] = attention
        return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "late", theirs)
    return model
