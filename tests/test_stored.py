"""Files that earlier versions wrote, stored in tests/stored, and how their kinds may grow.

The stored files are never written anew: every later reader takes them. Version 1 of each kind is 0.1.0's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

from conceptguard.editing.causal import kept
from conceptguard.editing.causal.search import Period
from conceptguard.editing.edits.learned import concept_of
from conceptguard.editing.files.artefacts import Artefact, data_of, kind_of, parse, read
from conceptguard.editing.files.header import header_and_body, packed
from conceptguard.editing.files.kinds import KINDS, Feature, Kind, Older
from conceptguard.editing.methods import eiup_weight
from conceptguard.editing.methods.kpop import prompt_of
from conceptguard.editing.methods.safe_region import direction_of
from conceptguard.editing.presets import document, versions
from conceptguard.editing.presets.words import described
from conceptguard.nodes.files import DRAWINGS_FILE

STORED = Path(__file__).parent / "stored"
PRESETS = sorted(STORED.glob("preset*"))
LEARNED = {path.stem: path for path in sorted(STORED.glob("*.safetensors")) if path not in PRESETS}
LEARNED["features"] = DRAWINGS_FILE  # too large to store twice; never written since


def used(name: str, found: Artefact) -> Any:
    """What a node makes of a stored file."""
    makers: dict[str, Callable[[Artefact], Any]] = {
        "direction": direction_of,
        "prompt": prompt_of,
        "concept": concept_of,
        "eiup-weight": lambda _: eiup_weight.load(LEARNED[name]),
    }
    return makers[found.kind](found) if found.kind in makers else found


def test_there_is_a_file_of_every_kind() -> None:
    assert {kind_of(path) for path in LEARNED.values()} == set(KINDS)


@pytest.mark.parametrize("name", LEARNED)
def test_an_older_file_is_read_and_of_the_same_version_when_saved_again(name: str) -> None:
    path = LEARNED[name]
    kind = kind_of(path) or ""
    found = read(path, kind)
    assert used(name, found) is not None and found.version == "0.1.0"
    assert data_of(found) == path.read_bytes()


def test_what_older_files_hold() -> None:
    found = read(LEARNED["direction-unfinished"], "direction")
    assert (found.name, found.concepts, found.text_width, found.tokens) == (
        "sharp things",
        ("kitchen knife", "Küchenmesser"),
        8,
        6,
    )
    assert found.training == {"steps": 3, "prompts": ["a knife"]} and found.backbone == "SD15 0123456789abcdef"
    assert found.tensors["losses"].shape == (3,) and float(found.tensors["b"].sum()) != 0
    assert read(LEARNED["discriminator"], "discriminator").training["threshold"] == 0.25
    assert prompt_of(read(LEARNED["prompt-concat"], "prompt")).blocks == "middle,output"


def test_an_older_causal_period_is_read() -> None:
    period = kept.read(STORED / "causal-period.json", 10)
    assert period == Period(2, 7, 10, ((0, 10, 0.9), (1, 10, 0.91), (2, 7, 0.88)))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_an_older_preset_is_read_and_stays_as_it_is(path: Path) -> None:
    data = path.read_bytes()
    preset = document.read(data)
    assert described(preset) and preset.name == "No knives"
    written, again = document.write(preset), document.packed(preset)
    assert document.read(written) == document.read(again) == preset
    if path.suffix == ".json":
        assert json.loads(written) == json.loads(data)
        return
    (old, old_size), (new, new_size) = header_and_body(data), header_and_body(again)
    old_text, new_text = (head["__metadata__"].pop("document") for head in (old, new))
    assert old == new and json.loads(old_text) == json.loads(new_text) and data[-old_size:] == again[-new_size:]


def test_both_forms_of_the_older_preset_say_the_same() -> None:
    plain, packed_form = (document.read((STORED / f"preset.{form}").read_bytes()) for form in ("json", "safetensors"))
    assert plain == packed_form and len(plain.edits) == 5 and len(plain.files) == 4


# --- how a kind may grow ---------------------------------------------------------------------------------------------

TODAY = Kind({"w": ("W",)})
WIDER = replace(TODAY, features={"bias": Feature(2, {"b": (1,)}), "curve": Feature(3, mechanisms=("curved",))})


def renamed(artefact: Artefact) -> Artefact:
    return replace(artefact, tensors={"weight": artefact.tensors["w"]})


def doubled(artefact: Artefact) -> Artefact:
    return replace(artefact, tensors={"weight": 2 * artefact.tensors["weight"]}, mechanism="doubled")


THIRD = Kind({"weight": ("W",)}, older=(Older({"w": ("W",)}, renamed), Older({"weight": ("W",)}, doubled)))
W = torch.arange(3.0)


def toy(mechanism: str = "", **tensors: torch.Tensor) -> Artefact:
    return Artefact("toy", "a toy", tensors, text_width=3, mechanism=mechanism)


def stamp_of(data: bytes) -> tuple[str, str | None]:
    metadata = header_and_body(data)[0]["__metadata__"]
    return metadata["schema"], metadata.get("needs")


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A file that today's ConceptGuard writes, of a kind that will grow."""
    monkeypatch.setitem(KINDS, "toy", TODAY)
    return data_of(toy(w=W))


def test_the_least_version_that_holds_what_is_used(today: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "toy", WIDER)
    assert data_of(toy(w=W)) == today and stamp_of(today) == ("1", None)
    assert stamp_of(data_of(toy(w=W, b=W[:1]))) == ("2", '["bias"]')
    assert stamp_of(data_of(toy("curved", w=W))) == ("3", '["curve"]')
    assert stamp_of(data_of(toy("curved", w=W, b=W[:1]))) == ("3", '["bias", "curve"]')
    assert torch.equal(parse(data_of(toy(w=W, b=W[:1])), "toy").tensors["b"], W[:1])


def test_an_older_reader_says_which_feature_it_lacks(today: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "toy", WIDER)
    newer = data_of(toy("curved", w=W, b=W[:1]))
    monkeypatch.setitem(KINDS, "toy", replace(WIDER, features={"bias": WIDER.features["bias"]}))
    with pytest.raises(ValueError, match="it uses 'curve', which this ConceptGuard does not know; update ConceptGuard"):
        parse(newer, "toy")
    monkeypatch.setitem(KINDS, "toy", TODAY)
    with pytest.raises(ValueError, match="it uses 'bias', 'curve', which"):
        parse(newer, "toy")
    assert torch.equal(parse(today, "toy").tensors["w"], W)


def test_a_feature_that_a_file_does_not_name_is_not_taken(today: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "toy", WIDER)
    metadata = header_and_body(today)[0]["__metadata__"]
    with pytest.raises(ValueError, match="a tensor 'b', which does not belong there"):
        parse(packed({"w": W, "b": W[:1]}, metadata), "toy")
    named = {**metadata, "schema": "2", "needs": json.dumps(["bias"])}
    with pytest.raises(ValueError, match="lacks the tensor 'b'"):
        parse(packed({"w": W}, named), "toy")


def test_an_older_file_is_brought_up_step_by_step(today: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (replace(THIRD, older=THIRD.older[:n]) for n in (1, 2))
    monkeypatch.setitem(KINDS, "toy", first)
    of_second = data_of(toy(weight=W))
    assert stamp_of(of_second)[0] == "2" and parse(today, "toy").mechanism == ""
    monkeypatch.setitem(KINDS, "toy", second)
    for data in (today, of_second):
        found = parse(data, "toy")
        assert torch.equal(found.tensors["weight"], 2 * W) and found.mechanism == "doubled"
        assert stamp_of(data_of(found))[0] == "3"
    assert torch.equal(parse(data_of(parse(today, "toy")), "toy").tensors["weight"], 2 * W)
    with pytest.raises(ValueError, match="a tensor 'weight', which does not belong"):  # it had another row
        parse(packed({"weight": W}, header_and_body(today)[0]["__metadata__"]), "toy")


def test_a_version_that_names_nothing_is_refused_as_well(today: bytes) -> None:
    metadata = {**header_and_body(today)[0]["__metadata__"], "schema": "4"}
    with pytest.raises(ValueError, match="it has version 4 of its format, and this ConceptGuard reads up to version 1"):
        parse(packed({"w": W}, metadata), "toy")


# --- how presets may grow --------------------------------------------------------------------------------------------

PLAIN = (STORED / "preset-plain.json").read_bytes()


@pytest.fixture
def wider(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later ConceptGuard, whose presets may have a mood and a rhythm."""
    monkeypatch.setattr(versions, "FEATURES", {})

    class Wider(document.Preset):
        mood: Annotated[str, versions.since(2, "a mood")] = ""
        rhythm: Annotated[int, versions.since(3, "a rhythm")] = 0

    monkeypatch.setattr(document, "Preset", Wider)
    monkeypatch.setattr(document, "_preset_class", cache(document._preset_class.__wrapped__))


def head_of(text: str) -> tuple[int, Any]:
    found = json.loads(text)
    return found["schema_version"], found.get("needs")


def test_presets_are_of_the_least_version_that_holds_what_is_used(wider: None) -> None:
    plain = document.read(PLAIN)
    assert json.loads(document.write(plain)) == json.loads(PLAIN)
    moody = plain.model_copy(update={"mood": "blue"})
    assert head_of(document.write(moody)) == (2, ["a mood"])
    both = moody.model_copy(update={"rhythm": 3})
    assert head_of(document.write(both)) == (3, ["a mood", "a rhythm"])
    assert document.read(document.write(both)) == document.read(document.packed(both)) == both


def test_an_older_reader_of_a_newer_preset_says_what_it_lacks(wider: None, monkeypatch: pytest.MonkeyPatch) -> None:
    moody = document.read(PLAIN).model_copy(update={"mood": "blue"})
    forms = document.write(moody), document.packed(moody)
    monkeypatch.undo()
    for form in forms:
        with pytest.raises(ValueError, match="^preset: it uses 'a mood', which this .* does not know; update"):
            document.read(form)
    newest = versions.newest()
    with pytest.raises(ValueError, match=f"preset: it has version {newest + 1} .* up to version {newest}; update"):
        document.read(PLAIN.replace(b'"schema_version": 1', b'"schema_version": %d' % (newest + 1)))


def test_an_older_preset_is_brought_up_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    today = document.read(PLAIN)
    ups = [lambda old: {**old, "author": old["author"] + "!"}, lambda old: {**old, "author": old["author"] + "?"}]
    monkeypatch.setattr(versions, "UPS", ups)
    monkeypatch.setattr(versions, "FEATURES", {})
    assert document.read(PLAIN) == today.model_copy(update={"author": "me!?"})
    assert document.read(PLAIN.replace(b'"schema_version": 1', b'"schema_version": 2')).author == "me?"
    again = document.write(document.read(PLAIN))
    assert head_of(again) == (3, None) and document.read(again).author == "me!?"


def test_what_is_drawn_instead_is_a_feature_of_version_2() -> None:
    found = json.loads(PLAIN)
    found["edits"][0]["concept"]["instead"] = ["a spoon"]
    written = document.write(document.read(json.dumps(found)))
    assert head_of(written) == (2, ["what to draw instead"])
    found["edits"][0]["evidence"] = "position"
    written = document.write(document.read(json.dumps(found)))
    assert head_of(written) == (2, ["evidence by tokens or by position", "what to draw instead"])
    assert document.write(document.read(written)) == written
