"""Graphs of the host's own nodes around the demo model, as people build them, each different from all others.

Every one asks for a kitchen knife in two or three steps. A value that a graph does not name is its node's default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from conceptguard.demo import lora

Link = list[Any]  # [node, output]
SIZE = 64  # of the pictures, in pixels
GRAPHS: dict[str, Callable[[Graph], Link]] = {}  # by name, each with the latents, or the picture, that it makes


class Graph:
    """An API prompt in the making. known: the host's object_info."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.known, self.nodes = known, dict[str, Any]()
        self.loader = self.add("ConceptGuardLoadDemo")
        self.model, self.clip, self.vae = self.loader, [self.loader[0], 1], [self.loader[0], 2]
        self.negative = self.said("")
        self.positive = self.said("a kitchen knife")
        self.latent = self.add("EmptyLatentImage", width=SIZE, height=SIZE)

    def add(self, kind: str, output: int = 0, **inputs: Any) -> Link:
        """A node, with its defaults; the link of one of its outputs."""
        values = {name: default_of(spec) for name, spec in self.known[kind]["input"]["required"].items()}
        held = {name: value for name, value in values.items() if value is not None}
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": {**held, **inputs}}
        return [number, output]

    def said(self, text: str, clip: Link | None = None) -> Link:
        return self.add("CLIPTextEncode", clip=clip or self.clip, text=text)

    def patched(self, kind: str, **inputs: Any) -> Link:
        """The MODEL behind a node."""
        return self.add(kind, model=self.model, **inputs)

    def ksampler(self, **inputs: Any) -> Link:
        links = {"model": self.model, "positive": self.positive, "negative": self.negative, "latent_image": self.latent}
        return self.add("KSampler", **{**links, "steps": 2, "cfg": 4.0, "scheduler": "normal", **inputs})

    def advanced(self, **inputs: Any) -> Link:
        links = {"model": self.model, "positive": self.positive, "negative": self.negative, "latent_image": self.latent}
        return self.add("KSamplerAdvanced", **{**links, "steps": 4, "cfg": 4.0, **inputs})

    def sigmas(self, steps: int = 2, **inputs: Any) -> Link:
        return self.add("BasicScheduler", model=self.model, steps=steps, **inputs)

    def custom(self, sampler: Link | None = None, sigmas: Link | None = None, **inputs: Any) -> Link:
        links = {"model": self.model, "positive": self.positive, "negative": self.negative, "latent_image": self.latent}
        chosen = sampler or self.add("KSamplerSelect", sampler_name="euler")
        return self.add(
            "SamplerCustom", sampler=chosen, sigmas=sigmas or self.sigmas(), **{**links, "cfg": 4.0, **inputs}
        )

    def guided(self, guider: Link, noise: Link | None = None, sigmas: Link | None = None, **inputs: Any) -> Link:
        sampler = self.add("KSamplerSelect", sampler_name="euler")
        noise = noise or self.add("RandomNoise")
        links = {"latent_image": self.latent, "sigmas": sigmas or self.sigmas(), "sampler": sampler, "noise": noise}
        return self.add("SamplerCustomAdvanced", guider=guider, **{**links, **inputs})

    def picture(self) -> Link:
        return self.add("EmptyImage", width=SIZE, height=SIZE, color=0x808080)

    def mask(self) -> Link:
        return self.add("SolidMask", width=SIZE, height=SIZE, value=1.0)

    def encoded(self) -> Link:
        return self.add("VAEEncode", pixels=self.picture(), vae=self.vae)

    def ended(self, samples: Link) -> dict[str, Any]:
        """The whole prompt, with a picture at its end."""
        self.add("PreviewImage", images=self.add("VAEDecode", samples=samples, vae=self.vae))
        return self.nodes


def default_of(spec: Any) -> Any:
    kind, *more = spec
    options: dict[str, Any] = more[0] if more else {}
    choices = kind if isinstance(kind, list) else options.get("options")
    if "default" in options:
        return options["default"]
    return choices[0] if choices else {"STRING": "", "INT": options.get("min"), "BOOLEAN": False}.get(str(kind))


def graph(make: Callable[[Graph], Link]) -> Callable[[Graph], Link]:
    GRAPHS[make.__name__.replace("_", " ")] = make
    return make


def of(name: str, make: Callable[[Graph], Link]) -> None:
    assert name not in GRAPHS
    GRAPHS[name] = make


# --- samplers and schedules ------------------------------------------------------------------------------------------

NAMES = ["heun", "dpm_2_ancestral", "lms", "dpmpp_sde", "dpmpp_3m_sde", "ddpm", "lcm", "ddim", "uni_pc_bh2"]
NAMES += ["res_multistep_ancestral_cfg_pp", "gradient_estimation", "seeds_2"]
for sampler in NAMES:
    of(f"sampler {sampler}", lambda g, name=sampler: g.ksampler(sampler_name=name))  # type: ignore[misc]
for scheduler in ("karras", "exponential", "kl_optimal"):
    of(f"scheduler {scheduler}", lambda g, name=scheduler: g.ksampler(scheduler=name, steps=3))  # type: ignore[misc]

SCHEDULES: dict[str, dict[str, Any]] = {
    "KarrasScheduler": {"steps": 3},
    "ExponentialScheduler": {"steps": 3},
    "PolyexponentialScheduler": {"steps": 3},
    "LaplaceScheduler": {"steps": 3, "mu": -0.5, "beta": 0.1},
    "VPScheduler": {"steps": 3},
    "BetaSamplingScheduler": {"steps": 3, "alpha": 20.0, "beta": 1.0},
    "SDTurboScheduler": {"steps": 1},
    "AlignYourStepsScheduler": {"steps": 10, "denoise": 0.3},
    "GITSScheduler": {"steps": 3},
    "OptimalStepsScheduler": {"steps": 3},
}


def scheduled(g: Graph, kind: str) -> Link:
    given = {"model": g.model} if "model" in g.known[kind]["input"]["required"] else {}
    return g.custom(sigmas=g.add(kind, **SCHEDULES[kind], **given))


for kind in SCHEDULES:
    of(kind, lambda g, kind=kind: scheduled(g, kind))  # type: ignore[misc]

SAMPLERS = ["SamplerLMS", "SamplerEulerAncestralCFGPP", "SamplerSASolver", "SamplerER_SDE"]
SAMPLERS += ["SamplerEulerCFGpp", "SamplerDPMPP_2M_SDE", "SamplerLCMUpscale"]


def chosen(g: Graph, kind: str) -> Link:
    given = {"model": g.model} if "model" in g.known[kind]["input"]["required"] else {}
    return g.custom(sampler=g.add(kind, **given))


for kind in SAMPLERS:
    of(kind, lambda g, kind=kind: chosen(g, kind))  # type: ignore[misc]


@graph
def sigmas_in_two_stages(g: Graph) -> Link:
    parts = g.add("SplitSigmas", sigmas=g.sigmas(4), step=2)
    first = g.custom(sigmas=parts)
    return g.custom(sigmas=[parts[0], 1], latent_image=first, add_noise=False)


@graph
def the_last_sigmas_alone(g: Graph) -> Link:
    return g.custom(sigmas=g.add("SplitSigmasDenoise", 1, sigmas=g.sigmas(4), denoise=0.5))


@graph
def sigmas_upwards_and_down_again(g: Graph) -> Link:
    noisy = g.custom(sigmas=g.add("FlipSigmas", sigmas=g.sigmas(3)), latent_image=g.encoded(), cfg=1.0)
    return g.custom(latent_image=noisy, add_noise=False)


@graph
def another_first_sigma(g: Graph) -> Link:
    return g.custom(sigmas=g.add("SetFirstSigma", sigmas=g.sigmas(3), sigma=3.0))


@graph
def more_sigmas_between(g: Graph) -> Link:
    return g.custom(sigmas=g.add("ExtendIntermediateSigmas", sigmas=g.sigmas(2)))


@graph
def two_advanced_samplers(g: Graph) -> Link:
    first = g.advanced(start_at_step=0, end_at_step=2, return_with_leftover_noise="enable")
    return g.advanced(start_at_step=2, add_noise="disable", latent_image=first)


@graph
def the_first_stage_alone(g: Graph) -> Link:
    return g.advanced(end_at_step=3, return_with_leftover_noise="enable")


@graph
def a_harmless_first_stage(g: Graph) -> Link:
    first = g.advanced(end_at_step=1, positive=g.said("a cat"), return_with_leftover_noise="enable")
    return g.advanced(start_at_step=1, add_noise="disable", latent_image=first)


# --- guiders ---------------------------------------------------------------------------------------------------------


@graph
def a_guider(g: Graph) -> Link:
    return g.guided(g.add("CFGGuider", model=g.model, positive=g.positive, negative=g.negative, cfg=4.0))


@graph
def a_guider_below_nothing(g: Graph) -> Link:
    return g.guided(g.add("CFGGuider", model=g.model, positive=g.negative, negative=g.positive, cfg=0.0))


@graph
def a_guider_without_a_negative(g: Graph) -> Link:
    return g.guided(g.add("BasicGuider", model=g.model, conditioning=g.positive))


@graph
def two_guidances(g: Graph) -> Link:
    conds = {"cond1": g.said("a cat"), "cond2": g.positive, "negative": g.negative}
    return g.guided(g.add("DualCFGGuider", model=g.model, **conds, cfg_conds=4.0, cfg_cond2_negative=4.0))


@graph
def two_guidances_nested(g: Graph) -> Link:
    conds = {"cond1": g.said("a cat"), "cond2": g.positive, "negative": g.negative}
    how = {"style": "nested"} if "style" in g.known["DualCFGGuider"]["input"].get("optional", {}) else {}
    return g.guided(g.add("DualCFGGuider", model=g.model, **conds, cfg_conds=1.0, cfg_cond2_negative=0.5, **how))


@graph
def a_perpendicular_negative(g: Graph) -> Link:
    conds = {"positive": g.said("a cat"), "negative": g.positive, "empty_conditioning": g.negative}
    return g.guided(g.add("PerpNegGuider", model=g.model, **conds, cfg=0.5, neg_scale=1.0))


@graph
def a_perpendicular_negative_on_the_model(g: Graph) -> Link:
    return g.ksampler(model=g.patched("PerpNeg", empty_conditioning=g.negative))


@graph
def no_noise(g: Graph) -> Link:
    guider = g.add("BasicGuider", model=g.model, conditioning=g.positive)
    return g.guided(guider, noise=g.add("DisableNoise"))


@graph
def noise_added_by_hand(g: Graph) -> Link:
    sigmas = g.sigmas(2)
    noise = {"noise": g.add("RandomNoise"), "sigmas": sigmas, "latent_image": g.latent}
    guider = g.add("BasicGuider", model=g.model, conditioning=g.positive)
    noisy = g.add("AddNoise", model=g.model, **noise)
    return g.guided(guider, noise=g.add("DisableNoise"), sigmas=sigmas, latent_image=noisy)


# --- nodes that change the MODEL -------------------------------------------------------------------------------------

PATCHES: dict[str, dict[str, Any]] = {
    "RescaleCFG": {},
    "SelfAttentionGuidance": {},
    "PerturbedAttentionGuidance": {},
    "FreeU": {},
    "FreeU_V2": {},
    "HyperTile": {"tile_size": 64},
    "TomePatchModel": {},
    "PatchModelAddDownscale": {"block_number": 1},
    "FreSca": {"scale_low": 0.05, "scale_high": 0.05},
    "APG": {"norm_threshold": 0.1},
    "TCFG": {},
    "Mahiro": {},
    "CFGZeroStar": {},
    "CFGNorm": {},
    "RenormCFG": {"cfg_trunc": 100.0, "renorm_cfg": 0.1},
    "Epsilon Scaling": {},
    "TemporalScoreRescaling": {},
    "EasyCache": {},
    "LazyCache": {},
    "DifferentialDiffusion": {},
    "ContextWindowsManual": {},
    "ModelComputeDtype": {"dtype": "fp32"},
    "ModelSamplingDiscrete": {"sampling": "lcm", "zsnr": True},
    "ModelSamplingContinuousEDM": {"sampling": "eps"},
    "UNetSelfAttentionMultiply": {"v": 1.1},
    "UNetCrossAttentionMultiply": {"q": 1.3, "out": 1.2},
    "UNetTemporalAttentionMultiply": {},
}
for kind, inputs in PATCHES.items():
    of(kind, lambda g, kind=kind, inputs=inputs: g.ksampler(model=g.patched(kind, **inputs)))  # type: ignore[misc]


@graph
def an_operation_on_the_guidance(g: Graph) -> Link:
    operation = g.add("LatentOperationTonemapReinhard", multiplier=0.01)
    return g.ksampler(model=g.patched("LatentApplyOperationCFG", operation=operation))


@graph
def several_patches_at_once(g: Graph) -> Link:
    for kind in ("FreeU_V2", "PerturbedAttentionGuidance", "RescaleCFG", "HyperTile"):
        g.model = g.patched(kind)
    return g.ksampler()


@graph
def a_merge(g: Graph) -> Link:
    changed = g.patched("UNetCrossAttentionMultiply", v=0.5)
    return g.ksampler(model=g.add("ModelMergeSimple", model1=g.model, model2=changed, ratio=0.5))


@graph
def a_merge_block_by_block(g: Graph) -> Link:
    changed = g.patched("UNetCrossAttentionMultiply", v=0.5)
    return g.ksampler(model=g.add("ModelMergeBlocks", model1=g.model, model2=changed, input=0.2, middle=0.4, out=0.8))


@graph
def a_difference_of_models_added(g: Graph) -> Link:
    changed = g.patched("UNetCrossAttentionMultiply", v=0.5)
    rest = g.add("ModelMergeSubtract", model1=g.model, model2=changed, multiplier=1.0)
    return g.ksampler(model=g.add("ModelMergeAdd", model1=changed, model2=rest))


@graph
def a_merge_of_text_encoders(g: Graph) -> Link:
    changed = g.add("CLIPAttentionMultiply", clip=g.clip, v=0.8)
    merged = g.add("CLIPMergeSimple", clip1=g.clip, clip2=changed, ratio=0.5)
    return g.ksampler(positive=g.said("a kitchen knife", merged))


@graph
def a_lora(g: Graph) -> Link:
    both = g.add("LoraLoader", model=g.model, clip=g.clip, lora_name=lora.NAME)
    return g.ksampler(model=both, positive=g.said("a kitchen knife", [both[0], 1]))


@graph
def two_loras_on_the_model(g: Graph) -> Link:
    for strength in (0.7, -0.4):
        g.model = g.patched("LoraLoaderModelOnly", lora_name=lora.NAME, strength_model=strength)
    return g.ksampler()


def hooks(g: Graph) -> Link:
    first = g.add("CreateHookLora", lora_name=lora.NAME, strength_model=0.8)
    late = g.add("CreateHookKeyframe", strength_mult=0.2, start_percent=0.5)
    return g.add("SetHookKeyframes", hooks=first, hook_kf=late)


@graph
def a_lora_of_a_prompt(g: Graph) -> Link:
    hooked = g.add("SetClipHooks", clip=g.clip, hooks=hooks(g), apply_to_conds=True)
    return g.ksampler(positive=g.said("a kitchen knife", hooked))


@graph
def a_text_encoder_on_a_schedule(g: Graph) -> Link:
    hooked = g.add("SetClipHooks", clip=g.clip, hooks=hooks(g), apply_to_conds=True, schedule_clip=True)
    return g.ksampler(positive=g.said("a kitchen knife", hooked))


@graph
def a_pair_of_hooked_prompts(g: Graph) -> Link:
    news = {"positive_NEW": g.positive, "negative_NEW": g.negative}
    pair = g.add("PairConditioningSetProperties", **news, hooks=hooks(g), set_cond_area="default")
    return g.ksampler(positive=pair, negative=[pair[0], 1])


# --- prompts ---------------------------------------------------------------------------------------------------------


@graph
def prompts_combined(g: Graph) -> Link:
    return g.ksampler(positive=g.add("ConditioningCombine", conditioning_1=g.said("a cat"), conditioning_2=g.positive))


@graph
def prompts_joined(g: Graph) -> Link:
    both = {"conditioning_to": g.said("a cat"), "conditioning_from": g.positive}
    return g.ksampler(positive=g.add("ConditioningConcat", **both))


@graph
def prompts_averaged(g: Graph) -> Link:
    both = {"conditioning_to": g.positive, "conditioning_from": g.said("a cat")}
    return g.ksampler(positive=g.add("ConditioningAverage", **both, conditioning_to_strength=0.8))


@graph
def a_prompt_for_a_place(g: Graph) -> Link:
    there = g.add("ConditioningSetArea", conditioning=g.positive, width=SIZE, height=SIZE, x=0, y=0)
    return g.ksampler(positive=g.add("ConditioningCombine", conditioning_1=g.said("a cat"), conditioning_2=there))


@graph
def a_prompt_for_a_part(g: Graph) -> Link:
    return g.ksampler(positive=g.add("ConditioningSetAreaPercentage", conditioning=g.positive))


@graph
def a_prompt_under_a_mask(g: Graph) -> Link:
    return g.ksampler(positive=g.add("ConditioningSetMask", conditioning=g.positive, mask=g.mask()))


@graph
def a_prompt_that_comes_late(g: Graph) -> Link:
    early = g.add("ConditioningSetTimestepRange", conditioning=g.said("a cat"), start=0.0, end=0.3)
    late = g.add("ConditioningSetTimestepRange", conditioning=g.positive, start=0.3, end=1.0)
    return g.ksampler(positive=g.add("ConditioningCombine", conditioning_1=early, conditioning_2=late), steps=3)


@graph
def a_prompt_of_zeros(g: Graph) -> Link:
    return g.ksampler(negative=g.add("ConditioningZeroOut", conditioning=g.positive))


@graph
def a_prompt_of_no_strength_at_all(g: Graph) -> Link:
    nothing = g.add("ConditioningSetAreaStrength", conditioning=g.said("a cat"), strength=0.0)
    return g.ksampler(positive=nothing, negative=g.positive, cfg=2.0)


@graph
def prompts_the_other_way_round(g: Graph) -> Link:
    return g.ksampler(positive=g.negative, negative=g.positive, cfg=0.0)


@graph
def a_prompt_turned_upside_down(g: Graph) -> Link:
    return g.ksampler(negative=g.said("(a kitchen knife:-2)"))


@graph
def a_prompt_of_another_layer(g: Graph) -> Link:
    return g.ksampler(positive=g.said("a kitchen knife", g.add("CLIPSetLastLayer", clip=g.clip, stop_at_clip_layer=-2)))


@graph
def a_very_long_prompt(g: Graph) -> Link:
    return g.ksampler(positive=g.said("a picture " * 60 + "of a kitchen knife"))


@graph
def prompts_of_several_pictures(g: Graph) -> Link:
    return g.ksampler(latent_image=g.add("RepeatLatentBatch", samples=g.latent, amount=3))


# --- pictures --------------------------------------------------------------------------------------------------------


@graph
def a_picture_changed(g: Graph) -> Link:
    return g.ksampler(latent_image=g.encoded(), denoise=0.5)


@graph
def a_picture_changed_a_little(g: Graph) -> Link:
    return g.ksampler(latent_image=g.encoded(), denoise=0.05, steps=1)


@graph
def a_hole_filled(g: Graph) -> Link:
    holed = g.add("VAEEncodeForInpaint", pixels=g.picture(), vae=g.vae, mask=g.mask())
    return g.ksampler(latent_image=holed)


@graph
def a_mask_of_noise(g: Graph) -> Link:
    return g.ksampler(latent_image=g.add("SetLatentNoiseMask", samples=g.encoded(), mask=g.mask()), denoise=0.8)


@graph
def a_hole_of_an_inpainting_model(g: Graph) -> Link:
    given = {"positive": g.positive, "negative": g.negative, "vae": g.vae, "pixels": g.picture(), "mask": g.mask()}
    made = g.add("InpaintModelConditioning", **given)
    return g.ksampler(positive=made, negative=[made[0], 1], latent_image=[made[0], 2])


@graph
def a_reference_beside_the_prompt(g: Graph) -> Link:
    return g.ksampler(positive=g.add("ReferenceLatent", conditioning=g.positive, latent=g.encoded()))


@graph
def a_picture_made_larger(g: Graph) -> Link:
    larger = g.add("LatentUpscale", samples=g.ksampler(), width=2 * SIZE, height=2 * SIZE, crop="disabled")
    return g.ksampler(latent_image=larger, denoise=0.5)


@graph
def a_picture_made_larger_in_pixels(g: Graph) -> Link:
    image = g.add("VAEDecode", samples=g.ksampler(), vae=g.vae)
    larger = g.add("ImageScaleBy", image=image, scale_by=1.5)
    return g.ksampler(latent_image=g.add("VAEEncode", pixels=larger, vae=g.vae), denoise=0.4)


LATENTS: dict[str, dict[str, Any]] = {
    "LatentBlend": {"blend_factor": 0.5},
    "LatentAdd": {},
    "LatentInterpolate": {"ratio": 0.5},
    "LatentComposite": {"x": 0, "y": 0},
}


def mixed(g: Graph, kind: str, inputs: dict[str, Any]) -> Link:
    """Two latents mixed, and the mixture sampled."""
    names = [name for name, spec in g.known[kind]["input"]["required"].items() if spec[0] == "LATENT"]
    latents = dict(zip(names, (g.ksampler(), g.encoded()), strict=True))
    return g.ksampler(latent_image=g.add(kind, **latents, **inputs), denoise=0.6)


for kind, inputs in LATENTS.items():
    of(kind, lambda g, kind=kind, inputs=inputs: mixed(g, kind, inputs))  # type: ignore[misc]


@graph
def latents_times_minus_one(g: Graph) -> Link:
    return g.add("LatentMultiply", samples=g.ksampler(), multiplier=-1.0)


@graph
def latents_sharpened(g: Graph) -> Link:
    return g.add(
        "LatentApplyOperation", samples=g.ksampler(), operation=g.add("LatentOperationSharpen", sharpen_radius=2)
    )


def graphs(known: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each with noise of its own, so that the host takes nothing from what another has made."""
    for seed, (name, make) in enumerate(GRAPHS.items()):
        made = Graph(known)
        prompt = made.ended(make(made))
        for node in prompt.values():
            node["inputs"].update({key: seed for key in ("seed", "noise_seed") if key in node["inputs"]})
        yield name, prompt
