"""A pack for a server under a policy, each of whose nodes tries to get a MODEL sampled without its edits: what packs of
other people do by accident, and somebody might on purpose. test_policy_attacks.py puts it among the custom nodes."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import foreign_bypass as packs
import torch


def leave_out(model: Any) -> Any:
    """The picture follows the other prompt, nearly alone: instead of the guidance, before it, behind it."""
    model = model.clone()
    model.set_model_sampler_cfg_function(lambda args: args["uncond"] + 0.01 * (args["cond"] - args["uncond"]))
    return model


def before(model: Any) -> Any:
    model = model.clone()
    model.set_model_sampler_pre_cfg_function(lambda args: [0.01 * args["conds_out"][0], args["conds_out"][1]])
    return model


def after(model: Any) -> Any:
    model = model.clone()
    model.set_model_sampler_post_cfg_function(lambda args: 0.99 * args["uncond_denoised"] + 0.01 * args["denoised"])
    return model


MODELS = {
    "DeepCache": packs.DeepCache().apply,
    **{each.__name__: each for each in (packs.known_options_only, packs.wrappers_dropped_while_sampling)},
    **{each.__name__: each for each in (packs.own_forward, packs.several_devices)},
    **{each.__name__: each for each in (packs.new_transformer_options, packs.new_wrappers, leave_out, before, after)},
}


class Copied(comfy.samplers.CFGGuider):
    """Another class's method, which nobody wrapped: as it was when this pack was loaded, before any policy."""

    sample = getattr(comfy.samplers.CFGGuider.sample, "__wrapped__", comfy.samplers.CFGGuider.sample)


class Loop(comfy.samplers.CFGGuider):
    """One step by code of its own."""

    def sample(self, noise: Any, *args: Any, **kwargs: Any) -> Any:
        text = self.original_conds["positive"][0]["cross_attn"]
        return self.model_patcher.model.apply_model(noise, torch.ones(len(noise)), c_crossattn=text)


class Two(comfy.samplers.CFGGuider):
    """Another MODEL's network, a copy of it, within a run."""

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
        other = comfy.samplers.CFGGuider(self.model_patcher).model_patcher.model
        copied = object.__new__(type(other))
        copied.__dict__.update(other.__dict__)
        return copied.apply_model(x, timestep, c_crossattn=self.conds["positive"][0]["model_conds"]["c_crossattn"].cond)


class Nameless(comfy.samplers.CFGGuider):
    """Its own batch of prompts, negative first, of which the host knows nothing."""

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
        texts = [self.conds[name][0]["model_conds"]["c_crossattn"].cond for name in ("negative", "positive")]
        options = {**model_options["transformer_options"], "cond_or_uncond": [0, 1], "sigmas": timestep}
        both = torch.cat([x, x]), torch.cat([timestep, timestep])
        out = self.inner_model.apply_model(*both, c_crossattn=torch.cat(texts), transformer_options=options)
        return out.chunk(2)[1]


class Within(comfy.samplers.CFGGuider):
    """A guider within a guider, which samples again at each step."""

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
        inner = comfy.samplers.CFGGuider(self.model_patcher)
        inner.original_conds = self.original_conds
        sigmas = torch.cat([timestep[:1], torch.zeros(1)])
        sampler, start = comfy.samplers.sampler_object("euler"), torch.zeros_like(x)
        return inner.sample(x / timestep[0], start, sampler, sigmas, seed=5)


GUIDERS = {each.__name__: each for each in (Copied, Loop, Two, Nameless, Within)}


class AttackModel:
    CATEGORY, RETURN_TYPES, FUNCTION = "attackers", ("MODEL",), "made"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "way": (list(MODELS),)}}

    def made(self, model: Any, way: str) -> tuple[Any]:
        return (MODELS[way](model),)


class AttackGuider:
    CATEGORY, RETURN_TYPES, FUNCTION = "attackers", ("GUIDER",), "made"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        links = {"model": ("MODEL",), "positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}
        return {"required": {**links, "way": (list(GUIDERS),)}}

    def made(self, model: Any, positive: Any, negative: Any, way: str) -> tuple[Any]:
        guider = GUIDERS[way](model)
        guider.set_conds(positive, negative)
        guider.set_cfg(4.0)
        return (guider,)


class AttackSigmas:
    CATEGORY, RETURN_TYPES, FUNCTION = "attackers", ("SIGMAS",), "made"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"sigmas": ("STRING",)}}

    def made(self, sigmas: str) -> tuple[Any]:
        return (torch.tensor([float(each) for each in sigmas.split(",")]),)


NODE_CLASS_MAPPINGS = {each.__name__: each for each in (AttackModel, AttackGuider, AttackSigmas)}
