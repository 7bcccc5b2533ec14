"""Which prompts are edited: those that the guider calls positive, wherever they stand among the prompts of a call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import comfy.hooks
import comfy.samplers
import pytest
import tiny
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg, PerpNeg
from comfy_extras.nodes_sag import SelfAttentionGuidance
from foreign_rows import GeometricCFG, Nameless, masked
from torch import Tensor

from conceptguard.editing.edits.spec import EditSpec, Gate
from conceptguard.editing.engine.host import add_edit

FIRST = ("input", 1, 0)  # the deeper blocks read what this one wrote


def cre(model: Any, seed: int = 100, **inputs: Any) -> Any:
    return add_edit(model, EditSpec("projection", tiny.concept("c", seed), options=tiny.CRE, node="Test", **inputs))


def guided(guider: Any, batch: int = 1, steps: int = 1) -> Tensor:
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    latent = torch.zeros(batch, 4, tiny.SIZE, tiny.SIZE)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
    return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)


def texts_edited(model: Any, run: Any, seeds: tuple[int, ...] = (1, 2, 3), calls: int | None = None) -> dict[int, int]:
    """For the prompts tiny.cond(seed): how many of their rows `run(MODEL)` edits in the first block, in all its calls
    or the first few."""
    keys = {}
    with tiny.Recorder(model) as before:
        run(model)
    with tiny.Recorder(model) as after:
        run(cre(model))
    for seed in seeds:
        keys[seed] = before.project(FIRST, "k", tiny.tokens(seed)[0]).float()
    edited = dict.fromkeys(seeds, 0)
    for old, new in zip(before.calls[FIRST][:calls], after.calls[FIRST][:calls], strict=True):
        for row in range(len(old["k"])):
            seed = min(seeds, key=lambda seed: float((old["k"][row, :77] - keys[seed]).abs().max()))
            edited[seed] += not torch.equal(old["out"][row], new["out"][row])
    return edited


def pairs(before: tiny.Recorder, after: tiny.Recorder) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of the first block's first call, as they were and as they are."""
    return zip(before.calls[FIRST][0]["out"], after.calls[FIRST][0]["out"], strict=True)


def dual(style: str, cfg: tuple[float, float] = (5.0, 5.0)) -> Any:
    def run(model: Any) -> Tensor:
        guider = Guider_DualCFG(model)
        guider.set_conds(tiny.cond(1), tiny.cond(3), tiny.cond(2))
        guider.set_cfg(*cfg, nested=style == "nested")
        return guided(guider)

    return run


@pytest.mark.parametrize("style", ["regular", "nested"])
@pytest.mark.parametrize("cfg", [(5.0, 5.0), (5.0, 1.0)])
def test_dual_cfg_edits_both_positive_prompts(model: Any, style: str, cfg: tuple[float, float]) -> None:
    """The core's DualCFGGuider passes [negative, middle, positive]."""
    edited = texts_edited(model, dual(style, cfg))
    assert edited[1] == 1 and edited[3] == 1 and edited[2] == 0


def test_guiders_with_two_positive_prompts(model: Any) -> None:
    def run(model: Any) -> Tensor:
        guider = GeometricCFG(model)
        guider.set_conds(tiny.cond(1), tiny.cond(3), tiny.cond(2))
        guider.set_cfg(4.0)
        return guided(guider)

    assert texts_edited(model, run) == {1: 1, 2: 0, 3: 1}


def test_self_attention_guidance_leaves_the_negative_alone(model: Any) -> None:
    """Its second pass is the negative alone: the first and only prompt of that call."""

    def run(model: Any) -> Tensor:
        return tiny.sample(SelfAttentionGuidance.execute(model, 0.5, 2.0).args[0], steps=1)

    assert texts_edited(model, run, (1, 2)) == {1: 1, 2: 0}


def test_perp_neg_leaves_the_empty_prompt_alone(model: Any) -> None:
    """The old node encodes a prompt of its own, which no guider knows."""

    def run(model: Any) -> Tensor:
        return tiny.sample(PerpNeg.execute(model, tiny.cond(3), 1.0).args[0], steps=1)

    assert texts_edited(model, run) == {1: 1, 2: 0, 3: 0}


def test_perp_neg_guider(model: Any) -> None:
    def run(model: Any) -> Tensor:
        guider = Guider_PerpNeg(model)
        guider.set_conds(tiny.cond(1), tiny.cond(2), tiny.cond(3))
        guider.set_cfg(4.0, 1.0)
        return guided(guider)

    assert texts_edited(model, run) == {1: 1, 2: 0, 3: 0}


@pytest.mark.parametrize("where", ["positive", "negative"])
def test_a_prompt_for_a_part_of_the_picture(model: Any, where: str) -> None:
    """The host gives the other prompt a part of the same place, as a copy that keeps the first one's uuid."""
    part = masked(tiny.cond(3), 0.0, 0.5)

    def run(model: Any) -> Tensor:
        positive, negative = (tiny.cond(1), tiny.cond(2))
        positive, negative = (positive + part, negative) if where == "positive" else (positive, negative + part)
        return tiny.sample(model, positive, negative, steps=1)

    expected = {1: 1, 2: 0, 3: 1} if where == "positive" else {1: 2, 2: 0, 3: 0}
    assert texts_edited(model, run) == expected


def test_a_guider_within_a_guider(model: Any) -> None:
    """One that samples another one's prompts with the options of the run around it."""

    class Outer(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = {}, seed: Any = None) -> Tensor:  # noqa: B006
            inner = Guider_DualCFG(self.model_patcher)
            inner.set_conds(tiny.cond(1), tiny.cond(3), tiny.cond(2))
            inner.set_cfg(4.0, 4.0)
            return guided(inner)

    def run(model: Any) -> Tensor:
        guider = Outer(model)
        guider.set_conds(tiny.cond(1), tiny.cond(2))
        return guided(guider)

    assert texts_edited(model, run) == {1: 1, 2: 0, 3: 1}


def test_context_windows_keep_the_prompts_apart(model: Any) -> None:
    from comfy import context_windows

    def run(model: Any) -> Tensor:
        model = model.clone()
        model.model_options["context_handler"] = context_windows.IndexListContextHandler(
            context_windows.get_matching_context_schedule("standard_static"),
            context_windows.get_matching_fuse_method("flat"),
            context_length=2,
            context_overlap=1,
        )
        guider = Guider_DualCFG(model)
        guider.set_conds(tiny.cond(1), tiny.cond(3), tiny.cond(2))
        guider.set_cfg(5.0, 5.0)
        return guided(guider, batch=3, steps=2)  # the host compares three noise levels with three images

    # Two windows of two images; newer hosts put the picture before it in front of the second.
    rows = 4 + ("causal_window_fix" in inspect.signature(context_windows.IndexListContextHandler).parameters)
    assert texts_edited(model, run, calls=2) == {1: rows, 2: 0, 3: rows}


def test_hooked_prompts_are_told_apart(model: Any) -> None:
    """Hooks make calls of their own of the prompts that have them."""
    from foreign import options_hook

    def run(model: Any) -> Tensor:
        guider = Guider_DualCFG(model)
        guider.set_conds(tiny.cond(1), tiny.cond(3), tiny.cond(2, hooks=options_hook()))
        guider.set_cfg(5.0, 5.0)
        return guided(guider)

    edited = texts_edited(model, run)
    assert (edited[1], edited[3]) == (1, 1) and edited[2] == 0


def test_a_second_network_in_the_same_run_has_keys_of_its_own(model: Any) -> None:
    """Guiders that give the negative another network, with the options of the first (core's DualModelGuider)."""
    other = tiny.sd1(seed=1)

    class DualModel(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = {}, seed: Any = None) -> Tensor:  # noqa: B006
            other.pre_run()
            conds = [self.conds["negative"]]
            (negative,) = comfy.samplers.calc_cond_batch(other.model, conds, x, timestep, model_options)
            conds = [self.conds["positive"]]
            (positive,) = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
            return negative + self.cfg * (positive - negative)

    def outputs(edited: Any) -> tuple[Tensor, Tensor]:
        guider = DualModel(edited)
        guider.set_conds(tiny.cond(1), tiny.cond(2))
        guider.set_cfg(4.0)
        with tiny.Recorder(model) as first, tiny.Recorder(other) as second:
            guided(guider)
        return first.calls[FIRST][0]["out"], second.calls[FIRST][0]["out"]

    plain, edited, both = outputs(model), outputs(cre(model)), outputs(cre(model, rows="all"))
    assert not torch.equal(plain[0], edited[0]) and torch.equal(plain[1], edited[1])
    with tiny.Recorder(other) as alone:
        tiny.sample(cre(other, rows="all"), tiny.cond(2), cfg=1.0, steps=1)
    assert not torch.equal(plain[1], both[1])
    found = [plain[1] - each for each in (both[1], edited[1])]
    assert found[0].abs().max() > 1e-2 and not found[1].any() and alone.calls[FIRST]


def test_a_call_without_names_in_an_unknown_order_is_an_error(model: Any) -> None:
    def run(model: Any) -> Tensor:
        guider = Nameless(model)
        guider.set_conds(tiny.cond(1), tiny.cond(2))
        guider.set_cfg(4.0)
        return guided(guider)

    run(model)
    with pytest.raises(ValueError, match="Test: cannot tell which prompts are the positive ones.*Nameless"):
        run(cre(model))


# --- guidance that follows the negative ------------------------------------------------------------------------------


def rescaled(model: Any) -> Any:
    """The host's RescaleCFG: what it makes of the negative's prediction equals that no more."""
    return RescaleCFG().patch(model, 0.7)[0]


@pytest.mark.parametrize("node", [lambda model: model, rescaled])
@pytest.mark.parametrize("cfg", [0.0, -2.0])
def test_guidance_that_follows_the_negative_is_an_error(model: Any, cfg: float, node: Any) -> None:
    with pytest.raises(ValueError, match="Test: cfg is .*rows"):
        tiny.sample(node(cre(model)), cfg=cfg)
    tiny.sample(node(cre(model)), cfg=1.5)


def taking(which: str) -> Any:
    """A node that changes the guidance so that the prediction of one prompt alone is left of it."""

    def take(model: Any) -> Any:
        model = model.clone()
        if which == "pre":
            model.set_model_sampler_pre_cfg_function(lambda args: [args["conds_out"][1]] * 2)
        elif which == "post":
            model.set_model_sampler_post_cfg_function(lambda args: args["uncond_denoised"])
        else:
            model.set_model_sampler_cfg_function(lambda args: args["uncond"])
        return model

    return take


def perp(cfg: float) -> Any:
    def run(model: Any) -> Tensor:
        guider = Guider_PerpNeg(model)
        guider.set_conds(tiny.cond(1), tiny.cond(2), tiny.cond(3))
        guider.set_cfg(cfg, 1.0)
        return guided(guider, steps=3)

    return run


LEFT_OUT = {
    "cfg 0 of a guider of its own": (perp(0.0), "empty_negative_prompt"),
    "both cfgs 0": (dual("nested", (0.0, 0.0)), "negative"),
    **{
        name: (lambda m, name=name: tiny.sample(taking(name)(m), steps=3), "negative")
        for name in ("pre", "post", "own")
    },
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_guidance_that_leaves_the_edited_prompts_out_is_an_error(model: Any, name: str) -> None:
    run, prompt = LEFT_OUT[name]
    assert torch.equal(run(cre(model, strength=0.0)), run(model))
    with pytest.raises(ValueError, match=f"Test: .*not applied: it acted, .* the prompt {prompt} alone.*cfg above 0"):
        run(cre(model))
    run(cre(model, rows="all"))


def test_guidance_may_leave_them_out_for_a_while(model: Any) -> None:
    """Only an edit whose own steps are all without them is lost."""

    def run(model: Any) -> Tensor:
        model, high = model.clone(), model.get_model_object("model_sampling").percent_to_sigma(0.5)
        model.set_model_sampler_post_cfg_function(
            lambda args: args["uncond_denoised" if args["sigma"] > high else "denoised"]
        )
        return tiny.sample(model, steps=4)

    assert not torch.equal(run(cre(model)), run(model))
    with pytest.raises(ValueError, match="the prompt negative alone"):
        run(cre(model, end_percent=0.4))


def test_one_prompt_for_both_is_followed(model: Any) -> None:
    same = tiny.cond(1)
    assert not torch.equal(tiny.sample(cre(model), same, same), tiny.sample(model, same, same))
    tiny.sample(cre(model, blocks="middle"), same, same, cfg=1.0)


def test_all_rows_can_be_edited(model: Any) -> None:
    def run(model: Any) -> Tensor:
        return tiny.sample(model, cfg=0.0, steps=1)

    with tiny.Recorder(model) as before:
        plain = run(model)
    with tiny.Recorder(model) as after:
        edited = run(cre(model, rows="all"))
    rows = [torch.equal(*pair) for pair in pairs(before, after)]
    assert rows == [False, False] and not torch.equal(plain, edited)


def test_all_rows_have_their_images_gates(model: Any) -> None:
    with tiny.Recorder(model) as before:
        tiny.sample(model, batch=2, cfg=0.0, steps=1)
    with tiny.Recorder(model) as after:
        tiny.sample(cre(model, rows="all", gate=Gate((0.0, 1.0))), batch=2, cfg=0.0, steps=1)
    rows = [torch.equal(*pair) for pair in pairs(before, after)]
    assert rows == [True, False, True, False]


def test_all_rows_beside_the_conditional_ones(model: Any) -> None:
    """Two edits of one model may differ in it: the negative's rows get the one alone."""
    both = add_edit(
        cre(model, 100, rows="all"), EditSpec("projection", tiny.concept("d", 200), options=tiny.CRE, node="Test")
    )
    one = cre(model, 100, rows="all")
    with tiny.Recorder(model) as alone:
        tiny.sample(one, steps=1)
    with tiny.Recorder(model) as together:
        tiny.sample(both, steps=1)
    negative = [r.calls[FIRST][0]["out"][0] for r in (alone, together)]
    positive = [r.calls[FIRST][0]["out"][1] for r in (alone, together)]
    torch.testing.assert_close(*negative, rtol=1e-4, atol=1e-4)
    assert (positive[0] - positive[1]).abs().max() > 1e-2
