"""The threat model of docs/policy.md through a live server's /prompt: its lines that no other server test sends, with
a pack of nodes that try to get round the edits (attackers.py)."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_graphs import Graph, Link
from PIL import Image
from test_policy_server import KNIVES, entries, lora_training, own
from test_policy_server import ended as until_ended
from test_preset_gates import JUDGE

from conceptguard.tools.host import Host, HostError

pytestmark = pytest.mark.server
TESTS = Path(__file__).resolve().parent
SEEDS = itertools.count(1)  # of prompts that the host must not answer from its cache
CRE: dict[str, Any] = KNIVES["edits"][0]  # type: ignore[index]
EIUP = {**CRE, "method": "EIUP", "weights": [-1.0]}
WORDS = ["a", "in", "on", "of", "or", "at", "to", "by", "it", "is", "be", "no"]  # that change little
ASKED = {**CRE, "gate": {"kind": "prompt", "threshold": 0.9}}
EARLY, LATE = {**CRE, "start_percent": 0.1, "end_percent": 0.6}, {**CRE, "start_percent": 0.9}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("base")
    pack = base / "custom_nodes" / "attackers"
    pack.mkdir(parents=True)
    source = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom attackers import NODE_CLASS_MAPPINGS\n"
    (pack / "__init__.py").write_text(source, encoding="utf-8")
    (base / "user" / "__concept_guard").mkdir(parents=True)
    (base / "user" / "__concept_guard" / "policy.json").write_text('{"on": true, "rules": []}')  # damaged, so far
    with Host(base=base) as running:
        yield running


def preset(*edits: dict[str, Any]) -> str:
    return json.dumps({**KNIVES, "edits": edits or [CRE]})


def rule(server: Host, *edits: dict[str, Any], on: bool = True, **policy: Any) -> None:
    """The policy from now on: read again as soon as it has changed."""
    (own(server) / "knives.json").write_text(preset(*edits), encoding="utf-8")
    text = json.dumps({"on": on, "rules": [{"presets": ["knives.json"]}], **policy})
    (own(server) / "policy.json").write_text(text, encoding="utf-8")


def new(server: Host) -> Graph:
    """Its prompts have spaces at their end, of which no tokens are made, as many as no other has: what was encoded
    while no policy was on is nobody's, and the host's cache has no place here."""
    g, number = Graph(server.get("/object_info")), next(SEEDS)
    for prompt in (g.positive, g.negative):
        g.nodes[prompt[0]]["inputs"]["text"] += " " * number
    return g


def drawn(server: Host, g: Graph, samples: Link) -> np.ndarray[Any, Any]:
    """The picture."""
    ((data, *_),) = server.images(server.run(g.ended(samples))).values()
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def refused(server: Host, g: Graph, samples: Link) -> str:
    """The policy's own words; there is no picture, and a line in the record says why."""
    with pytest.raises(HostError, match="ConceptGuard policy: ") as error:
        server.run(g.ended(samples))
    assert entries(server)[-1]["verdict"] == "refused" and "no text encoder is known" not in str(error.value)
    return str(error.value)


def last(server: Host) -> dict[str, Any]:
    """The newest line; all of its edits acted."""
    entry = entries(server)[-1]
    assert entry["verdict"] == "edited" and all(edit["steps"]["acted"] for edit in entry["edits"]), entry
    return entry


# --- edits that the graph brings, or takes off -----------------------------------------------------------------------


@pytest.mark.parametrize("edits", [(CRE,), (EIUP,)], ids=["CRE", "EIUP"])
def test_the_graphs_own_edits_neither_weaken_nor_double_the_policys(server: Host, edits: tuple[Any, ...]) -> None:
    """Pixel by pixel what the presets' node draws: alone, beside the same edits, at strength 0 or less of them, and
    behind nodes that drop a MODEL's options or wrappers."""
    seed = next(SEEDS)

    def sampled(strength: float | None, kind: str = "") -> np.ndarray[Any, Any]:
        g = new(server)
        if strength is not None:
            how = {"clip": g.clip, "preset": preset(*edits), "strength": strength}
            g.model = g.patched("ConceptGuardApplyPreset", **how)
        if kind:
            g.model = g.patched("AttackModel", way=kind)
        return drawn(server, g, g.ksampler(seed=seed, steps=3))

    rule(server, on=False)
    by_node, free = sampled(1.0), sampled(0.0)
    rule(server, *edits)
    assert (by_node != free).any()
    for strength, kind in ((None, ""), (0.01, ""), (0.5, ""), (None, "new_transformer_options"), (1.0, "new_wrappers")):
        assert (sampled(strength, kind) == by_node).all(), (strength, kind)
        assert len(last(server)["edits"]) == 1


MODELS = ["DeepCache", "known_options_only", "wrappers_dropped_while_sampling", "own_forward", "several_devices"]


@pytest.mark.parametrize("edit", [CRE, EIUP], ids=["CRE", "EIUP"])
@pytest.mark.parametrize("kind", MODELS)
def test_nodes_that_leave_edits_out_make_no_picture(server: Host, kind: str, edit: dict[str, Any]) -> None:
    rule(server, edit)
    g = new(server)
    refused(server, g, g.ksampler(model=g.patched("AttackModel", way=kind), seed=next(SEEDS)))


@pytest.mark.parametrize("kind", ["Copied", "Loop", "Two", "Nameless", "Within"])
def test_guiders_of_an_own_kind_are_edited_or_make_no_picture(server: Host, kind: str) -> None:
    rule(server)
    g = new(server)
    guider = g.add("AttackGuider", model=g.model, positive=g.positive, negative=g.negative, way=kind)
    samples = g.guided(guider, noise=g.add("RandomNoise", noise_seed=next(SEEDS)))
    before = len(entries(server))
    if kind == "Within":
        try:
            drawn(server, g, samples)
        except HostError as error:
            assert "ConceptGuard policy: " in str(error)
        assert "passed" not in {entry["verdict"] for entry in entries(server)[before:]}
    else:
        refused(server, g, samples)
    assert len(entries(server)) > before


def test_edits_of_the_graph_that_share_add_or_draw_it_do_not_cancel_the_policys(server: Host) -> None:
    """A dozen weak ones of nearly the same words; a knife drawn in a teapot's place; EIUP with a weight above 0."""
    rule(server, CRE)
    seed, g = next(SEEDS), new(server)
    alone = drawn(server, g, g.ksampler(seed=seed))
    g = new(server)
    for i in range(12):
        concept = g.add("ConceptGuardConcept", clip=g.clip, text=f"a kitchen knife {WORDS[i]}", name=f"knife {i}")
        g.model = g.patched("ConceptGuardCRE", concept=concept, strength=1e-6)
    crowd = drawn(server, g, g.ksampler(seed=seed))
    assert len(last(server)["edits"]) > 6 and np.abs(crowd - alone).mean() < 1
    g = new(server)
    concept = g.add("ConceptGuardConcept", clip=g.clip, text="a teapot", instead="a kitchen knife")
    g.model = g.patched("ConceptGuardCRE", concept=concept)
    drawn(server, g, g.ksampler(positive=g.said("a teapot" + " " * next(SEEDS)), seed=seed))
    assert {edit["source"] for edit in last(server)["edits"]} == {"a teapot", "knife"}
    rule(server, EIUP)
    g = new(server)
    concept = g.add("ConceptGuardConcept", clip=g.clip, text="a kitchen knife of steel")
    g.model = g.patched("ConceptGuardEIUP", concept=concept, weight=4.0)
    assert 'takes "knife" away by the same sum (EIUP)' in refused(server, g, g.ksampler(seed=seed))


# --- prompts that lead in other ways ---------------------------------------------------------------------------------


def swapped(g: Graph, **more: Any) -> dict[str, Any]:
    """The knife in the negative prompt."""
    return {"positive": g.said("a teapot" + " " * next(SEEDS)), "negative": g.positive, "seed": next(SEEDS), **more}


def patched(kind: str, **inputs: Any) -> Callable[[Graph], Link]:
    return lambda g: g.ksampler(**swapped(g, model=g.patched(kind, **inputs)))


def ends_early(g: Graph) -> Link:
    early = g.add(
        "ConditioningSetTimestepRange", conditioning=g.said("a teapot" + " " * next(SEEDS)), start=0.0, end=0.1
    )
    return g.ksampler(**swapped(g, positive=early, steps=4))


def weighs_nothing(g: Graph) -> Link:
    nothing = g.add("ConditioningSetAreaStrength", conditioning=g.said("a teapot" + " " * next(SEEDS)), strength=0.0)
    return g.ksampler(**swapped(g, positive=nothing))


LEADING: dict[str, Callable[[Graph], Link]] = {
    "cfg 0": lambda g: g.ksampler(**swapped(g, cfg=0.0)),
    "cfg below 1": lambda g: g.ksampler(**swapped(g, cfg=0.1)),
    "RescaleCFG": patched("RescaleCFG", multiplier=0.7),
    "instead of the guidance": patched("AttackModel", way="leave_out"),
    "before the guidance": patched("AttackModel", way="before"),
    "behind the guidance": patched("AttackModel", way="after"),
    "a positive that ends early": ends_early,
    "a positive that weighs nothing": weighs_nothing,
}


@pytest.mark.parametrize("edit", [CRE, EIUP], ids=["CRE", "EIUP"])
@pytest.mark.parametrize("how", LEADING)
def test_where_another_prompt_leads_all_are_edited(server: Host, how: str, edit: dict[str, Any]) -> None:
    rule(server, edit)
    g = new(server)
    drawn(server, g, LEADING[how](g))
    assert [edit["rows"]["for"] for edit in last(server)["edits"]] == ["all"]
    g = new(server)
    drawn(server, g, g.ksampler(seed=next(SEEDS)))
    assert [edit["rows"]["for"] for edit in last(server)["edits"]] == ["conditional"]


def test_a_preset_of_guidance_refuses_where_the_guidance_is_not_plain(server: Host) -> None:
    rule(server, {"method": "SLD", "concept": CRE["concept"], "scale": 2000})
    for how in ("cfg below 1", "behind the guidance"):
        g = new(server)
        assert "is held by guidance" in refused(server, g, LEADING[how](g))


def test_encodings_that_no_encoder_made_are_edited(server: Host) -> None:
    rule(server)
    g = new(server)
    both = {"conditioning_to": g.said("a cat" + " " * next(SEEDS)), "conditioning_from": g.positive}
    mixed = g.add("ConditioningAverage", **both, conditioning_to_strength=0.3)
    drawn(server, g, g.ksampler(positive=mixed, seed=next(SEEDS)))
    assert last(server)["edits"][0]["rows"]["for"] == "conditional"


# --- when -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("edit", "levels"), [(LATE, ""), (EARLY, "14.6,0.4,0.3,0"), (EARLY, "14.6,0.05,14.0,0.03,0")])
def test_schedules_that_hurry_through_a_window_are_edited_throughout(
    server: Host, edit: dict[str, Any], levels: str
) -> None:
    rule(server, edit)
    g, seed = new(server), next(SEEDS)
    sigmas = g.add("AttackSigmas", sigmas=levels) if levels else g.sigmas(1)
    drawn(server, g, g.custom(sigmas=sigmas, noise_seed=seed))
    (edit,) = last(server)["edits"]
    assert edit["window"] == [0.0, 1.0] and edit["steps"]["acted"] == edit["steps"]["all"] > 0


@pytest.mark.parametrize(
    "made",
    [
        lambda g: g.ksampler(latent_image=g.encoded(), denoise=0.6, seed=next(SEEDS), steps=3),
        lambda g: g.advanced(start_at_step=2, noise_seed=next(SEEDS)),
        lambda g: g.advanced(end_at_step=2, return_with_leftover_noise="enable", noise_seed=next(SEEDS)),
    ],
    ids=["img2img", "a late start", "an early end"],
)
def test_parts_of_the_steps_and_pictures_are_edited_throughout(server: Host, made: Callable[[Graph], Link]) -> None:
    rule(server, EARLY)
    g = new(server)
    drawn(server, g, made(g))
    assert [edit["window"] for edit in last(server)["edits"]] == [[0.0, 1.0]]


def test_pictures_and_trainings_are_refused_if_the_policy_says_so(server: Host) -> None:
    rule(server, pictures="refuse", training="refuse")
    g = new(server)
    assert "begins with a picture" in refused(server, g, g.ksampler(latent_image=g.encoded(), seed=next(SEEDS)))
    with pytest.raises(HostError, match="ConceptGuard policy: a training"):
        server.run(lora_training(server))


# --- gates ----------------------------------------------------------------------------------------------------------


def test_a_prompt_gate_closes_bit_by_bit_and_hears_each_prompt_that_may_lead(server: Host) -> None:
    seed, g = next(SEEDS), new(server)
    rule(server, on=False)
    plain = drawn(server, g, g.ksampler(positive=g.said("a blue teapot" + " " * next(SEEDS)), seed=seed, steps=3))
    rule(server, ASKED)
    g = new(server)
    nothing = g.patched("ConceptGuardApplyPreset", clip=g.clip, preset=preset(CRE), strength=0.0)  # another prompt
    made = drawn(
        server, g, g.ksampler(model=nothing, positive=g.said("a blue teapot" + " " * next(SEEDS)), seed=seed, steps=3)
    )
    assert (made == plain).all() and entries(server)[-1]["verdict"] == "closed"
    combined = lambda g: g.add(  # noqa: E731
        "ConditioningCombine", conditioning_1=g.said("a cat" + " " * next(SEEDS)), conditioning_2=g.positive
    )
    ways: list[Callable[[Graph], Link]] = [
        lambda g: g.ksampler(seed=next(SEEDS)),
        lambda g: g.ksampler(**swapped(g, cfg=0.1)),
        lambda g: g.ksampler(positive=combined(g), seed=next(SEEDS)),
        lambda g: g.ksampler(
            positive=g.said("a cat" + " " * next(SEEDS)), latent_image=g.encoded(), denoise=0.6, seed=next(SEEDS)
        ),
    ]
    for way in ways:
        g = new(server)
        drawn(server, g, way(g))
        last(server)


def test_an_image_gate_does_not_close_where_a_prompt_asks(server: Host) -> None:
    rule(server, {**CRE, "gate": {"kind": "image", "discriminator": JUDGE}})
    g = new(server)
    drawn(server, g, g.ksampler(latent_image=g.encoded(), denoise=0.6, seed=next(SEEDS)))
    last(server)


def test_an_in_flight_gate_looks_while_it_is_drawn_and_at_its_end(server: Host) -> None:
    """One that flags every picture opens; one that flags none leaves the run without an acting edit, and its line has
    the verdict."""
    flight = {"kind": "in-flight", "discriminator": JUDGE, "at_percent": 0.3, "decode": "preview"}
    rule(server, {**CRE, "gate": {**flight, "threshold": 0.0}})
    g = new(server)
    drawn(server, g, g.ksampler(seed=next(SEEDS), steps=4))
    assert last(server)["gates"]
    rule(server, {**CRE, "gate": {**flight, "threshold": 1.0}})
    g = new(server)
    drawn(server, g, g.ksampler(positive=g.said("a cat" + " " * next(SEEDS)), seed=next(SEEDS), steps=4))
    entry = entries(server)[-1]
    assert entry["verdict"] == "edited" and not entry["edits"][0]["steps"]["acted"] and entry["gates"]


# --- the policy itself -----------------------------------------------------------------------------------------------


def started(server: Host, g: Graph, samples: Link) -> str:
    """A prompt that is being sampled."""
    prompt_id = str(server.post("/prompt", {"prompt": g.ended(samples)})["prompt_id"])
    while not server.get("/queue")["queue_running"]:
        time.sleep(0.02)
    time.sleep(1.0)
    return prompt_id


def test_a_policy_that_changes_in_the_middle_of_a_run_counts_from_the_next(server: Host) -> None:
    rule(server)
    g = new(server)
    prompt_id = started(server, g, g.ksampler(seed=next(SEEDS), steps=60))
    other = {**CRE, "concept": {"name": "mug", "phrases": ["a beer mug"]}}
    rule(server, other)
    assert server.get("/concept_guard/policy")["on"]
    until_ended(server, prompt_id)
    assert [edit["source"] for edit in last(server)["edits"]] == ["knife"]
    g = new(server)
    drawn(server, g, g.ksampler(seed=next(SEEDS)))
    assert [edit["source"] for edit in last(server)["edits"]] == ["mug"]


def test_a_policy_that_comes_on_in_the_middle_of_a_run_ends_it(server: Host) -> None:
    """It is read again when a prompt comes in."""
    rule(server, on=False)
    g = new(server)
    drawn(server, g, g.ksampler(seed=next(SEEDS)))
    count, g = len(entries(server)), new(server)
    prompt_id = started(server, g, g.ksampler(seed=next(SEEDS), steps=400))
    rule(server)
    g = new(server)
    drawn(server, g, g.ksampler(seed=next(SEEDS)))
    first = server.get(f"/history/{prompt_id}")[prompt_id]
    assert first["status"]["status_str"] == "error" and "start it again" in json.dumps(first["status"])
    assert [entry["verdict"] for entry in entries(server)[count:]] == ["refused", "edited"]


def test_a_policy_that_is_gone_samples_nothing_until_it_is_mended(server: Host) -> None:
    rule(server)
    (own(server) / "policy.json").unlink()
    g = new(server)
    assert "it is not there" in refused(server, g, g.ksampler(seed=next(SEEDS)))
    rule(server)
    g = new(server)
    drawn(server, g, g.ksampler(seed=next(SEEDS)))
    last(server)


def test_several_architectures_in_one_session_have_the_rules_of_their_families(server: Host) -> None:
    """The demo model's UNet, its Flux and its NextDiT in turn, twice, on one server, under one policy."""
    mug = {**CRE, "concept": {"name": "mug", "phrases": ["a beer mug"]}}
    rule(server)
    (own(server) / "mugs.json").write_text(preset(mug), encoding="utf-8")
    families, seen = {}, []
    for turn in range(2):
        for name in ("unet", "flux", "lumina"):
            g = new(server)
            g.nodes[g.loader[0]]["inputs"]["architecture"] = name
            drawn(server, g, g.ksampler(seed=next(SEEDS), cfg=2.0))
            entry = last(server)
            families[name] = entry["family"]
            seen.append([edit["source"] for edit in entry["edits"]])
        if not turn:
            assert len(set(families.values())) == 3
            rules = [{"families": [families["flux"], families["lumina"]], "presets": ["mugs.json"]}]
            rules.append({"presets": ["knives.json"]})
            (own(server) / "policy.json").write_text(json.dumps({"on": True, "rules": rules}), encoding="utf-8")
    assert seen == [["knife"]] * 3 + [["knife"], ["mug"], ["mug"]]
