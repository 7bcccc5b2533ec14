"""ProtoRe: CRE's projection with the mean of the phrasings in their place."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import documents
import pytest
import reference
import tiny
import torch

from conceptguard.editing.edits.spec import Concept, EditSpec, Gate, Phrase
from conceptguard.editing.engine.host import add_edit, edits_of
from conceptguard.editing.methods.protore import options_of
from conceptguard.editing.presets.apply import Given, specs_of
from conceptguard.editing.presets.document import read, write
from conceptguard.editing.presets.save import Saver
from conceptguard.editing.presets.words import described
from conceptguard.nodes.protore import ConceptGuardProtoRe

CONCEPT = tiny.concept(phrases=3)


def spec(**changes: Any) -> EditSpec:
    options = options_of("neutral", 0.0)  # random weights find nothing alike
    return EditSpec("prototype", **{"source": CONCEPT, "options": options, "node": "Test", **changes})


@pytest.mark.parametrize("length", [77, 154])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("baseline", ["none", "neutral"])
def test_it_is_the_projection_on_the_prototype(family: str, batch: int, length: int, baseline: str) -> None:
    model = getattr(tiny, family)()
    edited = add_edit(model, spec(strength=0.8, options=options_of(baseline, 0.0)))
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, tiny.cond(1, length), steps=1, batch=batch)
    mean = sum(phrase.tokens[0].double() for phrase in CONCEPT.phrases) / 3
    assert CONCEPT.empty is not None
    for key, (call,) in seen.calls.items():
        heads = seen.heads(key)
        for row in range(batch, 2 * batch):
            q, k, v, out = (call[name][row] for name in ("q", "k", "v", "out"))
            A = reference.attention(q, k, v, heads)
            At, A0 = (
                reference.attention(q, *(seen.project(key, which, text) for which in "kv"), heads)
                for text in (mean, CONCEPT.empty[0])
            )
            expected = reference.cre(A, [At], [0.8], 1, True, False, A0 if baseline == "neutral" else None)
            torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "off", [{"strength": 0.0}, {"gate": Gate((0.0,))}, {"start_percent": 0.5, "end_percent": 0.5}], ids=str
)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_off_is_bit_identical(model: Any, off: dict[str, Any], cfg: float) -> None:
    assert torch.equal(tiny.sample(add_edit(model, spec(**off)), cfg=cfg), tiny.sample(model, cfg=cfg))
    assert not torch.equal(tiny.sample(add_edit(model, spec()), cfg=cfg), tiny.sample(model, cfg=cfg))


def test_what_it_cannot_edit_is_refused(model: Any) -> None:
    longer = Phrase("long", tiny.tokens(5, 154), (1,))
    mixed = Concept("mixed", (*CONCEPT.phrases, longer), CONCEPT.empty)
    with pytest.raises(ValueError, match='ConceptGuardProtoRe: concept "mixed" mixes phrases of several lengths; keep'):
        ConceptGuardProtoRe.execute(model, mixed)
    with pytest.raises(ValueError, match="has nothing neutral to be compared with"):
        ConceptGuardProtoRe.execute(model, replace(CONCEPT, empty=None))
    with pytest.raises(ValueError, match="ConceptGuardProtoRe: floor is 2; give a number from 0 to 1"):
        ConceptGuardProtoRe.execute(model, CONCEPT, floor=2)
    with pytest.raises(ValueError, match="ConceptGuardProtoRe: cannot edit AuraFlow"):
        ConceptGuardProtoRe.execute(tiny.auraflow(), CONCEPT)


def test_a_preset_holds_it(model: Any, clip: Any) -> None:
    edit = {"method": "ProtoRe", "concept": documents.WORDS, "baseline": "none", "floor": 0.25, "strength": 0.5}
    preset = read(json.dumps({**documents.DOCUMENT, "edits": [edit]}))
    assert read(write(preset)) == preset
    assert described(preset) == [
        'Erases the prototype of "knife" (a knife; blades) (ProtoRe, strength 0.5), through the whole sampling.'
    ]
    (made,) = specs_of(preset, Given(clip), node="Test")
    by_hand = ConceptGuardProtoRe.execute(model, made.source, 0.5, baseline="none", floor=0.25).args[0]
    assert edits_of(by_hand)[0].options == made.options
    assert Saver(clip).edits(edits_of(by_hand)) == preset.edits
