"""AdaVD's formula on random tensors, its thresholds, and what the host's attention makes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import documents
import pytest
import tiny
import torch
from torch import Tensor

from conceptguard.editing.edits.spec import Concept, EditSpec, Gate, Phrase
from conceptguard.editing.engine.host import add_edit, edits_of
from conceptguard.editing.methods.adavd import METHOD, AdaVDOptions, Target, found, weights
from conceptguard.editing.presets.apply import Given, specs_of
from conceptguard.editing.presets.document import read, write
from conceptguard.editing.presets.save import Saver
from conceptguard.editing.presets.words import described
from conceptguard.nodes.adavd import ConceptGuardAdaVD
from conceptguard.nodes.concept import ConceptGuardConcept

PUBLISHED = AdaVDOptions("published", steepness=10.0, threshold=0.1)  # random tokens are never .93 alike
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow(v: Tensor, t: list[Tensor], s: list[float], options: AdaVDOptions, v0: Tensor | None = None) -> Tensor:
    """The paper's formula for the tokens of one row, one after the other. v: [L, C]; t: K times [C]."""
    basis: list[Tensor] = []
    for each in t:
        u = each.double()
        for other in basis:
            u = u - (each.double() @ other) / (other @ other) * other
        basis.append(u)
    out = v.double().clone()
    for j in range(len(v)):
        if j % 77 == 0:
            continue
        a = v[j].double() - (0 if v0 is None else v0.double())
        for k, u in enumerate(basis):
            cos = float(a.detach() @ t[k].detach().double() / (a.norm() * t[k].double().norm()).detach())
            delta = options.factor / (1 + math.exp(-options.steepness * (cos - options.threshold)))
            coefficient = a @ u / (u @ u)
            if options.mode == "auto":
                coefficient = max(coefficient, torch.zeros(()).double())
            out[j] -= s[k] * delta * coefficient * u
    return out


@pytest.mark.parametrize("mode", ["published", "auto"])
@pytest.mark.parametrize("targets", [1, 2, 3])
def test_it_is_the_formula(mode: str, targets: int) -> None:
    options = replace(PUBLISHED, mode=mode)
    v, t, s = random(1, 9, 12), random(targets, 12, seed=1), [1.0, 0.5, 2.0][:targets]
    t[1:] += t[0]  # as concepts are: not orthogonal
    v0 = random(12, seed=2) * 0.3 if mode == "auto" else torch.zeros(12)
    given = [Target(torch.zeros(4), each, options.threshold, k, options, v0) for k, each in enumerate(t)]
    w = weights(v, given, torch.tensor(s)[:, None])
    expected = slow(v[0], list(t), s, options, v0)
    torch.testing.assert_close((v - w @ t)[0, 1:].double(), expected[1:], rtol=1e-4, atol=1e-5)


def test_the_same_target_twice_is_taken_once() -> None:
    t = random(12, seed=1)
    one = [Target(torch.zeros(4), t, 0.1, 0, PUBLISHED, torch.zeros(12))]
    v = random(1, 9, 12)
    once, twice = (v - weights(v, one * n, torch.ones(n, 1)) @ t.expand(n, -1) for n in (1, 2))
    torch.testing.assert_close(once, twice)


def ordinary_concept(phrases: int = 2, own: tuple[int, ...] = (1, 2)) -> Concept:
    """Phrasings that share their own words' encodings, and ordinary prompts that do not."""
    empty, words = tiny.tokens(7), random(1, 5, tiny.WIDTH, seed=50)
    made = []
    for i in range(phrases):
        x = tiny.tokens(100 + i) * 0.2
        x[:, 0], x[:, 1:6] = empty[:, 0], words + 0.1 * random(1, 5, tiny.WIDTH, seed=60 + i)
        made.append(Phrase(f"knife {i}", x, own))
    return Concept("knife", tuple(made), empty, ordinary=tuple(0.2 * tiny.tokens(200 + i)[0] for i in range(4)))


def test_auto_finds_the_row_and_the_threshold_that_tell_best() -> None:
    """By the definition, one row, prompt and token after the other; own, end, some padding, the last."""
    concept, W = ordinary_concept(), random(24, tiny.WIDTH, seed=3)
    x0 = torch.stack([row for rows in concept.ordinary for row in rows]).mean(0)
    v0, rows = W @ x0, (1, 2, 3, 4, 11, 76)
    said = [[phrase.tokens[0, r] for r in rows] for phrase in concept.phrases]
    best = (-9.0, 0.0, x0)
    for row in (row for prompt in said for row in prompt):
        t = W @ row - v0

        def most(prompt: Any, t: Tensor = t) -> float:
            return max(float(torch.cosine_similarity(W @ x - v0, t, 0)) for x in prompt)

        p, n = min(map(most, said)), max(map(most, concept.ordinary))
        if p - n > best[0]:
            best = (p - n, (p + n) / 2, row - x0)
    e, mean, b = found(concept, lambda x: x @ W.T, CPU)
    assert best[0] > 0 and b == pytest.approx(best[1], abs=1e-5)
    torch.testing.assert_close(e, best[2])
    torch.testing.assert_close(mean, x0)


def test_what_is_kept_counts_as_ordinary() -> None:
    concept, W = ordinary_concept(), random(24, tiny.WIDTH, seed=3)
    near = replace(concept.phrases[0], tokens=concept.phrases[0].tokens * 1.01)
    assert found(replace(concept, keep=(near,)), lambda x: x @ W.T, CPU)[2] > found(concept, lambda x: x @ W.T, CPU)[2]


# --- through the host ------------------------------------------------------------------------------------------------


def spec(concept: Concept | None = None, options: AdaVDOptions = PUBLISHED, **changes: Any) -> EditSpec:
    return EditSpec("values", concept or ordinary_concept(), options=options, **{"node": "Test", **changes})


@pytest.mark.parametrize("length", [77, 154])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_attentions_values_are_the_formulas(family: str, batch: int, length: int) -> None:
    model = getattr(tiny, family)()
    concept = ordinary_concept(1)
    with tiny.Recorder(model) as seen:
        tiny.sample(add_edit(model, spec(concept, strength=0.8)), tiny.cond(1, length), steps=1, batch=batch)
    positive, negative = tiny.tokens(1, length)[0], tiny.tokens(2)[0]
    for key, (call,) in seen.calls.items():
        t = seen.project(key, "v", concept.phrases[0].tokens[0, 2:3])[0]
        expected = slow(seen.project(key, "v", positive), [t], [0.8], PUBLISHED)
        untouched = seen.project(key, "v", negative).repeat(length // 77, 1)
        for row in range(batch):
            torch.testing.assert_close(call["v"][batch + row].double(), expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(call["v"][row].double(), untouched, rtol=1e-3, atol=1e-3)
            plain = seen.project(key, "k", positive)
            torch.testing.assert_close(call["k"][batch + row].double(), plain, rtol=1e-3, atol=1e-3)


def test_auto_changes_a_prompt_that_says_the_concept_and_not_another(model: Any) -> None:
    concept = ordinary_concept()
    edited = add_edit(model, spec(concept, AdaVDOptions()))
    said = [[concept.phrases[1].tokens, {"pooled_output": torch.zeros(1, 1280)}]]
    other = [[0.2 * tiny.tokens(202), {"pooled_output": torch.zeros(1, 1280)}]]
    assert (tiny.sample(edited, said) - tiny.sample(model, said)).norm() > 1
    assert (tiny.sample(edited, other) - tiny.sample(model, other)).norm() < 1e-2


@pytest.mark.parametrize(
    "off",
    [
        {"strength": 0.0},
        {"gate": Gate((0.0,))},
        {"start_percent": 0.5, "end_percent": 0.5},
        {"options": replace(PUBLISHED, factor=0.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_off_is_bit_identical(model: Any, off: dict[str, Any], cfg: float) -> None:
    assert torch.equal(tiny.sample(add_edit(model, spec(**off)), cfg=cfg), tiny.sample(model, cfg=cfg))
    assert not torch.equal(tiny.sample(add_edit(model, spec()), cfg=cfg), tiny.sample(model, cfg=cfg))


def test_a_gate_closes_for_one_image_of_a_batch(model: Any) -> None:
    edited = tiny.sample(add_edit(model, spec(gate=Gate((0.0, 1.0)))), batch=2)
    plain = tiny.sample(model, batch=2)
    assert torch.equal(edited[0], plain[0]) and not torch.equal(edited[1], plain[1])


def test_the_order_of_nodes_makes_no_difference(model: Any) -> None:
    one, two = spec(), spec(replace(ordinary_concept(), name="bomb", phrases=tiny.concept("bomb", 300).phrases))
    cre = EditSpec("projection", tiny.concept("c", 400), options=tiny.CRE, node="Test")
    a = add_edit(add_edit(add_edit(model, one), two), cre)
    b = add_edit(add_edit(add_edit(model, cre), two), one)
    assert torch.equal(tiny.sample(a), tiny.sample(b))


def test_where_nothing_can_be_told_it_says_so(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    concept = ordinary_concept()
    blind = replace(concept, ordinary=tuple(phrase.tokens[0] for phrase in concept.phrases))
    with pytest.raises(
        ValueError, match='Test: none of 7 cross-attentions can tell "knife" from ordinary prompts; giv'
    ):
        tiny.sample(add_edit(model, spec(blind, AdaVDOptions())))
    told = replace(blind, name="half", ordinary=concept.ordinary)
    METHOD.heard(spec(told, AdaVDOptions()), 7, 7)
    assert not caplog.records
    with caplog.at_level("INFO"):
        METHOD.heard(spec(told, AdaVDOptions()), 4, 7)
    assert 'Test: 3 of 7 cross-attentions cannot tell "half" from ordinary prompts, and are left' in caplog.text


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"mode": "often"}, "mode is 'often'; choose one of auto, published"),
        ({"threshold": 1.5}, "threshold is 1.5; give a number from -1 to 1"),
        ({"steepness": -1.0}, "steepness is -1; give a number from 0 to 1000"),
        ({"factor": math.nan}, "factor is nan; give a number from 0 to 4"),
    ],
)
def test_bad_inputs_name_node_input_and_mend(model: Any, numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ConceptGuardAdaVD: {message}"):
        ConceptGuardAdaVD.execute(model, tiny.concept(), **numbers)


def test_what_it_cannot_edit_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="ConceptGuardAdaVD: cannot edit AuraFlow"):
        ConceptGuardAdaVD.execute(tiny.auraflow(), tiny.concept())
    with pytest.raises(ValueError, match='"knife" has no ordinary prompts to find a threshold with; give it neutral'):
        ConceptGuardAdaVD.execute(model, tiny.concept())
    assert len(edits_of(ConceptGuardAdaVD.execute(model, tiny.concept(), mode="published").args[0])) == 1


def test_a_preset_holds_it(model: Any, clip: Any) -> None:
    edit = {"method": "AdaVD", "concept": documents.WORDS, "mode": "published", "threshold": 0.5, "strength": 0.5}
    preset = read(write(read(write_of(edit))))
    assert described(preset) == [
        'Takes "knife" (a knife; blades) out of the prompt\'s values (AdaVD, threshold 0.5, strength 0.5), through the '
        "whole sampling."
    ]
    (made,) = specs_of(preset, Given(clip), node="Test")
    concept = ConceptGuardConcept.execute(clip, "a knife\nblades", "knife").args[0]
    by_hand = ConceptGuardAdaVD.execute(model, concept, 0.5, mode="published", threshold=0.5).args[0]
    assert made.options == edits_of(by_hand)[0].options
    assert torch.equal(tiny.sample(by_hand), tiny.sample(add_edit(model, made)))
    assert Saver(clip).edits(edits_of(by_hand)) == preset.edits


def write_of(edit: dict[str, Any]) -> str:
    import json

    return json.dumps({**documents.DOCUMENT, "edits": [edit]})
