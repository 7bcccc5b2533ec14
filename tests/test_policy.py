"""A policy where sampling happens: every run carries its edits and shows them, or ends without a picture."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.samplers
import comfy.sd
import foreign_bypass as packs
import pytest
import tiny
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_model_merging import ModelMergeSimple
from documents import WORDS
from foreign_rows import GeometricCFG, Nameless
from governed import CRE, EIUP, governed, prompt, sample, write

from conceptguard.editing.edits.concept import concept_from_text
from conceptguard.editing.engine.account import LISTENERS
from conceptguard.editing.engine.host import account_of, edits_of
from conceptguard.editing.engine.run import OBSERVER
from conceptguard.editing.policy.enforce import led_by_picture
from conceptguard.editing.policy.file import Refused
from conceptguard.editing.presets.apply import Given, specs_of
from conceptguard.editing.presets.document import read
from conceptguard.editing.training.harness import train_with
from conceptguard.nodes.cre import ConceptGuardCRE
from conceptguard.nodes.eiup import ConceptGuardEIUP
from conceptguard.nodes.preset import ConceptGuardApplyPreset

HOOKED = [
    (comfy.samplers.CFGGuider, "sample"),
    (comfy.model_base.BaseModel, "apply_model"),
    (comfy.sd.CLIP, "tokenize"),
    (comfy.sd.CLIP, "encode_from_tokens"),
]
pytestmark = pytest.mark.usefixtures("as_a_node")


def edited(model: Any, clip: Any, folder: Path) -> Any:
    """The same by hand: the preset applied by its node."""
    text = (folder / "mine.json").read_text()
    return ConceptGuardApplyPreset.execute(model, clip, text, other_models=True).args[0]


def verdicts(enforcement: Any) -> list[str]:
    return [entry["verdict"] for entry in enforcement.record.entries()]


# --- on and off ------------------------------------------------------------------------------------------------------


def test_off_restores_the_host_exactly(model: Any, clip: Any, tmp_path: Path) -> None:
    before = [vars(owner)[name] for owner, name in HOOKED]
    plain = sample(model, clip)
    with governed(tmp_path) as enforcement:
        during = [vars(owner)[name] for owner, name in HOOKED]
        assert all(a is not b for a, b in zip(before, during, strict=True))
        assert [inspect.signature(a) for a in before] == [inspect.signature(b) for b in during]
        assert not torch.equal(sample(model, clip), plain)
        write(tmp_path, on=False)
        assert torch.equal(sample(model, clip), plain) and not enforcement.held
        assert all(vars(owner)[name] is a for (owner, name), a in zip(HOOKED, before, strict=True))
        write(tmp_path)
        assert enforcement.refresh() and not torch.equal(sample(model, clip), plain)
    assert all(vars(owner)[name] is a for (owner, name), a in zip(HOOKED, before, strict=True))
    assert torch.equal(sample(model, clip), plain) and not edits_of(model) and not LISTENERS


def test_another_pack_that_wrapped_ours_keeps_its_place(
    model: Any, clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, original = sample(model, clip), comfy.samplers.CFGGuider.sample
    with governed(tmp_path):
        ours, calls = comfy.samplers.CFGGuider.sample, []

        def theirs(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return ours(*args, **kwargs)

        comfy.samplers.CFGGuider.sample = theirs
    try:
        assert comfy.samplers.CFGGuider.sample is theirs
        assert torch.equal(sample(model, clip), plain) and calls
    finally:
        comfy.samplers.CFGGuider.sample = original


# --- its edits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edits", [(CRE,), (CRE, EIUP)])
def test_a_plain_graph_gets_the_picture_of_the_presets_node(
    model: Any, clip: Any, tmp_path: Path, edits: tuple[Any, ...]
) -> None:
    with governed(tmp_path, *edits) as enforcement:
        made = sample(model, clip)
    assert torch.equal(made, sample(edited(model, clip, tmp_path), clip))
    (entry,) = enforcement.record.entries()
    assert entry["verdict"] == "edited" and entry["user"] == "me" and "prompts" not in entry
    assert [edit["method"] for edit in entry["edits"]] == ["CRE", "EIUP"][: len(edits)]
    assert all(edit["steps"]["acted"] == 2 for edit in entry["edits"])
    assert "acted in 2 of 2 steps" in enforcement.said[0]


def test_a_graph_that_brings_them_has_them_once(model: Any, clip: Any, tmp_path: Path) -> None:
    write(tmp_path)
    mine = edited(model, clip, tmp_path)
    alone = sample(mine, clip)
    with governed(tmp_path) as enforcement:
        assert torch.equal(sample(mine, clip), alone)
    assert [len(entry["edits"]) for entry in enforcement.record.entries()] == [1]


def test_a_graph_that_brings_them_weaker_gets_the_policys(model: Any, clip: Any, tmp_path: Path) -> None:
    write(tmp_path)
    full = sample(edited(model, clip, tmp_path), clip)
    text = (tmp_path / "mine.json").read_text()
    for strength in (0.0, 0.01):
        weak = ConceptGuardApplyPreset.execute(model, clip, text, strength, other_models=True).args[0]
        with governed(tmp_path):
            latents = sample(weak, clip)
        assert torch.equal(latents, full)
        assert account_of(weak, latents).applied  # the graph's Account node still finds its run


def test_prompts_are_recorded_only_if_the_policy_says_so(model: Any, clip: Any, tmp_path: Path) -> None:
    with governed(tmp_path, prompts=True) as enforcement:
        sample(model, clip, "a secret garden", "blurry")
    (entry,) = enforcement.record.entries()
    assert entry["prompts"] == ["a secret garden", "blurry"]


def test_the_words_are_encoded_with_the_encoder_of_the_prompt(model: Any, clip: Any, tmp_path: Path) -> None:
    """Whatever other one was at work last, of the same width."""
    other = tiny.clip(seed=9)
    with governed(tmp_path):
        mine = prompt(clip, "a knife"), prompt(clip, "")
        prompt(other, "harmless")
        made = tiny.sample(model, *mine)
    assert torch.equal(made, tiny.sample(edited(model, clip, tmp_path), *mine))


def test_an_encoding_that_no_encoder_made_is_compared_with_all(model: Any, clip: Any, tmp_path: Path) -> None:
    other = tiny.clip(seed=9)
    with governed(tmp_path) as enforcement:
        positive, negative = prompt(clip, "a knife"), prompt(clip, "")
        prompt(other, "harmless")
        tiny.sample(model, [[positive[0][0] * 0.9, positive[0][1]]], negative)
    (entry,) = enforcement.record.entries()
    assert [edit["source"] for edit in entry["edits"]] == ["knife", "knife"]


def test_without_a_known_encoder_there_is_no_picture(model: Any, tmp_path: Path) -> None:
    with governed(tmp_path) as enforcement, pytest.raises(Refused, match="no text encoder is known"):
        tiny.sample(model)
    assert verdicts(enforcement) == ["refused"]


def test_encoders_are_not_kept_in_memory(tmp_path: Path, model: Any) -> None:
    import gc
    import weakref

    with governed(tmp_path) as enforcement:
        own = tiny.clip(seed=3)
        mine = prompt(own, "a knife"), prompt(own, "")
        seen = weakref.ref(own.cond_stage_model)
        del own
        gc.collect()
        assert seen() is None
        tiny.sample(model, *mine)  # the words were encoded when it was at work
    assert verdicts(enforcement) == ["edited"]


# --- graphs that would get round it ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pack",
    [
        packs.DeepCache().apply,
        packs.known_options_only,
        packs.wrappers_dropped_while_sampling,
        packs.own_forward,
        packs.several_devices,
    ],
)
def test_what_leaves_edits_out_makes_no_picture(model: Any, clip: Any, tmp_path: Path, pack: Any) -> None:
    with governed(tmp_path) as enforcement, pytest.raises(ValueError, match="ConceptGuard policy: "):
        sample(pack(model), clip, steps=4)
    assert verdicts(enforcement) == ["refused"]


@pytest.mark.parametrize("pack", [packs.new_transformer_options, packs.new_wrappers])
def test_what_drops_a_graphs_edits_does_not_drop_the_policys(model: Any, clip: Any, tmp_path: Path, pack: Any) -> None:
    with governed(tmp_path) as enforcement:
        sample(pack(model), clip)
    assert verdicts(enforcement) == ["edited"]


def test_a_merge_is_edited(model: Any, clip: Any, tmp_path: Path) -> None:
    with governed(tmp_path) as enforcement:
        sample(ModelMergeSimple().merge(model, tiny.sd1(seed=4), 0.5)[0], clip)
    assert verdicts(enforcement) == ["edited"]


def test_a_cfg_of_nothing_edits_the_other_prompt(model: Any, clip: Any, tmp_path: Path) -> None:
    with governed(tmp_path) as enforcement:
        sample(model, clip, "a teapot", "a knife", cfg=0.0)
    (entry,) = enforcement.record.entries()
    assert [edit["rows"]["for"] for edit in entry["edits"]] == ["all"]


def run(guider: Any, positive: Any, negative: Any, seed: int = 5) -> Any:
    latent = torch.zeros(1, 4, tiny.SIZE, tiny.SIZE)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 2)
    guider.inner_set_conds({"positive": positive, "positive2": positive, "negative": negative})
    return guider.sample(
        comfy.sample.prepare_noise(latent, seed), latent, comfy.samplers.sampler_object("euler"), sigmas, seed=seed
    )


@pytest.mark.parametrize("kind", [comfy.samplers.CFGGuider, GeometricCFG])
def test_every_guider_carries_them(model: Any, clip: Any, tmp_path: Path, kind: Any) -> None:
    with governed(tmp_path) as enforcement:
        guider = kind(model)
        guider.cfg = 4.0
        run(guider, prompt(clip, "a knife"), prompt(clip, ""))
        assert guider.model_patcher is model and guider.model_options is model.model_options
    assert verdicts(enforcement) == ["edited"] and not edits_of(model)


@pytest.mark.parametrize("shared", [False, True])
def test_a_guider_within_a_guider_is_edited(model: Any, clip: Any, tmp_path: Path, shared: bool) -> None:
    """Which samples another MODEL at each step of its own, with options of its own or with those of the outer run."""
    other, mine = tiny.sd1(seed=4), (prompt(clip, "a knife"), prompt(clip, ""))

    class Outer(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
            inner = comfy.samplers.CFGGuider(other)
            inner.set_conds(*mine)
            if shared:
                inner.model_options = model_options
            sigmas = torch.cat([timestep[:1], torch.zeros(1)])
            sampler, start = comfy.samplers.sampler_object("euler"), torch.zeros_like(x)
            return inner.sample(x / timestep[0], start, sampler, sigmas, seed=5)

    free = run(Outer(model), *mine)
    mine = (prompt(clip, "a knife"), prompt(clip, ""))
    with governed(tmp_path) as enforcement:
        mine = (prompt(clip, "a knife"), prompt(clip, ""))
        try:
            made = run(Outer(model), *mine)
        except ValueError as error:
            assert "ConceptGuard policy: " in str(error) and "refused" in verdicts(enforcement)
            return
    assert not torch.equal(made, free) and set(verdicts(enforcement)) == {"edited"}
    acted = [edit["steps"]["acted"] for entry in enforcement.record.entries() for edit in entry["edits"]]
    assert acted and all(acted)


def test_a_guider_that_hides_whose_prompts_it_asks_for_is_refused(model: Any, clip: Any, tmp_path: Path) -> None:
    with governed(tmp_path) as enforcement, pytest.raises(ValueError, match="ConceptGuard policy: cannot tell which"):
        run(Nameless(model), prompt(clip, "a knife"), prompt(clip, ""))
    assert verdicts(enforcement) == ["refused"]


def test_a_guider_that_samples_by_its_own_code_is_refused(model: Any, clip: Any, tmp_path: Path) -> None:
    class Own(comfy.samplers.CFGGuider):
        sample = vars(comfy.samplers.CFGGuider)["sample"]  # a copy of the host's, from before

    class Loop(comfy.samplers.CFGGuider):
        def sample(self, noise: Any, *args: Any, **kwargs: Any) -> Any:
            return self.model_patcher.model.apply_model(noise, torch.ones(1), c_crossattn=tiny.tokens(1))

    for kind in (Own, Loop):
        with governed(tmp_path) as enforcement, pytest.raises(Refused, match="by code of its own"):
            run(kind(model), prompt(clip, "a knife"), prompt(clip, ""))
        assert verdicts(enforcement)[-1] == "refused"


def test_another_model_within_a_governed_run_is_refused(model: Any, clip: Any, tmp_path: Path) -> None:
    other = tiny.sd1(seed=4)

    class Two(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
            return other.model.apply_model(x, timestep, c_crossattn=tiny.tokens(1))

    with governed(tmp_path), pytest.raises(Refused, match="by code of its own"):
        run(Two(model), prompt(clip, "a knife"), prompt(clip, ""))


def test_a_small_cfg_does_not_hide_the_knife_in_the_negative(model: Any, clip: Any, tmp_path: Path) -> None:
    """The picture is led by the other prompt: both are edited."""
    with governed(tmp_path) as enforcement:
        sample(model, clip, "", "a knife", cfg=0.1)
        sample(model, clip, "a knife", "", cfg=1.0)
    first, second = enforcement.record.entries()
    assert [edit["rows"]["for"] for edit in first["edits"]] == ["all"]
    assert [edit["rows"]["for"] for edit in second["edits"]] == ["conditional"]


def leave_out(model: Any) -> Any:
    model.set_model_sampler_cfg_function(lambda args: args["uncond"] + 0.01 * (args["cond"] - args["uncond"]))
    return model


def before(model: Any) -> Any:
    model.set_model_sampler_pre_cfg_function(lambda args: [0.01 * args["conds_out"][0], args["conds_out"][1]])
    return model


def after(model: Any) -> Any:
    model.set_model_sampler_post_cfg_function(lambda args: 0.99 * args["uncond_denoised"] + 0.01 * args["denoised"])
    return model


def around(model: Any) -> Any:
    def wrapper(executor: Any, *args: Any) -> Any:
        cond, uncond = executor(*args)
        return [0.01 * cond + 0.99 * uncond, uncond]

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "other", wrapper)
    return model


@pytest.mark.parametrize("pack", [leave_out, before, after, around])
def test_a_node_that_changes_the_guidance_has_all_prompts_edited(
    model: Any, clip: Any, tmp_path: Path, pack: Any
) -> None:
    """The knife is in the negative prompt, and the picture follows that one, nearly alone."""
    with governed(tmp_path) as enforcement:
        sample(pack(model.clone()), clip, "a teapot", "a knife")
        sample(model, clip, "a teapot", "a knife")
    changed, plain = (entry["edits"][0]["rows"]["for"] for entry in enforcement.record.entries())
    assert (changed, plain) == ("all", "conditional")


@pytest.mark.parametrize("partly", [{"start_percent": 0.0, "end_percent": 0.1}, {"strength": 0.0}])
def test_where_no_positive_prompt_is_left_the_others_are_edited(
    model: Any, clip: Any, tmp_path: Path, partly: dict[str, float]
) -> None:
    with governed(tmp_path) as enforcement:
        positive = prompt(clip, "a teapot")
        positive[0][1].update(partly)
        tiny.sample(model, positive, prompt(clip, "a knife"), steps=4)
    (entry,) = enforcement.record.entries()
    assert entry["edits"][0]["rows"]["for"] == "all"


@pytest.mark.parametrize("pack", [leave_out, None])
def test_an_edit_of_guidance_is_no_hold_where_the_guidance_is_not_plain(
    model: Any, clip: Any, tmp_path: Path, pack: Any
) -> None:
    """At cfg 0.5 the other prompt leads, which an edit of guidance leaves alone."""
    how: dict[str, Any] = {"method": "SLD", "concept": WORDS, "scale": 2000}
    with governed(tmp_path, how) as enforcement, pytest.raises(Refused, match="is held by guidance"):
        sample(pack(model.clone()) if pack else model, clip, "a teapot", "a knife", cfg=4.0 if pack else 0.5)
    assert verdicts(enforcement) == ["refused"]


def test_weak_edits_of_the_graph_do_not_share_what_the_policys_take(model: Any, clip: Any, tmp_path: Path) -> None:
    """A dozen of nearly the same concept, which found together with it would leave it a thirteenth."""
    with governed(tmp_path):
        alone = sample(model, clip)
    mine = model
    for i in range(12):
        concept = concept_from_text(clip, f"knife {i}", "a knife" + "!" * i)
        mine = ConceptGuardCRE.execute(model=mine, concept=concept, strength=1e-6, floor=0.0).args[0]
    with governed(tmp_path) as enforcement:
        made = sample(mine, clip)
    free = sample(model, clip)
    assert (made - alone).norm() < 0.01 * (free - alone).norm()
    assert len(list(enforcement.record.entries())[-1]["edits"]) == 13


ADDING = {"separate": "none", "share": "share", "alike": "alike", "joint": "none"}


@pytest.mark.parametrize(("form", "evidence"), ADDING.items())
def test_an_edit_that_adds_against_a_sum_of_the_policys_is_refused(
    model: Any, clip: Any, tmp_path: Path, form: str, evidence: str
) -> None:
    """EIUP with a weight above 0 of nearly the same words would cancel the policy's; below 0, and beside a projection,
    it changes nothing of what that takes."""
    form = form if form == "joint" else "separate"
    how = {**EIUP, "weights": [-1.0], "form": form, "evidence": evidence}
    concept = concept_from_text(clip, "a knife of steel", "blade")

    def mine(weight: float) -> Any:
        given = {"concept": concept, "weight": weight, "form": form, "evidence": evidence}
        return ConceptGuardEIUP.execute(model=model, **given).args[0]

    with governed(tmp_path, how) as enforcement:
        with pytest.raises(Refused, match='edit of "blade" adds it, and this server takes "knife" away'):
            sample(mine(4.0), clip)
        sample(mine(-0.01), clip)
    assert verdicts(enforcement) == ["refused", "edited"]
    with governed(tmp_path) as enforcement:
        sample(mine(4.0), clip)
    assert verdicts(enforcement)[-1] == "edited"


def test_an_eiup_preset_holds_against_the_ways_that_a_graph_has(model: Any, clip: Any, tmp_path: Path) -> None:
    """Strength 0, less of it, a dozen that would share its softmax, wrappers dropped, the other prompt leading."""
    how = {**EIUP, "weights": [-1.0], "form": "joint"}
    with governed(tmp_path, how):
        alone = sample(model, clip)
    free, crowd = sample(model, clip), model
    text = (tmp_path / "mine.json").read_text()
    for i in range(12):
        other = concept_from_text(clip, f"knife {i}")
        crowd = ConceptGuardEIUP.execute(model=crowd, concept=other, weight=-1e-6, form="joint").args[0]
    weak = [
        *(ConceptGuardApplyPreset.execute(model, clip, text, s, other_models=True).args[0] for s in (0.0, 0.01)),
        packs.new_transformer_options(model),
        packs.new_wrappers(model),
    ]
    with governed(tmp_path, how) as enforcement:
        crowded = sample(crowd, clip)
        for each in weak:
            assert torch.equal(sample(each, clip), alone)
        sample(model, clip, "", "a knife", cfg=0.1)
        for pack in (packs.wrappers_dropped_while_sampling, packs.known_options_only):
            with pytest.raises(ValueError, match="ConceptGuard policy: "):
                sample(pack(model), clip)
    took = (sample(crowd, clip) - crowded).norm() / (free - alone).norm()
    assert took > 0.9  # of what it takes alone; shared with the dozen it would be 0.6
    lines = list(enforcement.record.entries())[1:]
    assert [line["verdict"] for line in lines] == ["edited"] * 6 + ["refused"] * 2
    assert lines[5]["edits"][0]["rows"]["for"] == "all"


def test_what_the_graph_draws_in_a_things_place_is_edited_after_it(model: Any, clip: Any, tmp_path: Path) -> None:
    """A teapot that is erased, and a knife drawn instead: the policy's edit has the last word."""
    concept = concept_from_text(clip, "teapot", "a teapot", instead="a knife")
    mine = ConceptGuardCRE.execute(model=model, concept=concept, floor=0.0).args[0]
    given: dict[Any, list[torch.Tensor]] = {}

    def observe(A: torch.Tensor, block: Any, **_: Any) -> None:
        given.setdefault(block, []).append(A.clone())

    with governed(tmp_path):
        mine.model_options["transformer_options"][OBSERVER] = observe
        sample(mine, clip, "a teapot", steps=1)
    assert given and all(len(each) == 2 and not torch.equal(*each) for each in given.values())


LATE = {**CRE, "start_percent": 0.9}


@pytest.mark.parametrize("sigmas", [None, [14.6, 0.4, 0.3, 0.0], [14.6, 0.05, 14.0, 0.03, 0.0]])
def test_a_schedule_that_hurries_through_a_window_is_edited_throughout(
    model: Any, clip: Any, tmp_path: Path, sigmas: list[float] | None
) -> None:
    """One step at all, one in the window of three, or again and again from the top."""
    early = {**CRE, "start_percent": 0.1, "end_percent": 0.6}
    with governed(tmp_path, LATE if sigmas is None else early) as enforcement:
        mine, latent = (prompt(clip, "a knife"), prompt(clip, "")), torch.zeros(1, 4, tiny.SIZE, tiny.SIZE)
        noise, levels = comfy.sample.prepare_noise(latent, 5), None if sigmas is None else torch.tensor(sigmas)
        how = dict(sigmas=levels, disable_pbar=True)
        comfy.sample.sample(model, noise, 1, 4.0, "euler", "normal", *mine, latent, **how)
    (entry,) = enforcement.record.entries()
    assert entry["edits"][0]["window"] == [0.0, 1.0]
    assert entry["edits"][0]["steps"]["acted"] == entry["edits"][0]["steps"]["all"] > 0


def test_an_ordinary_schedule_keeps_a_windows_steps(model: Any, clip: Any, tmp_path: Path) -> None:
    early = {**CRE, "start_percent": 0.1, "end_percent": 0.6}
    with governed(tmp_path, early) as enforcement:
        for scheduler in ("normal", "karras", "exponential", "sgm_uniform", "simple", "beta", "kl_optimal"):
            mine, latent = (prompt(clip, "a knife"), prompt(clip, "")), torch.zeros(1, 4, tiny.SIZE, tiny.SIZE)
            noise = comfy.sample.prepare_noise(latent, 5)
            comfy.sample.sample(model, noise, 10, 1.0, "euler", scheduler, *mine, latent, disable_pbar=True)
    windows = [entry["edits"][0]["window"] for entry in enforcement.record.entries()]
    assert windows == [[0.1, 0.6]] * 7


@pytest.mark.parametrize(
    "part",
    [
        {"latent": torch.ones(1, 4, tiny.SIZE, tiny.SIZE)},
        {"start_step": 1},
        {"last_step": 1},
    ],
)
def test_runs_with_a_picture_or_a_part_of_the_steps_are_edited_throughout(
    model: Any, clip: Any, tmp_path: Path, part: dict[str, Any]
) -> None:
    part = dict(part)
    latent = part.pop("latent", torch.zeros(1, 4, tiny.SIZE, tiny.SIZE))
    with governed(tmp_path, {**CRE, "start_percent": 0.4, "end_percent": 0.6}) as enforcement:
        mine = prompt(clip, "a knife"), prompt(clip, "")
        noise = comfy.sample.prepare_noise(latent, 5)
        comfy.sample.sample(model, noise, 4, 4.0, "euler", "normal", *mine, latent, disable_pbar=True, **part)
    (entry,) = enforcement.record.entries()
    assert [edit["window"] for edit in entry["edits"]] == [[0.0, 1.0]]
    assert all(edit["steps"]["acted"] == edit["steps"]["all"] > 0 for edit in entry["edits"])


@pytest.mark.parametrize(
    "key, value, led",
    [
        ("reference_latents", [torch.ones(1, 4, 8, 8)], True),
        ("clip_vision_output", object(), True),
        ("gligen", ("position", object(), []), True),
        ("control", object(), True),
        ("guidance", 3.5, False),
        ("area", (4, 4, 0, 0), False),
        ("mask", torch.ones(1, 8, 8), False),
        ("conditioning_llama3", torch.ones(1, 8, 8), False),
    ],
)
def test_whatever_is_not_text_or_a_number_counts_as_a_picture(key: str, value: Any, led: bool) -> None:
    assert led_by_picture({"cross_attn": tiny.tokens(1), "pooled_output": torch.ones(1, 8), key: value}) == led


def between_steps(model: Any, clip: Any, act: Callable[[], Any]) -> Any:
    """A run in the middle of which something happens."""
    latent = torch.zeros(1, 4, tiny.SIZE, tiny.SIZE)
    mine, noise = (prompt(clip, "a knife on a table"), prompt(clip, "")), comfy.sample.prepare_noise(latent, 5)
    how = {"callback": lambda *_: act(), "disable_pbar": True}
    return comfy.sample.sample(model, noise, 4, 4.0, "euler", "normal", *mine, latent, **how)


def test_a_policy_that_comes_on_in_the_middle_of_a_run_says_so(model: Any, clip: Any, tmp_path: Path) -> None:
    """The run began without its edits."""
    with governed(tmp_path) as enforcement:
        write(tmp_path, on=False)
        enforcement.refresh()
        with pytest.raises(Refused, match="turned on in the middle of this run"):
            between_steps(model, clip, lambda: (write(tmp_path), enforcement.refresh()))


def test_a_policy_that_changes_in_the_middle_of_a_run_counts_from_the_next(
    model: Any, clip: Any, tmp_path: Path
) -> None:
    """Also one that is turned off, or damaged: what began under it ends under it."""
    with governed(tmp_path) as enforcement:
        whole = sample(model, clip, steps=4)
        for change in (
            lambda: write(tmp_path, EIUP),
            lambda: write(tmp_path, on=False),
            lambda: (tmp_path / "policy.json").write_text("{"),
        ):
            write(tmp_path)
            enforcement.refresh()
            act = lambda change=change: (change(), enforcement.refresh())  # noqa: E731
            assert torch.equal(between_steps(model, clip, act), whole)
    assert [edit["method"] for entry in enforcement.record.entries() for edit in entry["edits"]] == ["CRE"] * 4


def test_pictures_can_be_refused_or_let_pass(model: Any, clip: Any, tmp_path: Path) -> None:
    latent = torch.ones(1, 4, tiny.SIZE, tiny.SIZE)

    def img2img() -> Any:
        noise = comfy.sample.prepare_noise(latent, 5)
        mine = prompt(clip, "a knife"), prompt(clip, "")
        return comfy.sample.sample(model, noise, 2, 4.0, "euler", "normal", *mine, latent, disable_pbar=True)

    plain = img2img()
    with governed(tmp_path, pictures="refuse"), pytest.raises(Refused, match="begins with a picture"):
        img2img()
    with governed(tmp_path, pictures="pass") as enforcement:
        assert torch.equal(img2img(), plain)
    assert verdicts(enforcement) == ["refused", "passed"]


def test_a_training_can_be_refused(model: Any, clip: Any, tmp_path: Path) -> None:
    with governed(tmp_path, training="refuse") as enforcement, pytest.raises(Refused, match="a training"):
        train_with(model, prompt(clip, "a knife"), torch.zeros(1, 4, 8, 8), lambda _: None)
    assert verdicts(enforcement) == ["refused"]


def test_a_training_passes_into_the_record(model: Any, clip: Any, tmp_path: Path) -> None:
    begun: list[bool] = []
    with governed(tmp_path) as enforcement:
        train_with(model, prompt(clip, "a knife"), torch.zeros(1, 4, 8, 8), lambda _: begun.append(True))
    (entry,) = enforcement.record.entries()
    assert begun and entry["verdict"] == "passed" and "a training" in entry["why"]


@pytest.mark.parametrize("tell", [["log", "user"], ["log"], ["user"], []])
def test_it_tells_whom_the_policy_says(
    model: Any, clip: Any, tmp_path: Path, tell: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with governed(tmp_path, tell=tell) as enforcement:
        sample(model, clip)
        assert ("ConceptGuard policy: edited" in caplog.text) == ("log" in tell)
        assert bool(enforcement.said) == ("user" in tell)  # type: ignore[attr-defined]
        with pytest.raises(Refused):
            tiny.sample(tiny.auraflow(), prompt(clip, "a knife"), prompt(clip, ""), steps=1)
    assert "ConceptGuard policy: refused" in caplog.text  # what went wrong is always told
    assert verdicts(enforcement) == ["edited", "refused"]


# --- models ----------------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_edited_are_refused(clip: Any, tmp_path: Path) -> None:
    with governed(tmp_path) as enforcement, pytest.raises(Refused, match="cannot edit AuraFlow"):
        tiny.sample(tiny.auraflow(), prompt(clip, "a knife"), prompt(clip, ""), steps=1)
    assert verdicts(enforcement) == ["refused"]


def test_models_without_a_rule_are_refused_or_pass_into_the_record(model: Any, clip: Any, tmp_path: Path) -> None:
    plain, rule = sample(model, clip), {"families": ["SDXL"]}
    with governed(tmp_path, rule=rule), pytest.raises(Refused, match="no rule of the policy covers"):
        sample(model, clip)
    with governed(tmp_path, rule=rule, others="pass") as enforcement:
        assert torch.equal(sample(model, clip), plain)
    refused, passed = enforcement.record.entries()
    assert (refused["verdict"], passed["verdict"]) == ("refused", "passed") and "no rule" in passed["why"]


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_damaged_file_refuses_and_a_mended_one_samples(model: Any, clip: Any, tmp_path: Path) -> None:
    with governed(tmp_path) as enforcement:
        good = (tmp_path / "policy.json").read_text()
        for damage in ("{", "", json.dumps({"on": True})):
            (tmp_path / "policy.json").write_text(damage)
            with pytest.raises(Refused, match='"policy.json" is damaged'):
                sample(model, clip)
        os.remove(tmp_path / "policy.json")
        with pytest.raises(Refused, match="it is not there"):
            sample(model, clip)
        (tmp_path / "policy.json").write_text(good)
        sample(model, clip)
        write(tmp_path, EIUP)
        sample(model, clip)
    entries = list(enforcement.record.entries())
    assert [entry["verdict"] for entry in entries] == ["refused"] * 4 + ["edited"] * 2
    assert [edit["method"] for entry in entries for edit in entry.get("edits", [])] == ["CRE", "EIUP"]


def test_without_its_record_there_is_no_picture(model: Any, clip: Any, tmp_path: Path) -> None:
    with governed(tmp_path):
        (tmp_path / "record").write_text("in the folder's place")
        with pytest.raises(Refused, match="the record cannot be written"):
            sample(model, clip)


# --- gates -----------------------------------------------------------------------------------------------------------

ASKED = {**CRE, "gate": {"kind": "prompt", "threshold": 0.999}}  # the very words: random encoders find all alike


def test_a_prompt_gate_asks_the_run_s_own_prompt(model: Any, clip: Any, tmp_path: Path) -> None:
    plain = sample(model, clip, "a teapot")
    with governed(tmp_path, ASKED) as enforcement:
        assert torch.equal(sample(model, clip, "a teapot"), plain)
        sample(model, clip, "blades")
    closed, opened = enforcement.record.entries()
    assert closed["verdict"] == "closed" and "edits" not in closed
    assert opened["edits"][0]["steps"]["acted"] == 2


def test_closed_gates_cost_nothing_but_time(model: Any, clip: Any, tmp_path: Path) -> None:
    """Three presets' edits, none of them installed: every bit as without, and the text encoder is not asked again."""
    edits = [{**ASKED, "concept": {"name": name, "phrases": [name]}} for name in ("a gun", "a sword", "a bomb")]
    mine = prompt(clip, "a teapot"), prompt(clip, "")
    plain = tiny.sample(model, *mine)
    with governed(tmp_path, *edits) as enforcement:
        mine = prompt(clip, "a teapot"), prompt(clip, "")
        stage, asked = clip.cond_stage_model, []
        handle = stage.register_forward_pre_hook(lambda *_: asked.append(1))
        inner = stage.encode_token_weights
        stage.encode_token_weights = lambda tokens: asked.append(1) or inner(tokens)
        try:
            assert torch.equal(tiny.sample(model, *mine), plain) and not asked
        finally:
            handle.remove()
            del stage.encode_token_weights
    (entry,) = enforcement.record.entries()
    assert entry["verdict"] == "closed" and "edits" not in entry


def test_a_prompt_gate_is_open_where_the_prompt_is_not_known_or_there_is_a_picture(
    model: Any, clip: Any, tmp_path: Path
) -> None:
    latent = torch.ones(1, 4, tiny.SIZE, tiny.SIZE)
    with governed(tmp_path, ASKED) as enforcement:
        mine = prompt(clip, "a teapot"), prompt(clip, "")
        tiny.sample(model, [[mine[0][0][0] * 0.9, mine[0][0][1]]], [[mine[1][0][0] * 1.1, mine[1][0][1]]])
        noise = comfy.sample.prepare_noise(latent, 5)
        comfy.sample.sample(model, noise, 2, 4.0, "euler", "normal", *mine, latent, disable_pbar=True)
    assert [entry["edits"][0]["steps"]["acted"] for entry in enforcement.record.entries()] == [2, 2]


def test_the_policys_presets_are_as_a_node_reads_them(clip: Any, tmp_path: Path) -> None:
    write(tmp_path)
    (spec,) = specs_of(read((tmp_path / "mine.json").read_text()), Given(clip))
    assert spec.source.name == "knife" and isinstance(tiny.sd1(), ModelPatcher)


# --- the page --------------------------------------------------------------------------------------------------------


def test_every_line_of_the_threat_model_names_a_test() -> None:
    root = Path(__file__).resolve().parent.parent
    page = (root / "docs" / "policy.md").read_text(encoding="utf-8")
    told = re.findall(r"`(test_\w+)`", page)
    tests = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").glob("test_policy*.py"))
    rows = page.split("## What it holds against")[1].split("## ")[0].count("\n| ") - 1
    assert len(told) > rows > 15 and not [name for name in told if f"def {name}(" not in tests]
