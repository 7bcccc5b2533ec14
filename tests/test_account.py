"""The account of a run: what it counts is what happened, and it is told."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import comfy.controlnet
import comfy.samplers
import foreign
import pytest
import reference
import tiny
import torch
from foreign_rows import tiled
from test_conditional import guided
from torch import Tensor

from conceptguard.editing.edits.spec import Concept, Direction, EditSpec, Gate, InFlight, PromptTokens
from conceptguard.editing.engine.account import LISTENERS, Account
from conceptguard.editing.engine.conds import reads
from conceptguard.editing.engine.host import accounts_of, add_edit
from conceptguard.editing.methods.cre import DEFAULTS, CREOptions
from conceptguard.editing.methods.eiup import EIUPOptions

FOUND = DEFAULTS  # random weights find something at about half of the positions


def cre(model: Any, concept: Concept | None = None, options: CREOptions = tiny.CRE, **inputs: Any) -> Any:
    return add_edit(model, EditSpec("projection", concept or tiny.concept(), options=options, node="Test", **inputs))


def account(model: Any, **run: Any) -> Account:
    tiny.sample(model, **run)
    return last(model)


def last(model: Any) -> Account:
    accounts = accounts_of(model)
    assert accounts is not None
    found = accounts.of("")
    assert found is not None
    return found


def entry(model: Any, **run: Any) -> Any:
    (only,) = account(model, **run).entries.values()
    return only


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_an_edit_that_acts_everywhere(model: Any) -> None:
    found = account(cre(model), steps=4, batch=2)
    (only,) = found.entries.values()
    assert (found.steps, only.due, only.acted) == (4, {0, 1, 2, 3}, {0, 1, 2, 3})
    assert list(only.reached) == tiny.SD1_BLOCKS and not only.missed
    assert (only.edited, only.seen) == (8, 16)  # two of four rows in each of four calls
    assert only.found is None and found.applied
    assert only.line(4) == "acted in 4 of 4 steps, 7 of 7 blocks"
    assert found.prompts == {"positive": 8, "negative": 8} and found.edited == {"positive"}


@pytest.mark.parametrize(
    "spec",
    [
        EditSpec("direction", Direction("d", torch.ones(1, tiny.WIDTH)), node="Test", blocks="middle,output"),
        EditSpec(
            "prompt", PromptTokens("p", tiny.tokens(60, 4), tiny.tokens(61, 4)), node="Test", blocks="middle,output"
        ),
        EditSpec("erasure", tiny.concept(), options=EIUPOptions("joint"), node="Test", blocks="middle,output"),
        EditSpec("erasure", tiny.concept(), options=EIUPOptions(), node="Test", blocks="middle,output"),
    ],
    ids=lambda spec: f"{spec.method} {getattr(spec.options, 'form', '')}",
)
def test_every_method_has_an_account(model: Any, spec: EditSpec) -> None:
    only = entry(add_edit(model, spec), steps=2)
    assert list(only.reached) == [key for key in tiny.SD1_BLOCKS if key[0] != "input"]
    assert only.line(2) == "acted in 2 of 2 steps, 5 of 5 blocks"


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "uni_pc", "dpmpp_2m_sde", "lcm"])
def test_steps_are_the_schedules(model: Any, sampler: str) -> None:
    """Also where the sampler calls between them."""
    found = account(cre(model, start_percent=0.3), steps=6, sampler=sampler)
    (only,) = found.entries.values()
    assert found.steps == 6 and max(only.acted) == 5 and only.acted == only.due and 0 < len(only.due) < 6


def where_found(seen: tiny.Recorder, call: dict[str, Tensor], key: Any, row: int, floor: float) -> Tensor:
    """The positions at which one row's output is like the concept, slowly."""
    h, steer = seen.heads(key), tiny.concept().phrases[0].tokens[0]
    neutral = tiny.concept().baseline[0]  # type: ignore[index]
    A = reference.attention(*(call[name][row] for name in "qkv"), h)
    At, A0 = (
        reference.attention(call["q"][row], seen.project(key, "k", tokens), seen.project(key, "v", tokens), h)
        for tokens in (steer, neutral)
    )
    return torch.cosine_similarity(A - A0, At - A0, -1) >= floor


@pytest.mark.parametrize("options", [FOUND, EIUPOptions("separate", (-1.0,), "alike")])
def test_the_share_of_positions(model: Any, options: Any) -> None:
    method = "projection" if isinstance(options, CREOptions) else "erasure"
    edited = add_edit(model, EditSpec(method, tiny.concept(), options=options, node="Test"))
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, batch=2, steps=2)
    (only,) = last(edited).entries.values()
    calls = [(key, call) for key, calls in seen.calls.items() for call in calls]
    counted = [where_found(seen, call, key, row, FOUND.floor) for key, call in calls for row in (2, 3)]
    every = torch.cat(counted).double().mean()
    assert 0.02 < every < 0.98
    assert only.found == pytest.approx(float(every), abs=2e-3)
    assert f"found in {100 * only.found:.0f} % of positions" in only.line(2)
    heat = only.heat(2, tiny.SIZE, tiny.SIZE)
    assert heat.shape == (2, tiny.SIZE, tiny.SIZE) and 0 < heat.mean() < 1


def of_two_edits(model: Any, **run: Any) -> Account:
    gun = tiny.concept("gun", 200, phrases=3)
    return account(cre(cre(model, options=FOUND, gate=Gate((0.0, 1.0))), gun, replace(FOUND, width="head")), **run)


def test_findings_are_added_up_once_a_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are the same numbers as those of every call added to the ones before it; of a large model, some calls at a
    time."""
    waiting: list[int] = []
    add_up = Account._add_up

    def counted(self: Account) -> None:
        waiting.append(len(self._held))
        add_up(self)
        assert not self._held and not self._numbers

    monkeypatch.setattr(Account, "_add_up", counted)
    once = of_two_edits(model, batch=2, steps=6)
    assert waiting == [6]
    for held, expected in ((0, [1] * 6 + [0]), (2**14, None)):
        waiting.clear()
        monkeypatch.setattr("conceptguard.editing.engine.account.HELD", held)
        others = of_two_edits(model, batch=2, steps=6)
        assert waiting == expected or (expected is None and 1 < max(waiting) < 6 and sum(waiting) == 6)
        for one, other in zip(once.entries.values(), others.entries.values(), strict=True):
            assert one.sums.keys() == other.sums.keys() and one.found == other.found and 0 < one.found < 1
            assert all(torch.equal(x, other.sums[size]) for size, x in one.sums.items())
            assert all(torch.equal(n, other.counts[size]) for size, n in one.counts.items())


def test_each_image_has_its_own_map(model: Any) -> None:
    only = entry(cre(model, options=FOUND, gate=Gate((0.0, 1.0))), batch=2, steps=1)
    heat = only.heat(2, tiny.SIZE, tiny.SIZE)
    assert not heat[0].any() and heat[1].any() and only.edited == 1


def test_tiles_are_counted_and_have_no_map(model: Any) -> None:
    only = entry(tiled(cre(model, options=FOUND), 2), steps=1)
    assert only.edited == 4 and 0 < only.found < 1  # two tiles in each of two calls
    assert torch.equal(only.heat(1, 4, 4), torch.full((1, 4, 4), only.found))


def test_steps_that_a_cache_leaves_out_are_told(model: Any) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode

    cached = EasyCacheNode.execute(cre(model), 3.0, 0.1, 0.9, False).args[0]
    only = entry(cached, steps=8)
    left = len(only.due - only.acted)
    assert len(only.due) == 8 and 0 < left < 8
    assert f"acted in {8 - left} of 8 steps, 7 of 7 blocks ({left} more step" in only.line(8)


@pytest.mark.parametrize("lazy", [False, True], ids=["EasyCache", "LazyCache"])
@pytest.mark.parametrize("brought", ["a ControlNet", "a mask to paint in"])
def test_steps_that_a_cache_leaves_out_beside_a_picture(model: Any, brought: str, lazy: bool) -> None:
    """The steps that are made are edited; at strength 0 the picture is that of the cache and the rest alone."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    def made(m: Any) -> Tensor:
        cached = (LazyCacheNode if lazy else EasyCacheNode).execute(m, 3.0, 0.1, 0.9, False).args[0]
        if brought == "a ControlNet":
            controlled = tiny.cond(1, control=foreign.control_net(), control_apply_to_uncond=True)
            return tiny.sample(cached, controlled, steps=8)
        return tiny.sample(cached, steps=8, noise_mask=torch.ones(1, tiny.SIZE, tiny.SIZE).triu())

    edited = cre(model)
    assert not torch.equal(made(edited), made(model))
    (only,) = last(edited).entries.values()
    assert len(only.due) == 8 and 0 < len(only.acted) < 8 and not only.missed
    assert torch.equal(made(cre(model, strength=0.0)), made(model))


def test_several_edits_have_their_own(model: Any) -> None:
    both = cre(cre(model, options=FOUND, blocks="middle"), tiny.concept("gun", 200), FOUND, end_percent=0.5)
    found = account(both, steps=4)
    knife, gun = found.entries.values()
    assert (len(knife.reached), len(knife.acted)) == (1, 4) and (len(gun.reached), len(gun.acted)) == (7, 2)
    assert knife.found != gun.found


# --- what is worth a word --------------------------------------------------------------------------------------------


def test_what_finds_nothing_says_so(model: Any) -> None:
    only = entry(cre(model, options=replace(FOUND, floor=1.0)))
    assert 'found in 0 % of positions: nothing in these pictures is like "knife". If they show it' in only.line(2)


def test_a_window_without_a_step_says_so(model: Any) -> None:
    found = account(cre(model, start_percent=0.51, end_percent=0.52), steps=4)
    (only,) = found.entries.values()
    assert only.line(4) == "did not act: none of 4 steps lies between 0.51 and 0.52: they lie from 0 to 1"
    assert found.applied


@pytest.mark.parametrize(
    ("inputs", "why"),
    [({"strength": 0.0}, "nothing to do"), ({"gate": Gate((0.0,))}, "the gate is closed")],
)
def test_what_is_off_says_so(model: Any, inputs: dict[str, Any], why: str) -> None:
    found = account(cre(model, **inputs))
    (only,) = found.entries.values()
    assert only.line(2) == f"off: {why}" and found.applied


def test_an_unknown_prompt_is_counted(model: Any) -> None:
    """The old Perp-Neg's own: it is in no guider's list."""
    from comfy_extras.nodes_perpneg import PerpNeg

    found = account(PerpNeg.execute(cre(model), tiny.cond(3), 1.0).args[0], steps=2)
    assert found.prompts == {"positive": 2, "negative": 2, "unnamed": 2} and found.edited == {"positive"}
    ((_, line),) = found.lines()
    assert line.endswith("7 of 7 blocks; left alone 2 rows of prompts that the guider does not name")


def test_what_reads_the_prompt_past_the_attentions_is_told(model: Any) -> None:
    """A ControlNet has attentions of its own, GLIGEN's boxes words; an adapter of pictures reads no text."""
    control, adapter = foreign.control_net(), comfy.controlnet.T2IAdapter.__new__(comfy.controlnet.T2IAdapter)
    behind = foreign.control_net()
    adapter.previous_controlnet = behind
    assert reads(control) and reads(adapter)
    adapter.previous_controlnet = None
    assert not reads(adapter)
    widths = tuple(block.attn2.to_q.in_features for block in tiny.Recorder(model).blocks.values())
    boxes, edited = foreign.gligen(widths), cre(model)
    for brings, said in (
        ({"control": control, "control_apply_to_uncond": True}, "; a ControlNet reads the prompt as it is"),
        ({"gligen": boxes}, "; what GLIGEN's boxes say is read as it is"),
        ({}, ""),
    ):
        tiny.sample(edited, tiny.cond(1, **brings))
        assert [line for _, line in last(edited).lines()] == [f"acted in 2 of 2 steps, 7 of 7 blocks{said}"]
        assert last(edited).document()["edits"][0]["said"] == f"acted in 2 of 2 steps, 7 of 7 blocks{said}"
        tiny.sample(edited, tiny.cond(1), tiny.cond(2, **{k: v for k, v in brings.items() if k == "gligen"}))
        assert [line for _, line in last(edited).lines()] == ["acted in 2 of 2 steps, 7 of 7 blocks"]


def test_no_positive_prompt_is_an_error(model: Any) -> None:
    class Backwards(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = {}, seed: Any = None) -> Tensor:  # noqa: B006
            conds = [self.conds["negative"]]
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)[0]

    guider = Backwards(cre(model))
    guider.set_conds(tiny.cond(1), tiny.cond(2))
    with pytest.raises(ValueError, match="Test: the edit was not applied: it found no prompt .* negative alone"):
        guided(guider, steps=2)


# --- where it goes ---------------------------------------------------------------------------------------------------


def test_it_is_told_to_the_node_the_log_and_whoever_listens(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Any] = []
    LISTENERS.append(heard.append)
    try:
        with caplog.at_level(logging.INFO):
            edited = cre(model, report=heard.append)
            tiny.sample(edited)
    finally:
        LISTENERS.remove(heard.append)
    line = "acted in 2 of 2 steps, 7 of 7 blocks"
    assert heard == [line, last(edited)]
    assert [r.getMessage() for r in caplog.records if "acted" in r.getMessage()] == [f'Test: "knife" {line}']


def test_as_json(model: Any) -> None:
    found = account(cre(model, options=FOUND), steps=2)
    document = json.loads(json.dumps(found.document()))
    (edit,) = document["edits"]
    assert document["applied"] and document["steps"] == 2 and document["prompts"]["positive"]["edited"]
    assert edit["steps"] == {"all": 2, "due": 2, "acted": 2} and edit["blocks"] == {"named": 7, "reached": 7}
    assert edit["rows"] == {"edited": 2, "seen": 4, "for": "conditional"} and 0 < edit["found"] < 1


def test_the_account_of_a_picture_is_that_of_its_run(model: Any) -> None:
    from conceptguard.editing.engine.host import digest_of

    edited = cre(model)
    pictures = [tiny.sample(edited, steps=steps) for steps in (1, 2, 3)]
    accounts = accounts_of(edited)
    assert accounts is not None and accounts_of(model) is None
    assert [accounts.of(digest_of(each)).steps for each in pictures] == [1, 2, 3]  # type: ignore[union-attr]
    assert accounts.of("of no run").steps == 3  # type: ignore[union-attr]
    for steps in range(20):
        tiny.sample(edited, steps=1 + steps % 2)
    assert len(accounts.runs) <= 8


def test_nothing_of_it_stays_on_the_device_or_in_the_graph(model: Any) -> None:
    only = entry(cre(model, options=FOUND))
    assert only.sums and all(x.device.type == "cpu" for x in (*only.sums.values(), *only.counts.values()))


# --- gates -----------------------------------------------------------------------------------------------------------


def flight(scores: list[float], at_percent: float = 0.3, restart: bool = False, looks: list[Any] | None = None) -> Gate:
    def look(latents: Tensor, latent_format: Any) -> list[float]:
        if looks is not None:
            looks.append(latents)
        return scores

    return Gate(inflight=InFlight("test", look, at_percent, restart=restart))


@pytest.mark.parametrize("at_percent", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
def test_with_a_restart_a_gate_decides_in_time(model: Any, steps: int, at_percent: float) -> None:
    edited = cre(model, gate=flight([1.0], at_percent, restart=True))
    assert torch.equal(tiny.sample(edited, steps=steps), tiny.sample(cre(model), steps=steps))
    found = last(edited)
    (only,) = found.entries.values()
    (gate,) = found.gates.values()
    assert len(only.acted) == steps and gate["restarts"] and gate["opens"] == [1.0]


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_without_one_it_leaves_a_step_to_edit(model: Any, steps: int) -> None:
    only = entry(cre(model, gate=flight([1.0], 0.9)), steps=steps)
    assert only.acted == {steps - 1}


def test_without_one_a_single_step_is_an_error(model: Any) -> None:
    with pytest.raises(ValueError, match="Test: its gate decides after a step, .* turn on the gate's restart"):
        tiny.sample(cre(model, gate=flight([1.0])), steps=1)


def test_a_gate_that_flags_nothing(model: Any) -> None:
    found = account(cre(model, gate=flight([0.0])), steps=4)
    (only,) = found.entries.values()
    assert only.line(4) == "did not act: its gate flagged no image" and found.applied
    (gate,) = found.gates.values()
    assert gate["scores"] == [0.0] and gate["opens"] == [0.0] and not gate["restarts"]


def part(model: Any, latent: Tensor, noise: Tensor, **steps: Any) -> Tensor:
    import comfy.sample

    conds = tiny.cond(1), tiny.cond(2)
    return comfy.sample.sample(model, noise, 6, 4.0, "euler", "normal", *conds, latent, disable_pbar=True, **steps)


@pytest.mark.parametrize("restart", [False, True])
def test_a_decision_holds_in_the_next_sampler(model: Any, restart: bool) -> None:
    """KSamplerAdvanced twice: the second one begins with the edited latents of the first, where nothing is left to
    see."""
    scores, looks = [1.0], []
    edited = cre(model, gate=flight(scores, 0.2, restart, looks))
    zeros = torch.zeros(1, 4, tiny.SIZE, tiny.SIZE)
    noise = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(5))
    first = part(edited, zeros, noise, start_step=0, last_step=3)
    scores[0] = 0.0
    part(edited, first, zeros, disable_noise=True, start_step=3, last_step=6)
    assert len(looks) == 2 + restart  # and at the finished picture
    assert len(last(edited).entries[next(iter(last(edited).entries))].acted) == 3
    part(edited, first + 1, zeros, disable_noise=True, start_step=3, last_step=6)  # other latents: anew
    assert not last(edited).entries[next(iter(last(edited).entries))].acted


@pytest.mark.parametrize("lazy", [False, True])
def test_a_restart_beside_the_hosts_caches(model: Any, lazy: bool) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    def cached(m: Any) -> Any:
        return (LazyCacheNode if lazy else EasyCacheNode).execute(m, 0.2, 0.3, 0.9, False).args[0]

    gated = cre(model, gate=flight([1.0], 0.5, restart=True))
    for order in (cached(gated), cre(cached(model), gate=flight([1.0], 0.5, restart=True))):
        assert torch.equal(tiny.sample(order, steps=8), tiny.sample(cached(cre(model)), steps=8))
