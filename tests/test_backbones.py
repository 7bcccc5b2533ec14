"""The real architectures with random weights, and those that are refused.

The numbers need memory: SD1.5 in fp32 3.5 GB, SDXL and its refiner in bf16 5.2 GB and 4.6 GB, one at a time; nothing is
downloaded. All latents are small, 16x16: the weights are what is large.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import comfy.sample
import comfy.supported_models
import pytest
import reference
import tiny
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from conceptguard.benchmarks.shapes import SHAPES, build
from conceptguard.editing.edits.spec import Concept, EditSpec, Phrase
from conceptguard.editing.engine.backbones.unet import cross_attentions
from conceptguard.editing.engine.host import add_edit
from conceptguard.editing.methods.cre import DEFAULTS, CREOptions
from conceptguard.editing.methods.eiup import EIUPOptions

SIDE = 16
CRE = replace(DEFAULTS, floor=0.0)  # nothing that random weights find is like anything else

# --- every cross-attention is found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_every_cross_attention_is_found(name: str) -> None:
    unet = build(name, device="meta").model.diffusion_model
    found = cross_attentions(unet)
    readers = [m for key, m in unet.named_modules() if key.endswith("attn2")]
    assert len(found) == len(readers) == SHAPES[name].attentions
    assert {id(block.attn2) for block in found.values()} == {id(each) for each in readers}
    assert all(block.attn2.to_k.in_features == SHAPES[name].context for block in found.values())


def test_they_go_by_the_hosts_names() -> None:
    def places(name: str) -> set[tuple[str, int]]:
        return {key[:2] for key in cross_attentions(build(name, device="meta").model.diffusion_model)}

    middle = ("middle", 0)
    sd1 = {("input", i) for i in (1, 2, 4, 5, 7, 8)} | {middle} | {("output", i) for i in range(3, 12)}
    assert places("SD1.5") == places("SD2.1") == sd1
    assert places("SDXL") == {("input", i) for i in (4, 5, 7, 8)} | {middle} | {("output", i) for i in range(6)}
    assert places("SDXL refiner") == {("input", i) for i in (4, 5, 7, 8)} | {middle} | {
        ("output", i) for i in range(3, 9)
    }


# --- the numbers -----------------------------------------------------------------------------------------------------


def tokens(name: str, seed: int) -> Tensor:
    return torch.randn(1, 77, SHAPES[name].context, generator=torch.Generator().manual_seed(seed))


def concept(name: str, seed: int = 100, phrases: int = 1) -> Concept:
    """Encodings that, like real ones, share their first token with the empty prompt's."""
    empty = tokens(name, 7)
    encoded = [torch.cat([empty[:, :1], tokens(name, seed + i)[:, 1:]], 1) for i in range(phrases)]
    return Concept(f"c{seed}", tuple(Phrase(f"{seed} {i}", t, (1, 2)) for i, t in enumerate(encoded)), empty)


def sample(model: ModelPatcher, name: str) -> Tensor:
    """One model call, of the positive alone."""
    latent = torch.zeros(1, 4, SIDE, SIDE)
    cond = [[tokens(name, 1), {"pooled_output": torch.zeros(1, 1280)}]]
    noise = comfy.sample.prepare_noise(latent, 5)
    return comfy.sample.sample(model, noise, 1, 1.0, "euler", "normal", cond, cond, latent, disable_pbar=True, seed=5)


def edit(kind: str, name: str) -> list[EditSpec]:
    if kind == "CRE":
        return [EditSpec("projection", concept(name, seed), options=CRE) for seed in (100, 200)]
    # Two random tokens among 77 hold a fortieth of the evidence: weights that make the edit larger than bf16's error.
    weights, evidence = ((-30.0, -15.0), "share") if kind == "separate" else ((-1.0, -0.5), "none")
    options = EIUPOptions(kind, weights, evidence)
    return [EditSpec("erasure", concept(name, 300, 2), options=options)]


def expected(seen: tiny.Recorder, key: Any, call: dict[str, Tensor], specs: list[EditSpec]) -> Tensor:
    """The block's edited output by the slow reference, from its own q, k and v."""
    h = seen.heads(key)
    q, k, v = (call[which][0].float() for which in "qkv")

    def project(which: str, text: Tensor) -> Tensor:
        weight = getattr(seen.blocks[key].attn2, f"to_{which}").weight
        return text.to(weight.dtype).double() @ weight.double().T

    def found(text: Tensor) -> Tensor:
        return reference.attention(q, project("k", text), project("v", text), h)

    A, source, options = reference.attention(q, k, v, h), specs[0].source, specs[0].options
    assert isinstance(source, Concept)
    if isinstance(options, CREOptions):
        At = [found(spec.source.phrases[0].tokens[0]) for spec in specs]  # type: ignore[union-attr]
        return reference.cre(A, At, [1.0] * len(At), 1, True, True, found(source.baseline[0]))  # type: ignore[index]
    assert isinstance(options, EIUPOptions)
    ks, vs = [], []
    for phrase, weight in zip(source.phrases, options.weights, strict=True):
        own = list(phrase.own)
        k_e, v_e = project("k", phrase.tokens[0]), project("v", phrase.tokens[0])
        if options.form == "separate":
            evidence = reference.share(q, k, k_e[own], h, 1)
            A = reference.eiup(A, q, k_e, v_e, [weight * (j in own) for j in range(77)], h, evidence)
        ks, vs = [*ks, k_e[own]], [*vs, weight * v_e[own]]
    return A if options.form == "separate" else reference.appended(q, k, v, torch.cat(ks), torch.cat(vs), 1, h)


def check(model: ModelPatcher, name: str, kind: str, tolerance: float, every: int = 1) -> None:
    """Every `every`-th block against the reference; the tolerance is a share of the block's largest output."""
    specs, edited = edit(kind, name), model
    for spec in specs:
        edited = add_edit(edited, spec)
    with torch.no_grad(), tiny.Recorder(model) as seen:
        assert torch.isfinite(sample(edited, name)).all()
        for key, (call,) in list(seen.calls.items())[::every]:
            by_hand, out = expected(seen, key, call, specs), call["out"][0].double()
            plain = reference.attention(*(call[which][0].float() for which in "qkv"), seen.heads(key))
            size = float(plain.abs().max())
            assert float((by_hand - plain).abs().max()) > 4 * tolerance * size, f"nothing to see in {key}"
            off = float((out - by_hand).abs().max()) / size
            assert off <= tolerance, f"{key}: {off:.1e} of the largest output"


@pytest.fixture(scope="module", params=[*SHAPES])
def big(request: pytest.FixtureRequest) -> Iterator[tuple[str, ModelPatcher]]:
    """One at a time: a module's fixture with parameters is torn down before the next is made."""
    name: str = request.param
    model = build(name, torch.float32 if name == "SD1.5" else torch.bfloat16)
    yield name, model
    model.model.to("meta")
    del model
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["CRE", "separate", "joint"])
def test_the_edits_follow_their_formulas(big: tuple[str, ModelPatcher], kind: str) -> None:
    """SD1.5 in fp32, in every block; the others in bf16, where 8 bits of mantissa are what can agree."""
    name, model = big
    every = {"SD1.5": 1, "SD2.1": 3}.get(name, 9)
    check(model, name, kind, 1e-4 if name == "SD1.5" else 3e-2, every)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=["fp16", "bf16"])
def test_sd15_in_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    model = build("SD1.5", dtype)
    for kind in ("CRE", "separate", "joint"):
        check(model, "SD1.5", kind, tolerance, 3)
    model.model.to("meta")


# --- refused ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "AuraFlow": (
        "AuraFlow",
        dict(
            in_channels=4,
            dim=256,
            n_layers=1,
            n_double_layers=1,
            n_heads=1,
            global_conddim=256,
            cond_seq_dim=tiny.WIDTH,
        ),
        r"AuraFlow \(MMDiT\)",
    ),
    "Stable Video Diffusion": (
        "SVD_img2vid",
        {
            **tiny.sdxl().model.model_config.unet_config,
            "in_channels": 8,
            "adm_in_channels": 768,
            "use_temporal_attention": True,
            "use_temporal_resblock": True,
            "video_kernel_size": [3, 1, 1],
            "extra_ff_mix_layer": True,
            "use_spatial_context": True,
            "merge_strategy": "learned_with_images",
            "merge_factor": 0.0,
            "disable_temporal_crossattention": False,
        },
        r"SVD_img2vid \(UNetModel\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused_by_name(name: str) -> None:
    family, shape, told = REFUSED[name]
    config = getattr(comfy.supported_models, family)(shape)
    config.unet_config["dtype"] = torch.float32
    meta = torch.device("meta")
    model = ModelPatcher(config.get_model({}, device=meta), load_device=meta, offload_device=meta)
    message = f"Test: cannot edit {told}: .* attention of .*Flux.*, SD1.x, SD2.x and SDXL models; connect one of these"
    for spec in (*edit("CRE", "SD1.5"), *edit("joint", "SD1.5")):
        with pytest.raises(ValueError, match=message):
            add_edit(model, EditSpec(spec.method, spec.source, options=spec.options, node="Test"))
