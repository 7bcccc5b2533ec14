"""A method that nobody has heard of, defined here alone, goes all the way through the pack by registering itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import documents
import pytest
import reference
import tiny
import torch
from torch import Tensor

from conceptguard.benchmarks.overhead import held
from conceptguard.editing.edits.method import Method, method, methods, register, unregister
from conceptguard.editing.edits.spec import Concept, EditSpec, Gate
from conceptguard.editing.engine.host import add_edit, edits_of, of_model
from conceptguard.editing.engine.plan import Plan
from conceptguard.editing.methods.found import Found
from conceptguard.editing.methods.tokens import TokenSets, solved_together
from conceptguard.editing.presets.apply import Given, specs_of
from conceptguard.editing.presets.document import packed, preset_class, read, write
from conceptguard.editing.presets.parts import ConceptEdit
from conceptguard.editing.presets.save import Saver
from conceptguard.editing.presets.words import described
from conceptguard.nodes.preset import ConceptGuardApplyPreset, ConceptGuardSavePreset
from conceptguard.nodes.preset_routes import report

# --- the whole method ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HalveOptions:
    share: float = 0.5
    baseline: str = "none"


class HalveEdit(ConceptEdit):
    method: Literal["halve"]
    share: float = 0.5


class Halve(Method):
    """A - s share At, so much of what the concept's prompt finds, whatever the picture shows."""

    name, label, order = "halving", "halve", 35
    source, options, document = Concept, HalveOptions, HalveEdit

    def complaint(self, spec: EditSpec) -> str | None:
        return None if 0 <= spec.options.share <= 1 else f"share is {spec.options.share}; give a number from 0 to 1"

    def idle(self, spec: EditSpec) -> bool:
        return spec.options.share == 0

    def token_sets(self, edits: Sequence[tuple[int, EditSpec]], device: torch.device) -> TokenSets:
        return TokenSets(solved=solved_together(self, edits, device))

    def taken(self, found: Found, s: Tensor, options: Any, note: Any = None) -> Tensor:
        return (s[..., None, None] * options.share * found.At.float()).sum(0)

    def to_document(self, spec: EditSpec, saver: Any, common: dict[str, Any]) -> HalveEdit:
        return HalveEdit(method="halve", concept=saver.concept(spec.source), share=spec.options.share, **common)

    def from_document(self, edit: HalveEdit, maker: Any) -> dict[str, Any]:
        return dict(source=maker.concept(edit.concept), options=HalveOptions(edit.share))

    def described(self, edit: HalveEdit) -> str:
        return f"Halves {edit.concept.said()}"


# ---------------------------------------------------------------------------------------------------------------------

CONCEPT = tiny.concept("knife", 100, phrases=2)
DOCUMENT = {**documents.DOCUMENT, "edits": [{"method": "halve", "concept": documents.WORDS, "share": 0.25}]}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(Halve())
    yield
    unregister("halving")


def spec(**changes: Any) -> EditSpec:
    return EditSpec("halving", **{"source": CONCEPT, "options": HalveOptions(), "node": "Toy", **changes})


def test_it_edits_as_its_formula_says(model: Any) -> None:
    with tiny.Recorder(model) as seen:
        tiny.sample(add_edit(model, spec(strength=0.8)), steps=1)
    for key, (call,) in seen.calls.items():
        q, k, v, out = (call[name][1] for name in ("q", "k", "v", "out"))
        expected = reference.attention(q, k, v, seen.heads(key))
        for phrase in CONCEPT.phrases:
            K, V = (seen.project(key, which, phrase.tokens[0]) for which in "kv")
            expected -= 0.8 * 0.5 * reference.attention(q, K, V, seen.heads(key))
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "off",
    [
        {"strength": 0.0},
        {"options": HalveOptions(0.0)},
        {"gate": Gate((0.0,))},
        {"start_percent": 0.5, "end_percent": 0.5},
    ],
    ids=str,
)
def test_off_is_bit_identical(model: Any, off: dict[str, Any]) -> None:
    assert torch.equal(tiny.sample(add_edit(model, spec(**off))), tiny.sample(model))


def test_it_is_checked() -> None:
    with pytest.raises(ValueError, match="Toy: share is 2; give a number from 0 to 1"):
        spec(options=HalveOptions(2))
    with pytest.raises(ValueError, match="Toy: the method 'halving' cannot do anything with Concept and CREOptions"):
        spec(options=tiny.CRE)


def test_it_has_its_place_among_the_others_whatever_the_order_of_nodes(model: Any) -> None:
    names = [each.name for each in methods()]
    assert names.index("erasure") < names.index("halving") < names.index("projection")
    others = EditSpec("projection", tiny.concept("c", 300), options=tiny.CRE, node="Test")
    one = add_edit(add_edit(model, spec()), others)
    two = add_edit(add_edit(model, others), spec())
    assert torch.equal(tiny.sample(one), tiny.sample(two))
    assert not torch.equal(tiny.sample(one), tiny.sample(add_edit(model, others)))


def test_what_it_costs_is_counted(model: Any) -> None:
    """Keys and values of its phrases, as of any other method's."""
    backbone, cpu = of_model(model, "Test"), torch.device("cpu")
    cre = replace(spec(), method="projection", options=replace(tiny.CRE, baseline="none"))
    assert held(Plan([spec()], backbone, cpu, torch.float32)) == held(Plan([cre], backbone, cpu, torch.float32)) > 0


def test_a_preset_holds_it(model: Any, clip: Any) -> None:
    text = json.dumps(DOCUMENT)
    preset = read(text)
    assert read(write(preset)) == preset and read(packed(preset)) == preset
    assert described(preset) == ['Halves "knife" (a knife; blades), through the whole sampling.']
    (made,) = specs_of(preset, Given(clip), 0.5, node="Test")
    assert made.options == HalveOptions(0.25) and made.strength == 0.5
    applied = ConceptGuardApplyPreset.execute(model, clip, text).args[0]
    saved = read(ConceptGuardSavePreset.execute(applied, clip, "Halved").args[0])
    assert saved.edits == preset.edits
    assert Saver(clip).edits(edits_of(applied)) == preset.edits


def test_the_panel_says_what_it_does() -> None:
    assert report(json.dumps(DOCUMENT))["does"] == ['Halves "knife" (a knife; blades), through the whole sampling.']


def test_an_unregistered_one_is_refused_everywhere() -> None:
    made = preset_class()
    unregister("halving")
    with pytest.raises(
        ValueError,
        match="preset: edits.0: there is no method 'halve' here, but .*; if a newer",
    ):
        read(json.dumps(DOCUMENT))
    with pytest.raises(ValueError, match="Toy: there is no method 'halving'"):
        spec()
    register(Halve())
    assert preset_class() is made  # the document's class is made once for the same methods


def test_twins_are_refused() -> None:
    with pytest.raises(ValueError, match="is like halve, which is there"):
        register(Halve())
    assert method("halving").label == "halve"
