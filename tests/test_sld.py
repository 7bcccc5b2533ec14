"""Safe latent diffusion: its equations number by number, and the same through the host's own guidance hook."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import comfy.conds
import comfy.hooks
import comfy.samplers
import documents
import pytest
import tiny
import torch
from torch import Tensor

from conceptguard.editing.edits.spec import EditSpec, Gate
from conceptguard.editing.engine import host
from conceptguard.editing.engine.host import accounts_of, add_edit, edits_of
from conceptguard.editing.methods.sld import SETTINGS, Momentum, SLDOptions
from conceptguard.editing.presets.apply import Given, specs_of
from conceptguard.editing.presets.document import read, write
from conceptguard.editing.presets.save import Saver
from conceptguard.editing.presets.words import described
from conceptguard.nodes.safe_guidance import ConceptGuardSafeGuidance

OPTIONS = SLDOptions(scale=1.5, threshold=0.1, warmup=2, momentum=0.5, beta=0.7)  # random noises are far from alike


class Slow:
    """The published loop, one number after the other."""

    def __init__(self, options: SLDOptions) -> None:
        self.o, self.nu, self.i = options, None, 0

    def taken(self, e_p: Tensor, e_0: Tensor, e_S: Tensor) -> Tensor:
        """gamma of this step, 0 while it warms up."""
        o = self.o
        nu = [0.0] * e_p.numel() if self.nu is None else self.nu
        out, later = [], []
        for p, n, c, v in zip(*(x.double().flatten().tolist() for x in (e_p, e_0, e_S)), nu, strict=True):
            mu = 0.0 if p - c >= o.threshold else min(1.0, abs(p - c) * o.scale)
            g = mu * (c - n) + o.momentum * v
            later.append(o.beta * v + (1 - o.beta) * g)
            out.append(g if self.i >= o.warmup else 0.0)
        self.nu, self.i = later, self.i + 1
        return torch.tensor(out).reshape(e_p.shape)


@pytest.mark.parametrize("options", [OPTIONS, *SETTINGS.values()], ids=["own", *SETTINGS])
def test_it_is_the_published_loop(options: SLDOptions) -> None:
    generator, ours, slow = torch.Generator().manual_seed(0), Momentum(), Slow(options)
    for step in range(options.warmup + 4):
        e_p, e_0, e_S = torch.randn(3, 2, 4, 3, 3, generator=generator)
        expected = slow.taken(e_p, e_0, e_S)
        for _ in range(2):  # a sampler may ask twice within a step
            torch.testing.assert_close(ours.guided(e_p, e_0, e_S, step, options), expected, rtol=1e-4, atol=1e-5)
        assert expected.any() == (step >= options.warmup)


def test_the_settings_are_the_published_ones() -> None:
    assert SETTINGS["medium"] == SLDOptions(1000.0, 0.01, 10, 0.3, 0.4)
    assert SETTINGS["strong"] == SLDOptions(2000.0, 0.025, 7, 0.5, 0.7)
    assert SETTINGS["max"] == SLDOptions(5000.0, 1.0, 0, 0.5, 0.7)
    assert SETTINGS["weak"] == SLDOptions(200.0, 0.0, 15, 0.0, 0.0)


# --- through the host ------------------------------------------------------------------------------------------------


def spec(**changes: Any) -> EditSpec:
    return EditSpec("guidance", **{"source": tiny.concept(), "options": OPTIONS, "node": "Test", **changes})


def by_hand(model: Any, options: SLDOptions, strength: float = 1.0) -> Any:
    """The same in the host's hook behind guidance, with a model call of its own for the concept, one image a call."""
    model, tokens = model.clone(), tiny.concept().phrases[0].tokens
    loops: dict[int, Slow] = {}

    def post_cfg(args: dict[str, Any]) -> Tensor:
        conds = [
            {**cond, "model_conds": {**cond["model_conds"], "c_crossattn": comfy.conds.CONDCrossAttn(tokens)}}
            for cond in args["cond"]
        ]
        x, sigma = args["input"], args["sigma"].view(-1, 1, 1, 1)
        (third,) = comfy.samplers.calc_cond_batch(args["model"], [conds], x, args["sigma"], args["model_options"])
        e_p, e_0, e_S = ((x - D) / sigma for D in (args["cond_denoised"], args["uncond_denoised"], third))
        out = []
        for i in range(len(x)):
            taken = loops.setdefault(i, Slow(options)).taken(e_p[i], e_0[i], e_S[i])
            out.append(args["denoised"][i] + strength * args["cond_scale"] * sigma[i] * taken)
        return torch.stack(out)

    model.set_model_sampler_post_cfg_function(post_cfg)
    return model


@pytest.mark.parametrize("length", [77, 154])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_picture_is_the_published_loops(family: str, batch: int, length: int) -> None:
    model = getattr(tiny, family)()
    run: dict[str, Any] = dict(positive=tiny.cond(1, length), batch=batch, steps=5)
    ours = tiny.sample(add_edit(model, spec(strength=0.8)), **run)
    expected, plain = tiny.sample(by_hand(model, OPTIONS, 0.8), **run), tiny.sample(model, **run)
    assert (expected - plain).norm() > 1
    assert (ours - expected).norm() < 1e-3 * (expected - plain).norm()


def test_its_prediction_comes_in_the_hosts_own_batch(model: Any) -> None:
    seen: list[int] = []
    watched = add_edit(model, spec()).clone()
    watched.set_model_unet_function_wrapper(
        lambda apply, args: (
            seen.append(len(args["cond_or_uncond"])),
            apply(args["input"], args["timestep"], **args["c"]),
        )[1]
    )
    tiny.sample(watched, steps=2)
    assert seen == [3, 3]


@pytest.mark.parametrize(
    "off",
    [
        {"strength": 0.0},
        {"gate": Gate((0.0,))},
        {"start_percent": 0.5, "end_percent": 0.5},
        {"options": replace(OPTIONS, scale=0.9)},
    ],
    ids=str,
)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_off_is_bit_identical(model: Any, off: dict[str, Any], cfg: float) -> None:
    assert torch.equal(
        tiny.sample(add_edit(model, spec(**off)), cfg=cfg, steps=4), tiny.sample(model, cfg=cfg, steps=4)
    )


def test_a_gate_closes_for_one_image_of_a_batch(model: Any) -> None:
    edited = tiny.sample(add_edit(model, spec(gate=Gate((0.0, 1.0)))), batch=2, steps=4)
    plain = tiny.sample(model, batch=2, steps=4)
    torch.testing.assert_close(edited[0], plain[0], rtol=1e-3, atol=1e-3)
    assert (edited[1] - plain[1]).norm() > 0.1


def test_while_it_warms_up_the_picture_is_the_unedited_one(model: Any) -> None:
    edited = tiny.sample(add_edit(model, spec(options=replace(OPTIONS, warmup=4))), steps=4)
    torch.testing.assert_close(edited, tiny.sample(model, steps=4), rtol=1e-3, atol=1e-3)


def test_runs_do_not_inherit_momentum(model: Any) -> None:
    edited = add_edit(model, spec())
    assert torch.equal(tiny.sample(edited, steps=4), tiny.sample(edited, steps=4))


def test_other_edits_do_not_reach_its_own_prediction(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CRE beside it edits the rows of the prompt, and not those of the concept."""
    seen, found = [], host.served_by

    def served_by(*args: Any) -> Any:
        seen.append(found(*args))
        return seen[-1]

    monkeypatch.setattr(host, "served_by", served_by)
    cre = EditSpec("projection", tiny.concept(), options=tiny.CRE, node="Test")
    tiny.sample(add_edit(add_edit(model, spec()), cre), steps=1)
    (served,) = seen
    assert sorted(map(str, served.names)) == ["None", "negative", "positive"]
    assert [name for name, edited in zip(served.names, served.edited, strict=True) if edited] == ["positive"]


def test_the_account_says_that_it_acted(model: Any) -> None:
    edited = add_edit(model, spec())
    tiny.sample(edited, steps=4)
    accounts = accounts_of(edited)
    assert accounts is not None
    document = accounts.runs[-1][1].document()
    assert document["applied"] and document["edits"][0]["steps"] == {"all": 4, "due": 4, "acted": 4}


# --- refusals --------------------------------------------------------------------------------------------------------


def test_at_cfg_1_it_refuses(model: Any) -> None:
    with pytest.raises(ValueError, match="Test: cfg is 1: there is no guidance that could lead away from a concept"):
        tiny.sample(add_edit(model, spec()), cfg=1.0)
    always = add_edit(model, spec())
    always.model_options["disable_cfg1_optimization"] = True
    assert not torch.equal(tiny.sample(always, cfg=1.0, steps=4), tiny.sample(model, cfg=1.0, steps=4))


def test_on_a_conditioning_alone_it_refuses(model: Any) -> None:
    scope = comfy.hooks.EnumHookScope.HookedOnly
    hook = comfy.hooks.TransformerOptionsHook(tiny.hooked(spec()), hook_scope=scope)
    group = comfy.hooks.HookGroup()
    group.add(hook)
    with pytest.raises(ValueError, match="Test: guidance needs the edit on the MODEL, not on a conditioning"):
        tiny.sample(model, tiny.cond(1, hooks=group))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"setting": "mild"}, "setting is 'mild'; choose one of weak, medium, strong, max, own"),
        ({"setting": "own", "beta": 1.0}, "beta is 1; give a number from 0 to 0.99"),
        ({"setting": "own", "scale": math.nan}, "scale is nan; give a number from 0"),
        ({"setting": "own", "warmup": -1}, "warmup is -1; give a number from 0 to 1000"),
    ],
)
def test_bad_inputs_name_node_input_and_mend(model: Any, numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ConceptGuardSafeGuidance: {message}"):
        ConceptGuardSafeGuidance.execute(model, tiny.concept(), **numbers)


def test_what_it_cannot_do_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="ConceptGuardSafeGuidance: cannot edit AuraFlow"):
        ConceptGuardSafeGuidance.execute(tiny.auraflow(), tiny.concept())
    with pytest.raises(ValueError, match='Test: blocks is "middle", but guidance has no blocks; write "all"'):
        spec(blocks="middle")
    with pytest.raises(ValueError, match='Test: rows is "all", but guidance changes the prediction'):
        spec(rows="all")


def test_a_preset_holds_it(model: Any, clip: Any) -> None:
    edit = {"method": "SLD", "concept": documents.WORDS, "scale": 2000, "threshold": 0.025, "warmup": 7}
    edit |= {"momentum": 0.5, "beta": 0.7}
    preset = read(json.dumps({**documents.DOCUMENT, "edits": [edit]}))
    assert read(write(preset)) == preset
    assert described(preset) == [
        'Guides away from "knife" (a knife; blades) (SLD, scale 2000, strength 1), through the whole sampling.'
    ]
    (made,) = specs_of(preset, Given(clip), node="Test")
    assert made.options == SETTINGS["strong"]
    edited = ConceptGuardSafeGuidance.execute(model, made.source, "strong").args[0]
    assert edits_of(edited)[0].options == made.options
    assert Saver(clip).edits(edits_of(edited)) == preset.edits
