"""Gates: what a discriminator's confidence does to an edit, before and during sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from conceptguard.editing.edits.spec import Draw, EditSpec, Gate, InFlight, opened
from conceptguard.editing.engine.account import Account
from conceptguard.editing.engine.host import accounts_of, add_edit, edits_of
from conceptguard.nodes import NODES

STEPS = 6
HELP = Path(__file__).resolve().parent.parent / "web" / "docs"


def cre(model: Any, gate: Gate, **inputs: Any) -> Any:
    return add_edit(model, EditSpec("projection", tiny.concept(), options=tiny.CRE, gate=gate, node="Test", **inputs))


class Look:
    """A discriminator that is told what to say, at first and later, and remembers what it was shown."""

    def __init__(self, scores: list[float]) -> None:
        self.scores, self.later, self.seen = scores, scores, []  # type: ignore[var-annotated]

    def __call__(self, latents: Tensor, latent_format: Any) -> list[float]:
        self.seen.append(latents.clone())
        return self.scores if len(self.seen) == 1 else self.later


def flight(scores: list[float], at: float = 0.3, **options: Any) -> tuple[Gate, Look]:
    look = Look(scores)
    return Gate(inflight=InFlight("told", look, at, **options)), look


def sampled(model: Any, batch: int = 3, **options: Any) -> Tensor:
    return tiny.sample(model, batch=batch, steps=STEPS, **options)


def the_account(model: Any) -> Account:
    """Of its last run."""
    accounts = accounts_of(model)
    assert accounts is not None and (account := accounts.of("")) is not None
    return account


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_a_gate_rounds_or_scales() -> None:
    assert opened([0.2, 0.5, 0.9], 0.5) == (0.0, 1.0, 1.0)
    assert opened([0.2, 0.5, 0.9], 0.5, soft=True) == (0.0, 0.5, 0.9)
    assert opened([0.0], 0.0) == (1.0,)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_outside_0_to_1(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold is .*; give a number from 0"):
        opened([0.5], threshold)


@pytest.mark.parametrize("scores", [[], [math.nan], [1.5]])
def test_a_discriminator_that_gives_no_confidence(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="not a number from 0 to 1 for each image"):
        opened(scores, 0.5)


# --- in flight -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_gate_that_stays_closed_leaves_every_bit(model: Any, sampler: str, cfg: float) -> None:
    gate, look = flight([0.1, 0.2, 0.3], restart=True)
    edited, unedited = (sampled(m, sampler=sampler, cfg=cfg) for m in (cre(model, gate), model))
    assert torch.equal(edited, unedited) and len(look.seen) == 2  # and once more at the end


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m_sde", "dpm_fast"])
def test_with_a_restart_a_gate_looks_once_more_at_the_end(model: Any, sampler: str) -> None:
    """What takes shape later is edited from the first step as well; what is open by then stays so."""
    told: list[Any] = []
    gate, look = flight([0.9, 0.1, 0.2], restart=True, report=lambda *verdict: told.append(verdict))
    look.later = [0.0, 0.1, 0.8]
    edited = cre(model, gate)
    result, unedited = sampled(edited, sampler=sampler), sampled(model, sampler=sampler)
    assert torch.equal(result, sampled(cre(model, Gate((1.0, 0.0, 1.0))), sampler=sampler))
    assert torch.equal(result[1], unedited[1]) and not torch.equal(result[2], unedited[2])
    assert [opens for _, opens, left in told if not left] == [(1.0, 0.0, 0.0), (1.0, 0.0, 1.0)] and len(look.seen) == 3
    (told_at_last,) = the_account(edited).gates.values()
    assert told_at_last["restarts"] and told_at_last["step"] == STEPS and told_at_last["opens"] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("later", [[0.0, 0.1, 0.9], [0.9, 0.1, 0.2], [0.9, 0.1, 0.9]], ids=["late", "left", "both"])
def test_what_a_gate_still_sees_is_told(model: Any, later: list[float]) -> None:
    """In the finished pictures, whether it flagged them on the way or sees them only now; it ends all the same."""
    told: list[Any] = []
    gate, look = flight([0.9, 0.1, 0.2], restart=True, report=lambda *verdict: told.append(verdict))
    look.later = later
    edited = cre(model, gate)
    sampled(edited)
    (line,) = [line for _, line in the_account(edited).lines()]
    left = sum(score > 0.5 for score in later)
    assert line.endswith(f"; its gate sees it in {left} of 3 finished pictures")
    (document,) = the_account(edited).document()["gates"]
    assert document["finished"] == later and document["left"] == [score > 0.5 for score in later]
    assert told[-1] == (later, tuple(float(score > 0.5) for score in later), True)


def test_nothing_is_told_of_what_is_gone(model: Any) -> None:
    told: list[Any] = []
    gate, look = flight([0.9, 0.1, 0.2], restart=True, report=lambda *verdict: told.append(verdict))
    look.later = [0.2, 0.1, 0.2]
    edited = cre(model, gate)
    sampled(edited)
    (line,) = [line for _, line in the_account(edited).lines()]
    assert "finished" not in line and [left for _, _, left in told] == [False]


def test_what_a_gate_sees_only_where_another_edit_acts_is_edited_too(model: Any) -> None:
    """One gate opens for the finished picture, and the other for what is drawn when the run has begun again."""
    gates = []
    for name, scores in (("first", [0.1, 0.1, 0.9]), ("second", [0.1, 0.9, 0.2])):
        said = iter(scores)

        def look(latents: Tensor, latent_format: Any, said: Any = said) -> list[float]:
            return [next(said, 0.2)] * 3

        gates.append(Gate(inflight=InFlight(name, look, 0.3, restart=True)))

    def both(first: Gate, second: Gate) -> Any:
        other = EditSpec("projection", tiny.concept("axe", 300), options=tiny.CRE, gate=second, node="Test")
        return add_edit(cre(model, first), other)

    edited = both(*gates)
    assert torch.equal(sampled(edited), sampled(both(Gate(), Gate())))
    assert not any("finished" in line for _, line in the_account(edited).lines())


def test_an_image_that_the_edit_is_not_for_is_not_told(model: Any) -> None:
    gate, _ = flight([0.1, 0.9, 0.1], restart=True)
    for values, told in (((1.0, 1.0, 1.0), True), ((1.0, 0.0, 1.0), False)):
        edited = cre(model, replace(gate, values=values))
        sampled(edited)
        ((_, line),) = the_account(edited).lines()
        assert ("in 1 of 3 finished pictures" in line) == told


def test_without_a_restart_it_looks_once(model: Any) -> None:
    gate, look = flight([0.1, 0.1, 0.1])
    look.later = [0.9, 0.9, 0.9]
    assert torch.equal(sampled(cre(model, gate)), sampled(model)) and len(look.seen) == 1


def test_it_is_asked_once_a_run_about_the_predicted_clean_image(model: Any) -> None:
    gate, look = flight([0.9, 0.9, 0.9], at=0.5)
    predicted: dict[int, Tensor] = {}

    def see(step: int, denoised: Tensor, x: Tensor, steps: int) -> None:
        predicted[step] = denoised.clone()

    edited = cre(model, gate)
    sampled(edited, callback=see)
    sampled(edited)
    assert len(look.seen) == 2
    sampling = model.get_model_object("model_sampling")
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    due = next(i for i, sigma in enumerate(sigmas) if sigma <= sampling.percent_to_sigma(0.5))
    expected = model.model.process_latent_out(predicted[due])
    assert torch.equal(look.seen[0], expected)


def test_the_edit_begins_with_the_next_step(model: Any) -> None:
    gate, _ = flight([1.0, 1.0, 1.0], at=0.0)
    sampling = model.get_model_object("model_sampling")
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    t = [float(sampling.timestep(sigma)) for sigma in sigmas[:2]]
    after_the_first = 1 - sum(t) / 2 / 999
    expected = sampled(cre(model, Gate(), start_percent=after_the_first))
    assert torch.equal(sampled(cre(model, gate)), expected)


def test_a_restart_edits_from_the_first_step(model: Any) -> None:
    gate, look = flight([1.0, 1.0, 1.0], restart=True)
    for sampler in ("euler", "euler_ancestral", "dpmpp_2m_sde"):
        edited = sampled(cre(model, gate), sampler=sampler)
        assert torch.equal(edited, sampled(cre(model, Gate()), sampler=sampler)), sampler
    assert len(look.seen) == 6  # each time once more at the end


def test_no_restart_before_the_window_begins(model: Any) -> None:
    steps: list[int] = []
    gate, _ = flight([1.0, 1.0, 1.0], at=0.1, restart=True)
    edited = cre(model, gate, start_percent=0.6)
    result = sampled(edited, callback=lambda step, *_: steps.append(step))
    assert steps == list(range(STEPS))
    assert torch.equal(result, sampled(cre(model, Gate(), start_percent=0.6)))


@pytest.mark.parametrize("restart", [False, True])
def test_images_of_a_mixed_batch_are_decided_one_by_one(model: Any, restart: bool) -> None:
    mixed, all_on = (
        sampled(cre(model, flight(scores, restart=restart)[0])) for scores in ([0.9, 0.1, 0.8], [0.9, 0.9, 0.9])
    )
    unedited = sampled(model)
    assert torch.equal(mixed[1], unedited[1])
    for i in (0, 2):
        torch.testing.assert_close(mixed[i], all_on[i], rtol=1e-4, atol=1e-4)
        assert (mixed[i] - unedited[i]).abs().max() > 1e-2


def test_soft_is_a_strength_between(model: Any) -> None:
    soft, half = flight([0.5, 0.5, 0.5], soft=True, restart=True)[0], Gate((0.5, 0.5, 0.5))
    assert torch.equal(sampled(cre(model, soft)), sampled(cre(model, half)))


def test_its_verdict_is_told(model: Any) -> None:
    told: list[Any] = []
    gate, _ = flight([0.9, 0.1, 0.6], report=lambda *verdict: told.append(verdict))
    sampled(cre(cre(model, gate), gate, start_percent=0.2))
    assert told == [([0.9, 0.1, 0.6], (1.0, 0.0, 1.0), False)]


def test_two_gates_decide_apart(model: Any) -> None:
    a, b = flight([1.0] * 3, restart=True)[0], Gate(inflight=InFlight("other", Look([0.0] * 3), 0.5))
    both = sampled(cre(cre(model, a), b, strength=0.5))
    assert torch.equal(both, sampled(cre(model, Gate())))


@pytest.mark.parametrize("make", [tiny.sdxl, lambda: tiny.sd1(torch.bfloat16)], ids=["sdxl", "bf16"])
def test_other_models(make: Any) -> None:
    model = make()
    gate, _ = flight([0.0, 1.0], restart=True)
    mixed, unedited = sampled(cre(model, gate), batch=2), sampled(model, batch=2)
    assert torch.equal(mixed[0], unedited[0]) and not torch.equal(mixed[1], unedited[1])


def test_the_host_loads_what_the_gate_looks_with(model: Any) -> None:
    helper = tiny.sd1(seed=1)
    gate = Gate(inflight=InFlight("told", Look([0.0]), 0.3, models=(helper,)))
    edited = cre(cre(model, gate), gate)
    (found,) = edited.get_additional_models_with_key("concept_guard")
    assert found.is_clone(helper) and not model.get_nested_additional_models()
    assert edits_of(edited)[0].gate is gate


def test_nothing_of_a_run_is_left_after_an_error(model: Any) -> None:
    def broken(latents: Tensor, latent_format: Any) -> list[float]:
        raise RuntimeError("decoder")

    edited = cre(model, Gate(inflight=InFlight("broken", broken, 0.3)))
    with pytest.raises(RuntimeError, match="decoder"):
        sampled(edited)
    assert "concept_guard_run" not in edited.model_options["transformer_options"]
    assert torch.equal(sampled(model), sampled(tiny.sd1()))


def test_a_decision_about_another_number_of_images(model: Any) -> None:
    with pytest.raises(ValueError, match="Test: the gate decided about 2 images, but 3 are being sampled"):
        sampled(cre(model, flight([1.0, 1.0])[0]))
    with pytest.raises(ValueError, match="Test: the discriminator gave"):
        sampled(cre(model, flight([math.nan] * 3)[0]))


def test_a_gate_that_decides_when_the_edit_is_over(model: Any) -> None:
    with pytest.raises(ValueError, match=r"Test: the gate decides at 0.5, but the edit ends at 0.4; let the gate"):
        cre(model, flight([1.0], at=0.5)[0], end_percent=0.4)
    cre(model, flight([1.0], at=0.5, restart=True)[0], end_percent=0.4)
    with pytest.raises(ValueError, match="at_percent is 1; give a number from 0"):
        InFlight("never", Look([]), 1)


def test_a_conditioning_cannot_bring_it(model: Any) -> None:
    import comfy.hooks

    gate, _ = flight([1.0] * 3)
    (edit,) = edits_of(cre(model, gate))
    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.TransformerOptionsHook(tiny.hooked(edit), hook_scope=comfy.hooks.EnumHookScope.HookedOnly))
    for base in (model, cre(model, Gate(), strength=0.5)):
        with pytest.raises(ValueError, match="Test: a gate that decides in flight needs the edit on the MODEL"):
            sampled(base, positive=tiny.cond(1, hooks=group))


def test_a_fair_draw_behind_a_gate_in_flight() -> None:
    """The image that draws the direction gets it only if it is flagged."""
    gate = Gate(inflight=InFlight("told", Look([1.0, 0.0, 1.0, 0.0]), 0.0))
    verdict = (1.0, 0.0, 1.0, 0.0)
    draws = [Draw(gate.values, gate.inflight, Gate(gate.values), "seed", i, 2) for i in range(2)]
    shares = [draw.decided(verdict).per_image(4) for draw in draws]
    assert [sum(each) for each in zip(*shares, strict=True)] == list(verdict)
    assert all(draw.decided(verdict).inflight is None for draw in draws)


# --- the nodes' contract ---------------------------------------------------------------------------------------------

INPUTS = {
    "ConceptGuardImageGate": ["discriminator", "image", "threshold", "soft", "decides"],
    "ConceptGuardPromptGate": ["discriminator", "concept", "clip", "text", "threshold", "soft"],
    "ConceptGuardInFlightGate": ["discriminator", "vae", "at_percent", "threshold", "soft", "restart"],
    "ConceptGuardTrainDiscriminator": [
        *("name", "concept_images", "other_images", "clip_vision", "concept_folder", "other_folder"),
        *("false_positive_rate", "copies", "seed"),
    ],
    "ConceptGuardTrainPromptDiscriminator": [
        *("clip", "name", "concept_prompts", "other_prompts", "false_positive_rate", "seed"),
    ],
    "ConceptGuardSaveDiscriminator": ["discriminator", "filename_prefix"],
    "ConceptGuardLoadDiscriminator": ["file", "clip_vision", "clip"],
    "ConceptGuardLoadClassifier": ["classifier", "labels", "network"],
    "ConceptGuardCausalPeriod": [
        *("model", "concept", "discriminator", "positive", "negative", "vae", "latent", "seed", "steps", "cfg"),
        *("sampler_name", "scheduler", "delta", "search", "strength"),
    ],
}


@pytest.mark.parametrize("node_id", INPUTS)
def test_ids_and_inputs_are_never_renamed_or_reordered(node_id: str) -> None:
    schema = next(node.GET_SCHEMA() for node in NODES if node.GET_SCHEMA().node_id == node_id)
    assert [each.id for each in schema.inputs][: len(INPUTS[node_id])] == INPUTS[node_id]
    assert (HELP / f"{node_id}.md").is_file()
