"""Whatever joins, splits or empties prompts in front of a transformer, every row of the positive is edited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.sample
import comfy.samplers
import dits
import nodes
import pytest
import tiny
import torch
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG
from comfy_extras.nodes_model_advanced import (
    ModelSamplingAuraFlow,
    ModelSamplingContinuousEDM,
    ModelSamplingContinuousV,
    ModelSamplingDiscrete,
    ModelSamplingFlux,
    ModelSamplingSD3,
)
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from torch import Tensor

from conceptguard.editing.edits.spec import EditSpec
from conceptguard.editing.engine.backbones import joint
from conceptguard.editing.engine.host import accounts_of, add_edit
from conceptguard.editing.methods.cre import DEFAULTS

EVERYWHERE = replace(DEFAULTS, floor=0.0, evidence="position")
A, B = (dits.cond(dits.tokens(seed, length)) for seed, length in ((1, 9), (3, 12)))


class Style:
    """A Redux model: what it makes of a picture stands behind the prompt's tokens."""

    def get_cond(self, _: Any) -> Tensor:
        return dits.tokens(9, 5)


def masked(cond: Any, left: bool) -> Any:
    mask = torch.zeros(1, 64, 64)
    mask[..., 32 * (not left) :][..., :32] = 1
    return nodes.ConditioningSetMask().append(cond, mask, "default", 1.0)[0]


def during(cond: Any, start: float, end: float) -> Any:
    return nodes.ConditioningSetTimestepRange().set_range(cond, start, end)[0]


# Each with the rows of the positive that one step has.
JOINED: dict[str, tuple[Callable[[], Any], int]] = {
    "ConditioningCombine": (lambda: nodes.ConditioningCombine().combine(A, B)[0], 2),
    "ConditioningConcat": (lambda: nodes.ConditioningConcat().concat(A, B)[0], 1),
    "ConditioningAverage": (lambda: nodes.ConditioningAverage().addWeighted(A, B, 0.5)[0], 1),
    "of those a combination": (lambda: [*A, *nodes.ConditioningAverage().addWeighted(B, A, 2.0)[0]], 2),
    "ConditioningSetMask": (lambda: [*masked(A, True), *masked(B, False)], 2),
    "ConditioningZeroOut": (lambda: nodes.ConditioningZeroOut().zero_out(A)[0], 1),
    "ConditioningSetTimestepRange": (lambda: [*during(A, 0.0, 0.6), *during(B, 0.0, 1.0)], 2),
    "StyleModelApply": (lambda: nodes.StyleModelApply().apply_stylemodel(A, Style(), None, 1.0, "multiply")[0], 1),
}


@pytest.mark.parametrize("joined", JOINED)
@pytest.mark.parametrize("name", ["Flux.1", "SD3", "Z-Image", "Wan"])
def test_every_row_of_the_positive_is_edited(name: str, joined: str) -> None:
    make, rows = JOINED[joined]
    model = dits.build(name)
    edited = add_edit(model, EditSpec("projection", dits.concept(), options=EVERYWHERE, node="Test"))
    before, after = (dits.sample(name, each, make(), cfg=4.0) for each in (model, edited))
    accounts = accounts_of(edited)
    assert accounts is not None and (account := accounts.of("")) is not None
    (only,) = account.entries.values()
    assert (only.edited, account.prompts) == (rows, {"positive": rows, "negative": 1})
    assert not only.missed and (after - before).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("guider", ["DualCFG", "DualCFG nested", "PerpNeg", "Basic"])
@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image", "HiDream", "Wan"])
def test_guiders_with_more_prompts_than_two(name: str, guider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of each positive prompt is edited and no other, in one model call as in two."""
    third, negative = dits.cond(dits.tokens(5, 9)), dits.cond(dits.tokens(2, 9))

    def sample(model: Any) -> Tensor:
        if guider == "Basic":
            made = Guider_Basic(model)
            made.set_conds(A)
        elif guider == "PerpNeg":
            made = Guider_PerpNeg(model)
            made.set_conds(A, third, negative)
            made.set_cfg(4.0, 1.0)
        else:
            made = Guider_DualCFG(model)
            made.set_conds(A, third, negative)
            made.set_cfg(4.0, 3.0, nested=guider.endswith("nested"))
        empty = dits.latent(name, 2)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
        euler, noise = comfy.samplers.sampler_object("euler"), comfy.sample.prepare_noise(empty, 5)
        return made.sample(noise, empty, euler, sigmas, disable_pbar=True, seed=5)

    model = dits.build(name)
    edited = add_edit(model, EditSpec("projection", dits.concept(), options=EVERYWHERE, node="Test"))
    before, after = sample(model), sample(edited)
    monkeypatch.setattr(joint, "WORTH", 2.0)
    torch.testing.assert_close(sample(edited), after, rtol=1e-3, atol=1e-3)
    accounts = accounts_of(edited)
    assert accounts is not None and (account := accounts.of("")) is not None
    (only,) = account.entries.values()
    positive = {"positive"} | ({"middle"} if "DualCFG" in guider else set())
    assert (account.edited, only.edited) == (positive, 4 * len(positive)) and not only.missed
    assert len(account.prompts) == (1 if guider == "Basic" else 3) and not torch.allclose(before, after, atol=1e-2)


SAMPLING = {
    "Flux.1": lambda m: ModelSamplingFlux().patch(m, 1.15, 0.5, 1024, 1024)[0],
    "SD3": lambda m: ModelSamplingSD3().patch(m, 6.0)[0],
    "Z-Image": lambda m: ModelSamplingAuraFlow().patch_aura(m, 1.73)[0],
    "Wan": lambda m: ModelSamplingSD3().patch(m, 8.0)[0],
    "v": lambda m: ModelSamplingDiscrete().patch(m, "v_prediction", True)[0],
    "lcm": lambda m: ModelSamplingDiscrete().patch(m, "lcm", False)[0],
    "edm": lambda m: ModelSamplingContinuousEDM().patch(m, "eps", 120.0, 0.002)[0],
    "continuous v": lambda m: ModelSamplingContinuousV().patch(m, "v_prediction", 500.0, 0.03)[0],
}


@pytest.mark.parametrize("name", SAMPLING)
def test_a_window_follows_the_sampling_wherever_it_is_put(name: str, model: Any) -> None:
    """The percents of an edit are those of the schedule that the run has."""
    unet, sampled = name not in dits.FAMILIES and name not in dits.CROSS, SAMPLING[name]
    plain, concept = (model, tiny.concept()) if unet else (dits.build(name), dits.concept())
    spec = EditSpec("projection", concept, options=EVERYWHERE, node="Test", start_percent=0.25, end_percent=0.75)
    pictures, acted = [], []
    for edited in (sampled(add_edit(plain, spec)), add_edit(sampled(plain), spec)):
        pictures.append(tiny.sample(edited, steps=8) if unet else dits.sample(name, edited, steps=8))
        accounts = accounts_of(edited)
        assert accounts is not None and (account := accounts.of("")) is not None
        (only,) = account.entries.values()
        start, end = map(edited.get_model_object("model_sampling").percent_to_sigma, (0.25, 0.75))
        within = {i for i, sigma in enumerate(account.schedule) if end < sigma <= start}
        assert only.acted == within and 0 < len(within) < 8
        acted.append(only.acted)
    before = tiny.sample(sampled(plain), steps=8) if unet else dits.sample(name, sampled(plain), steps=8)
    assert torch.equal(*pictures) and acted[0] == acted[1] and not torch.equal(before, pictures[0])
