"""A picture that two models draw one after the other, SDXL and its refiner; and pictures that a prompt brings."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import comfy.supported_models
import nodes
import pytest
import reference
import tiny
import torch
from test_account import flight, last
from test_pooled import Heard, by_hand
from torch import Tensor

from conceptguard.editing.edits.spec import Concept, EditSpec, Phrase
from conceptguard.editing.engine.account import FURTHER
from conceptguard.editing.engine.conds import BROUGHT
from conceptguard.editing.engine.host import add_edit

STEPS, AT = 6, 4
SHOWN = f"; {BROUGHT['unclip_conditioning']}"
BASE, REFINER = 2048, 1280  # of the text, as the real ones have it


def model_of(width: int) -> Any:
    """SDXL, or its refiner, small but for the text and what it is told beside it."""
    family = comfy.supported_models.SDXL if width == BASE else comfy.supported_models.SDXLRefiner
    told = {"adm_in_channels": 2816 if width == BASE else 2560}
    return tiny._patcher(family, {**tiny._SDXL, "context_dim": width, **told}, torch.float32, width)


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    return {width: model_of(width) for width in (BASE, REFINER)}


def text(seed: int, *shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def cond(width: int, seed: int, **more: Any) -> list[Any]:
    """As CLIPTextEncodeSDXL and CLIPTextEncodeSDXLRefiner make it; both read CLIP-G's pooled text."""
    more = {"aesthetic_score": 6.0 if seed == 1 else 2.5, "width": 64, "height": 64, **more}
    return [[text(seed + width, 77, width), {"pooled_output": text(seed, 1280), **more}]]


def concept(width: int, seed: int = 30) -> Concept:
    phrase = Phrase("knife", text(seed + width, 77, width), (1,), pooled=text(1, 1280) + 0.5 * text(seed, 1280))
    return Concept("knife", (phrase,), text(40 + width, 77, width), pooled=text(41, 1280))


def spec(width: int, **inputs: Any) -> EditSpec:
    return EditSpec("projection", concept(width), options=tiny.CRE, node=f"Edit of {width}", **inputs)


def edited(models: dict[int, Any], width: int, **inputs: Any) -> Any:
    return add_edit(models[width], spec(width, **inputs))


def part(model: Any, width: int, latent: Any, start: int, end: int) -> dict[str, Tensor]:
    """The host's KSamplerAdvanced, with what noise is left handed on."""
    conds = cond(width, 1), cond(width, 2)
    noise, leftover = ("enable" if there else "disable" for there in (start == 0, end < STEPS))
    sampler = nodes.KSamplerAdvanced()
    return sampler.sample(model, noise, 5, STEPS, 4.0, "euler", "normal", *conds, latent, start, end, leftover)[0]


def both(base: Any, refiner: Any, at: int = AT, batch: int = 1) -> tuple[Tensor, Tensor]:
    """What is handed on, and the picture."""
    handed = part(base, BASE, {"samples": torch.zeros(batch, 4, tiny.SIZE, tiny.SIZE)}, 0, at)
    return handed["samples"], part(refiner, REFINER, handed, at, STEPS)["samples"]


def line(model: Any) -> str:
    ((_, said),) = last(model).lines()
    return said


# --- the handover ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [(BASE,), (REFINER,), (BASE, REFINER)], ids=str)
def test_each_models_own_steps_are_edited(models: dict[int, Any], on: tuple[int, ...]) -> None:
    """And no others: what the base hands on is edited if and only if the base carries the edit."""
    base, refiner = (edited(models, width) if width in on else models[width] for width in (BASE, REFINER))
    (plain_handed, plain), (handed, picture) = both(models[BASE], models[REFINER]), both(base, refiner)
    assert torch.equal(handed, plain_handed) == (BASE not in on)
    assert (picture - plain).abs().max() > 0.1
    for model, width, steps in ((base, BASE, AT), (refiner, REFINER, STEPS - AT)):
        if width in on:
            ((spec, entry),) = last(model).entries.items()
            assert entry.acted == entry.due == set(range(steps)) and not entry.missed and spec.source.width == width
            assert entry.edited == steps and last(model).prompts == {"positive": steps, "negative": steps}
            said = f"acted in {steps} of {steps} steps, 8 of 8 blocks"
            assert line(model) == said + FURTHER * (width == BASE)


def test_an_edit_for_one_of_them_alone_is_refused_by_the_other(models: dict[int, Any]) -> None:
    for width, other in ((BASE, REFINER), (REFINER, BASE)):
        with pytest.raises(
            ValueError, match=f"Edit of {width}: .* of width {width}, but .* reads one of width {other}"
        ):
            add_edit(models[other], spec(width))


def test_the_refiner_is_told_the_edited_pooled_text_beside_sizes_and_score(models: dict[int, Any]) -> None:
    heard = {width: Heard(model.model.diffusion_model.label_emb) for width, model in models.items()}
    both(*(edited(models, width, strength=0.7) for width in (BASE, REFINER)))
    for width, calls in heard.items():
        told, plain = calls.calls[-1], cond(width, 1)[0][1]["pooled_output"]
        positive = told[(told[:, :1280] - text(2, 1280)).abs().amax(-1) > 1e-3]
        want = by_hand(plain[0], concept(width), 0.7).float()
        torch.testing.assert_close(positive[:, :1280], want[None], rtol=1e-4, atol=1e-4)
        assert (want - plain[0]).abs().max() > 0.1 and len(told) == 2
        sizes = told[:, 1280:]
        assert sizes.shape[1] == (1536 if width == BASE else 1280)
        if width == REFINER:  # whose last 256 numbers are of the score: the prompts' own, 6 and 2.5
            embedder = models[width].model.embedder
            scores = {float(s): embedder(torch.tensor([s]))[0] for s in (6.0, 2.5)}
            edits = (told[:, :1280] - want).abs().amax(-1) < 1e-3
            for row, edit in zip(sizes, edits, strict=True):
                torch.testing.assert_close(row[-256:], scores[6.0 if edit else 2.5])


@pytest.mark.parametrize("period", [(0.0, 0.3), (0.2, 0.8), (0.7, 1.0)], ids=str)
@pytest.mark.parametrize("at", [1, 4])
def test_a_causal_period_is_the_same_noise_levels_on_both(
    models: dict[int, Any], period: tuple[float, float], at: int
) -> None:
    """Each of its steps is edited once, by whoever has it; the other's line says why it did nothing."""
    base, refiner = (edited(models, width, start_percent=period[0], end_percent=period[1]) for width in (BASE, REFINER))
    both(base, refiner, at)
    accounts = last(base), last(refiner)
    assert [len(account.schedule) for account in accounts] == [at, STEPS - at]
    schedule = [*accounts[0].schedule, *accounts[1].schedule]
    high, low = map(models[BASE].get_model_object("model_sampling").percent_to_sigma, period)
    acted = set()
    for account, before in zip(accounts, (0, at), strict=True):
        (entry,) = account.entries.values()
        acted |= {before + step for step in entry.acted}
        assert account.applied and (entry.due == entry.acted)
    assert acted == {i for i, sigma in enumerate(schedule) if low < sigma <= high} and 0 < len(acted) < STEPS
    for model, account in zip((base, refiner), accounts, strict=True):
        said = line(model)
        (entry,) = account.entries.values()
        assert (f"did not act: none of {account.steps} steps" in said) == (not entry.acted)
        assert said.endswith(FURTHER) == (account is accounts[0] and low < accounts[1].schedule[0])


def test_an_edit_whose_window_lies_in_the_others_steps_says_where_the_steps_are(models: dict[int, Any]) -> None:
    base, refiner = edited(models, BASE, start_percent=0.9), edited(models, REFINER, end_percent=0.3)
    plain = both(models[BASE], models[REFINER])
    made = both(base, refiner)
    assert all(torch.equal(*pair) for pair in zip(plain, made, strict=True))
    assert line(base) == "did not act: none of 4 steps lies between 0.9 and 1: they lie from 0 to 0.6" + FURTHER
    assert line(refiner) == "did not act: none of 2 steps lies between 0 and 0.3: they lie from 0.8 to 1"


@pytest.mark.parametrize("restart", [False, True])
def test_a_gate_is_due_by_the_last_step_of_the_model_it_is_on(models: dict[int, Any], restart: bool) -> None:
    """Though its percent is the refiner's; and what it decided there holds for the refiner's edit behind it."""
    scores, looks = [0.0, 1.0], []
    gate = flight(scores, 0.9, restart, looks)
    base, refiner = (edited(models, width, gate=gate) for width in (BASE, REFINER))
    plain = both(models[BASE], models[REFINER], batch=2)
    handed = part(base, BASE, {"samples": torch.zeros(2, 4, tiny.SIZE, tiny.SIZE)}, 0, AT)
    (told,) = last(base).gates.values()
    assert len(looks) == 1 and told["step"] == (AT if restart else AT - 1) and told["opens"] == [0.0, 1.0]
    (entry,) = last(base).entries.values()
    assert entry.acted == (set(range(AT)) if restart else {AT - 1}) and entry.edited == len(entry.acted)
    scores[:] = [0.0, 0.0]  # of what is edited already there is nothing to see
    made = handed["samples"], part(refiner, REFINER, handed, AT, STEPS)["samples"]
    (entry,) = last(refiner).entries.values()
    assert entry.acted == set(range(STEPS - AT)) and entry.edited == STEPS - AT
    for before, after in zip(plain, made, strict=True):
        torch.testing.assert_close(after[0], before[0], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(after[1], before[1], atol=1e-2)


def test_a_gate_that_flagged_what_its_edit_has_no_step_for_says_so(models: dict[int, Any]) -> None:
    base = edited(models, BASE, gate=flight([1.0], 0.2), start_percent=0.9)
    part(base, BASE, {"samples": torch.zeros(1, 4, tiny.SIZE, tiny.SIZE)}, 0, AT)
    assert [gate["opens"] for gate in last(base).gates.values()] == [[1.0]]
    assert line(base).startswith("did not act: none of 4 steps lies between 0.9 and 1")


def test_a_gate_with_one_step_left_asks_for_a_restart(models: dict[int, Any]) -> None:
    """Of the refiner's, the first decides and none is left to edit."""
    handed = part(models[BASE], BASE, {"samples": torch.zeros(1, 4, tiny.SIZE, tiny.SIZE)}, 0, STEPS - 1)
    refiner = edited(models, REFINER, gate=flight([1.0], 0.9))
    with pytest.raises(ValueError, match=f"Edit of {REFINER}: its gate decides after a step, .* turn on the gate's"):
        part(refiner, REFINER, handed, STEPS - 1, STEPS)


# --- pictures beside the text ----------------------------------------------------------------------------------------


class Unclip(comfy.supported_models.SD21UnclipL):
    noise_aug_config = {**comfy.supported_models.SD21UnclipL.noise_aug_config, "timestep_dim": 8}


def shown(conditioning: list[Any], width: int, *pictures: int) -> Any:
    """The host's unCLIPConditioning, once a picture."""
    for seed in pictures:
        looked = SimpleNamespace(image_embeds=text(900 + seed, width))
        conditioning = nodes.unCLIPConditioning().apply_adm(conditioning, looked, 1.0, 0.1)[0]
    return conditioning


@pytest.mark.parametrize("pictures", [(1,), (1, 2)], ids=["a picture", "two"])
def test_beside_an_unclip_picture_the_text_is_edited_as_ever(pictures: tuple[int, ...]) -> None:
    """And what the model is told of the picture stays as it is, and the account says so."""
    model = tiny._patcher(
        Unclip, {**tiny._SDXL, "adm_in_channels": 16, "use_linear_in_transformer": True}, torch.float32, 0
    )
    heard = Heard(model.model.diffusion_model.label_emb)
    edit = add_edit(model, EditSpec("projection", tiny.concept(), 0.8, options=tiny.CRE, node="Test"))
    positive = shown(tiny.cond(1), 8, *pictures)
    plain = tiny.sample(model, positive, steps=1)
    told = heard.calls[-1]
    with tiny.Recorder(model) as seen:
        made = tiny.sample(edit, positive, steps=1)
    assert torch.equal(heard.calls[-1], told) and (told.abs().amax(-1) > 0).tolist().count(True) == 1
    assert not torch.allclose(made, plain, atol=1e-2)
    for key, (call,) in seen.calls.items():

        def found(tokens: Tensor, key: Any = key, q: Tensor = call["q"][1]) -> Tensor:
            return reference.attention(q, *(seen.project(key, which, tokens) for which in "kv"), seen.heads(key))

        A = reference.attention(*(call[name][1] for name in "qkv"), seen.heads(key))
        At, A0 = found(tiny.concept().phrases[0].tokens[0]), found(tiny.concept().baseline[0])
        want = reference.cre(A, [At], [0.8], 1, clip=True, joint=True, A0=A0)
        torch.testing.assert_close(call["out"][1].double(), want, rtol=1e-3, atol=1e-3)
    assert line(edit) == "acted in 1 of 1 steps, 8 of 8 blocks" + SHOWN
    for negative_alone in (tiny.cond(2), shown(tiny.cond(2), 8, 1)):
        tiny.sample(edit, tiny.cond(1), negative_alone, steps=1)
        assert SHOWN not in line(edit)


@pytest.mark.parametrize("width", [BASE, REFINER])
def test_a_picture_in_the_pooled_texts_place_is_edited_as_one_and_the_account_says_what_stays(
    models: dict[int, Any], width: int
) -> None:
    """SDXL reads a picture there where the prompt brings one (Revision)."""
    model = models[width]
    heard = Heard(model.model.diffusion_model.label_emb)
    about = replace(concept(width), phrases=(replace(concept(width).phrases[0], pooled=text(901, 1280)),))
    edit = add_edit(model, replace(spec(width), source=about))
    latent = {"samples": torch.zeros(1, 4, tiny.SIZE, tiny.SIZE)}
    positive = shown(cond(width, 1), 1280, 1)

    def told(m: Any) -> Tensor:
        conds = positive, cond(width, 2)
        nodes.KSamplerAdvanced().sample(m, "enable", 5, 1, 4.0, "euler", "normal", *conds, latent, 0, 1, "disable")
        rows = heard.calls[-1][:, :1280]
        return rows[(rows - text(2, 1280)).abs().amax(-1) > 1e-3][0]

    picture, changed = told(model), told(edit)
    torch.testing.assert_close(changed.double(), by_hand(picture, about, 1.0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, picture, atol=0.1) and not torch.allclose(picture, text(1, 1280)[0], atol=0.1)
    assert line(edit).endswith(SHOWN)
