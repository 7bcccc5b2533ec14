"""Presets: what the document may hold, that hostile ones are refused, and that its edits are those of the nodes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import folder_paths
import pytest
import tiny
import torch
from documents import DOCUMENT, HASH, WORDS, Fuzz, by_hand, changed, keys, make
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptguard.editing.edits.concept import concept_from_text
from conceptguard.editing.edits.encode import encode
from conceptguard.editing.edits.spec import Gate
from conceptguard.editing.engine.host import edits_of
from conceptguard.editing.methods import cre, eiup
from conceptguard.editing.methods.cre import CREEdit
from conceptguard.editing.methods.eiup import EIUPEdit
from conceptguard.editing.presets.apply import Given, specs_of
from conceptguard.editing.presets.document import MAX_BYTES, Preset, read, write
from conceptguard.editing.presets.save import alike, slug
from conceptguard.editing.presets.versions import newest
from conceptguard.editing.presets.words import described
from conceptguard.nodes.concept import ConceptGuardConceptFromConditioning
from conceptguard.nodes.cre import ConceptGuardCRE
from conceptguard.nodes.preset import ConceptGuardApplyPreset, ConceptGuardSavePreset
from conceptguard.nodes.preset_routes import report, shipped

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "presets").glob("*.json"))


# --- reading and writing ---------------------------------------------------------------------------------------------


def test_a_document_survives_reading_and_writing() -> None:
    preset = read(json.dumps(DOCUMENT))
    assert read(write(preset)) == preset and write(read(write(preset))) == write(preset)
    assert read(json.dumps(DOCUMENT).encode()) == preset


def test_it_is_told_in_plain_words() -> None:
    assert described(read(json.dumps(DOCUMENT))) == [
        'Erases "knife" (a knife; blades) (CRE, strength 0.75), from 10 % to 100 % of the timesteps.',
        'Takes away what attends to "knife" (a knife; blades) (EIUP, weight -1, -0.5), from 0 % to 80 % of the '
        "timesteps, in middle,output.",
    ]


def test_the_choices_are_the_nodes() -> None:
    for choices, edit in ((cre.CHOICES, CREEdit), (eiup.CHOICES, EIUPEdit)):
        assert {name: get_args(edit.model_fields[name].annotation) for name in choices} == {
            name: tuple(options) for name, options in choices.items()
        }


TEXT = json.dumps(DOCUMENT)
BAD = [
    ("", "it is empty"),
    ("  \n", "it is empty"),
    ("[]", "not a JSON object"),
    ("null", "not a JSON object"),
    ("{", "Invalid JSON"),
    (b"PK\x03\x04 a zip", "not a JSON object"),
    (b"\x80\x04\x95 a pickle", "not a JSON object"),
    (b'{"name": "\xff"}', "Invalid JSON"),
    ('{"name": "\ud800"}', "not text in Unicode"),
    ('{"a": "\\ud800"}', "Invalid JSON"),
    ("{" + " " * MAX_BYTES + "}", "larger than 256 KB"),
    ('{"a":' * 20_000 + "1" + "}" * 20_000, "recursion limit"),
    ("{}", "schema_version: Field required"),
    (TEXT[:-1] + ', "name": "Another"}', "has the name 'name' twice in one place, and only one can be meant"),
    (TEXT.replace('"blades"]}', '"blades"], "phrases": ["a cat"]}', 1), "has the name 'phrases' twice"),
    (changed("schema_version", value=9), f"has version 9 .* reads up to version {newest()}; update ConceptGuard"),
    (changed("needs", value=["bent lines"]), "it uses 'bent lines', which this .* does not know; update ConceptGuard"),
    (changed("needs", value="x"), "needs: Input should be a valid array"),
    (changed("schema_version", value=0), "schema_version: Input should be greater"),
    (changed("schema_version", value=True), "schema_version"),
    (changed("kind", value="workflow"), "kind: Input should be"),
    (changed("extra", value=1), "extra: Extra inputs are not permitted; if a newer ConceptGuard wrote it, update this"),
    (changed("edits", 0, "file", value="../x"), "Extra inputs"),
    (changed("edits", value=[]), "edits"),
    (changed("edits", value=[DOCUMENT["edits"][0]] * 33), "at most 32"),
    (
        changed("edits", 0, "method", value="eval"),
        "edits.0: there is no method 'eval' here, but .*'CRE'",
    ),
    (changed("edits", 0, "strength", value="1"), "strength: Input should be a valid number"),
    (changed("edits", 0, "strength", value=math.nan), "strength"),
    (changed("edits", 0, "strength", value=math.inf), "strength"),
    (changed("edits", 0, "strength", value=-1), "strength"),
    (changed("edits", 0, "strength", value=10**400), "strength"),
    (changed("edits", 0, "start_percent", value=1.8), "start_percent"),
    (changed("edits", 1, "start_percent", value=0.9), "start_percent 0.9 lies after end_percent 0.8"),
    (changed("edits", 0, "blocks", value="sideways"), 'cannot read "sideways"'),
    (changed("edits", 1, "weights", value=[-1, -1, -1]), "3 weights for 2 phrases"),
    (changed("edits", 1, "weights", value=[-1, None]), "weights.1"),
    (changed("edits", 0, "concept", value="knife"), "concept"),
    (changed("edits", 0, "concept", "phrases", value=[]), "phrases"),
    (changed("edits", 0, "concept", "phrases", value=["a"] * 65), "phrases"),
    (changed("edits", 0, "concept", "phrases", value=["two\nlines"]), r"invisible character U\+000A"),
    (changed("edits", 0, "concept", "phrases", value=[" knife"]), "begins or ends with a space"),
    (changed("edits", 0, "concept", "phrases", value=["an Embedding:secret"]), "names a file"),
    (changed("edits", 0, "concept", value={"file": "x.safetensors", "sha256": "zz"}), "sha256"),
    *(
        (changed("edits", 0, "concept", value={"file": file, "sha256": HASH}), "file")
        for file in ("../x.safetensors", "/x.safetensors", "a\\b.safetensors", "c:.safetensors", "x.pt", ".safetensors")
    ),
    (changed("name", value=""), "name"),
    (changed("name", value="n" * 81), "name"),
    (changed("name", value="a\u202eb"), r"invisible character U\+202E"),
    (changed("name", value="a\u200bb"), r"invisible character U\+200B"),
    (changed("name", value="e\u0301"), "composed form"),
    (changed("name", value=["x"]), "name: Input should be a valid string"),
    (changed("author", value="a\nb"), r"U\+000A"),
    (changed("description", value="\x1b[31m"), r"U\+001B"),
    (changed("base_models", value=["Flux.9"]), "base_models"),
]


@pytest.mark.parametrize(("document", "complaint"), BAD, ids=str)
def test_bad_documents_are_refused_in_few_words(document: Any, complaint: str) -> None:
    text = json.dumps(document) if isinstance(document, dict) else document
    with pytest.raises(ValueError, match=complaint) as error:
        read(text)
    assert str(error.value).startswith("preset: ") and len(str(error.value)) < 1500
    assert report(text) == {"ok": False, "error": str(error.value)}


def test_too_many_phrases_in_all() -> None:
    edit = {"method": "CRE", "concept": {"name": "x", "phrases": [f"thing {i}" for i in range(52)]}}
    assert len(read(json.dumps({**DOCUMENT, "edits": [edit] * 4})).edits) == 4
    with pytest.raises(ValueError, match="260 phrases in all"):
        read(json.dumps({**DOCUMENT, "edits": [edit] * 5}))


def test_what_is_kept_is_told_saved_and_counted(model: Any, clip: Any) -> None:
    text = json.dumps(changed("edits", 0, "concept", value={**WORDS, "keep": ["a spoon", "a fork"]}))
    assert described(read(text))[0].startswith('Erases "knife" (a knife; blades), but not a spoon; a fork (CRE')
    applied = make(ConceptGuardApplyPreset, model, clip, text)
    again = read(saved(applied, clip)).edits
    assert {edit.concept for edit in again} == {edit.concept for edit in read(text).edits}
    edit = {"method": "CRE", "concept": {"name": "x", "phrases": ["a"], "keep": ["b"] * 64}}
    with pytest.raises(ValueError, match="260 phrases in all"):
        read(json.dumps({**DOCUMENT, "edits": [edit] * 4}))


def test_markup_is_only_text() -> None:
    document = changed("name", value="<img src=x onerror=alert(1)>")
    assert read(json.dumps(document)).name == "<img src=x onerror=alert(1)>"
    assert slug("<img src=x onerror=alert(1)>") == "img-src-x-onerror-alert-1" and slug("../..") == ""


# --- fuzz ------------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["CRE", "EIUP", "KPOP", "../../x", "\u202e", "all", HASH, 1, 2, 0.5, -0.0, 1e999, "<script>"]),
)
KEYS = st.sampled_from([*DOCUMENT, *DOCUMENT["edits"][0], *WORDS, "weights", "file", "sha256", "gate", "__proto__"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path, *(place for step, value in below for place in places(value, (*path, step)))]


PLACES = [place for place in places(DOCUMENT) if place]


FUZZ = Fuzz()


def agreed(text: str | bytes) -> None:
    """Refused with a ValueError of ours, or a preset within the limits that survives writing."""
    try:
        with FUZZ.reading():
            preset = read(text)
    except ValueError as error:
        assert str(error).startswith("preset: ") and len(str(error)) < 2000
        return
    assert read(write(preset)) == preset
    for edit in preset.edits:
        assert 0 <= edit.start_percent <= edit.end_percent <= 1 and 0 <= edit.strength <= 16
    assert all(line.isprintable() or "\u200d" in line or "\u200c" in line for line in described(preset))


@settings(max_examples=500, database=None)
@given(VALUES, st.sampled_from(PLACES), VALUES)
def with_changed_places(value: Any, other: tuple[Any, ...], second: Any) -> None:
    """Each value at every place of the document, with a second change somewhere."""
    for path in PLACES:
        document = changed(*path, value=value)
        agreed(json.dumps(document))
        place: Any = document
        try:
            for step in other[:-1]:
                place = place[step]
            place[other[-1]] = second
        except (KeyError, IndexError, TypeError):  # the first change took that place away
            continue
        agreed(json.dumps(document))


@pytest.mark.slow
def test_ten_thousand_documents_with_changed_places() -> None:
    agreed(TEXT)
    FUZZ.read, FUZZ.done = 0, []
    with_changed_places()
    assert FUZZ.read >= 10_000 and FUZZ.done == []


def test_what_counts_the_fuzz_hears_of_files(tmp_path: Path) -> None:
    fuzz = Fuzz()
    with fuzz.reading():
        (tmp_path / "x").write_text("1")
        assert (tmp_path / "x").read_text() == "1"
        (tmp_path / "x").rename(tmp_path / "y")
    (tmp_path / "z").write_text("1")
    assert fuzz.read == 1 and [said.split()[0] for said in fuzz.done] == ["open", "os.rename"]


@settings(max_examples=300, database=None)
@given(st.binary(max_size=64), st.integers(0, 400), st.integers(0, 40))
def test_documents_with_changed_bytes(noise: bytes, at: int, cut: int) -> None:
    data = json.dumps(DOCUMENT).encode()
    agreed(data[:at] + noise + data[at + cut :])


# --- edits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_a_preset_draws_what_its_nodes_draw(model: Any, clip: Any, batch: int) -> None:
    applied = make(ConceptGuardApplyPreset, model, clip, json.dumps(DOCUMENT))
    hand = by_hand(model, clip)
    assert keys(applied) == keys(hand) and not edits_of(model)
    edited = tiny.sample(applied, batch=batch, steps=4)
    assert torch.equal(edited, tiny.sample(hand, batch=batch, steps=4))
    assert not torch.equal(edited, tiny.sample(model, batch=batch, steps=4))


@pytest.mark.parametrize("inputs", [{"strength": 0.0}, {"gate": Gate((0.0,))}], ids=str)
def test_off_is_bit_identical(model: Any, clip: Any, inputs: dict[str, Any]) -> None:
    applied = make(ConceptGuardApplyPreset, model, clip, json.dumps(DOCUMENT), **inputs)
    assert torch.equal(tiny.sample(applied), tiny.sample(model))


def test_strength_and_gate_count_for_every_edit(clip: Any) -> None:
    specs = specs_of(read(json.dumps(DOCUMENT)), Given(clip), 0.5, Gate((0.25,)))
    assert [spec.strength for spec in specs] == [0.375, 0.5] and all(spec.gate == Gate((0.25,)) for spec in specs)
    assert specs[0].source is specs[1].source  # encoded once


def saved(model: Any, clip: Any, **about: str) -> str:
    return make(ConceptGuardSavePreset, model, clip, **{"name": "Mine", **about})


def test_saving_and_applying_gives_the_same_edits(model: Any, clip: Any) -> None:
    hand = by_hand(model, clip)
    text = saved(hand, clip, description="two\r\nlines", author="me")
    assert read(text).description == "two\nlines"
    assert keys(make(ConceptGuardApplyPreset, model, clip, text)) == keys(hand)
    folder = Path(folder_paths.get_output_directory()) / "concept_guard_presets"
    before = sorted(folder.iterdir())
    assert saved(hand, clip, description="two\r\nlines", author="me") == text
    new = set(folder.iterdir()) - set(before)  # beside the old one, never over it
    assert [path.read_text(encoding="utf-8") for path in new] == [text]
    assert not list(folder.glob(".*"))


def test_what_cannot_be_saved_says_why(model: Any, clip: Any) -> None:
    with pytest.raises(ValueError, match="ConceptGuardSavePreset: model carries no edits"):
        saved(model, clip)
    picture = make(ConceptGuardConceptFromConditioning, tiny.cond(3), "picture", tiny.cond(4))
    with pytest.raises(ValueError, match='concept "picture" is not what this clip makes of its words'):
        saved(make(ConceptGuardCRE, model, picture), clip)
    with pytest.raises(ValueError, match="ConceptGuardSavePreset: preset: name"):
        saved(by_hand(model, clip), clip, name="  ")


@pytest.mark.parametrize(("off", "same"), [(0.004, True), (0.03, False)])
def test_a_concept_that_an_encoder_in_half_precision_made_is_known_again(clip: Any, off: float, same: bool) -> None:
    """Two runs of one encoder differ by some thousandths of an encoding's size; another wording by far more."""
    made = concept_from_text(clip, "knife", "knife")
    (phrase,) = made.phrases
    noise = torch.randn(phrase.tokens.shape, generator=torch.Generator().manual_seed(0))
    moved = phrase.tokens + off * phrase.tokens.norm() / noise.norm() * noise
    again = replace(made, phrases=(replace(phrase, tokens=moved),))
    assert alike(made, again) is same


def test_a_bad_document_is_refused_before_anything_runs() -> None:
    assert ConceptGuardApplyPreset.validate_inputs(json.dumps(DOCUMENT)) is True
    assert ConceptGuardApplyPreset.validate_inputs(None) is True  # linked
    assert ConceptGuardApplyPreset.validate_inputs("{}") == (
        "ConceptGuardApplyPreset: preset: schema_version: Field required; kind: Field required"
    )
    assert "strength is nan" in str(ConceptGuardApplyPreset.validate_inputs(json.dumps(DOCUMENT), math.nan))


# --- those that come with the pack -----------------------------------------------------------------------------------


def test_six_are_shipped_and_all_are_whole() -> None:
    assert {path.stem for path in SHIPPED} >= {
        "no-nudity",
        "no-weapons",
        "no-gore",
        "artist-style-opt-out",
        "fair-faces",
        "classroom",
    }
    assert all(each["ok"] for each in shipped()) and len(shipped()) == len(SHIPPED)
    assert len({each["name"] for each in shipped()}) == len(SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_preset_gives_its_reasons_and_edits(path: Path, model: Any, clip: Any) -> None:
    preset = read(path.read_bytes())
    assert preset.description and preset.author and preset.licence and all(edit.why for edit in preset.edits)
    assert isinstance(preset, Preset)
    applied = make(ConceptGuardApplyPreset, model, clip, path.read_text(encoding="utf-8"))
    assert len(edits_of(applied)) == len(preset.edits)
    said = preset.edits[0].concept.phrases[0]
    prompt = [[encode(clip, f"a cat {said}"), {"pooled_output": torch.zeros(1, 1280)}]]
    assert not torch.equal(tiny.sample(applied, prompt), tiny.sample(model, prompt))
