"""Learned files in presets: by name or travelling along, both forms alike, and hostile ones refused."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import tiny
import torch
from documents import DOCUMENT, HASH, Fuzz, keys, make
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptguard.editing.files import artefacts
from conceptguard.editing.files.artefacts import Artefact, data_of
from conceptguard.editing.presets.document import MAX_FILE, MAX_LEARNED, packed, read, write
from conceptguard.editing.presets.words import brought, described
from conceptguard.nodes import files
from conceptguard.nodes.cre import ConceptGuardCRE
from conceptguard.nodes.direction import ConceptGuardLoadDirection, ConceptGuardSafeDirection
from conceptguard.nodes.kpop import ConceptGuardKPOP, ConceptGuardLoadPrompt
from conceptguard.nodes.learn_concept import ConceptGuardLoadConcept
from conceptguard.nodes.preset import ConceptGuardApplyPreset, ConceptGuardSavePreset, save
from conceptguard.nodes.preset_routes import report

W = tiny.WIDTH
NUMBERS = torch.Generator().manual_seed(3)
K = torch.randn(77, W, generator=NUMBERS)
LEARNED = {
    "direction": Artefact(
        "direction",
        "sharp things",
        {
            "b": torch.randn(77, 1, generator=NUMBERS),
            "a": torch.randn(1, W, generator=NUMBERS),
            "losses": torch.ones(5),
        },
        text_width=W,
        tokens=77,
        training={"steps": 7},
    ),
    "prompt": Artefact(
        "prompt", "the key", {"k": K[:4], "v": K[4:8]}, mechanism="concat", text_width=W, tokens=4, blocks="middle"
    ),
    "additive": Artefact(
        "prompt",
        "the other key",
        {"k": K, "v": K},
        mechanism="additive",
        text_width=W,
        tokens=77,
        blocks="middle",
        backbone="SD9 elsewhere",
    ),
    "concept": Artefact(
        "concept", "from pictures", {"learned": K[:2], "empty": K, "neutral": K.flip(0)}, text_width=W, tokens=2
    ),
}


@pytest.fixture(scope="module", autouse=True)
def models_folder() -> Iterator[Path]:
    """The learned files in the models folder, two folders deep."""
    folder = Path(folder_paths.get_folder_paths(files.FOLDER)[0]) / "presets" / "deep"
    for name, artefact in LEARNED.items():
        artefacts.write(artefact, folder / f"{name}.safetensors")
    yield folder
    for name in LEARNED:
        (folder / f"{name}.safetensors").unlink()


def reference(name: str) -> dict[str, str]:
    return {"file": f"{name}.safetensors", "sha256": hashlib.sha256(data_of(LEARNED[name])).hexdigest()}


def along(name: str, data: bytes | None = None) -> dict[str, str]:
    data = data_of(LEARNED[name]) if data is None else data
    sha256 = hashlib.sha256(data).hexdigest()
    return {"file": f"{name}.safetensors", "sha256": sha256, "data": base64.b64encode(data).decode()}


def edit(name: str) -> dict[str, Any]:
    if name == "direction":
        return {"method": "safe region", "direction": reference(name), "start_percent": 0.18, "blocks": "middle,output"}
    if name == "concept":
        return {"method": "CRE", "concept": reference(name), "floor": 0.0, "strength": 0.5}
    return {"method": "KPOP", "prompt": reference(name), "end_percent": 0.9}


def document(*names: str, carried: bool = True, **changes: Any) -> dict[str, Any]:
    brings = [along(name) for name in names] if carried else []
    return {**DOCUMENT, "edits": [edit(name) for name in names], "files": brings, **changes}


def by_hand(model: Any, name: str) -> Any:
    file = f"presets/deep/{name}.safetensors"
    if name == "direction":
        direction = make(ConceptGuardLoadDirection, file)
        return make(ConceptGuardSafeDirection, model, direction, start_percent=0.18, blocks="middle,output")
    if name == "concept":
        return make(ConceptGuardCRE, model, make(ConceptGuardLoadConcept, file), 0.5, floor=0.0)
    return make(ConceptGuardKPOP, model, make(ConceptGuardLoadPrompt, file), end_percent=0.9)


@pytest.mark.parametrize("carried", [True, False], ids=["along", "by name"])
@pytest.mark.parametrize("name", LEARNED)
def test_a_preset_draws_what_the_nodes_with_the_file_draw(model: Any, clip: Any, name: str, carried: bool) -> None:
    text = json.dumps(document(name, carried=carried))
    assert ConceptGuardApplyPreset.validate_inputs(text) is True
    applied, hand = make(ConceptGuardApplyPreset, model, clip, text), by_hand(model, name)
    assert keys(applied) == keys(hand)
    edited = tiny.sample(applied)
    assert torch.equal(edited, tiny.sample(hand)) and not torch.equal(edited, tiny.sample(model))


def test_a_prompt_of_another_model_is_warned_of(model: Any, clip: Any, caplog: pytest.LogCaptureFixture) -> None:
    make(ConceptGuardApplyPreset, model, clip, json.dumps(document("additive", "prompt")))
    assert [record.getMessage() for record in caplog.records] == [
        'ConceptGuardApplyPreset: prompt "the other key" was learned on SD9 elsewhere'
    ]


def test_saving_takes_the_files_along_without_their_training(model: Any, clip: Any) -> None:
    hand = model
    for name in LEARNED:
        hand = by_hand(hand, name)
    text = make(ConceptGuardSavePreset, hand, clip, "Learned")
    preset = read(text)
    assert len(preset.files) == len(LEARNED) and len(brought(preset)) == len(LEARNED)
    assert keys(make(ConceptGuardApplyPreset, model, clip, text)) == keys(hand)
    folder = Path(folder_paths.get_output_directory()) / "concept_guard_presets"
    data = max(folder.glob("learned*.safetensors"), key=lambda path: path.stat().st_mtime_ns).read_bytes()
    assert read(data) == preset and b"losses" not in data and artefacts.kind_of(folder / "learned.safetensors")
    assert any(line.startswith("Brings along the direction sharp-things-") for line in brought(preset))
    assert any("along sharp-things-" in line for line in described(preset))


def test_a_file_too_large_to_travel_is_named(model: Any, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from conceptguard.editing.presets import save as preset_save

    monkeypatch.setattr(preset_save, "MAX_LEARNED", 100)
    hand = by_hand(model, "direction")
    output = ConceptGuardSavePreset.execute(hand, clip, "Named")
    preset = read(output.args[0])
    assert not preset.files and any("direction.safetensors is too large to travel" in x for x in output.ui["text"])
    assert keys(make(ConceptGuardApplyPreset, model, clip, output.args[0])) == keys(hand)
    assert brought(preset)[0].startswith("Needs the direction direction.safetensors of the models folder")
    monkeypatch.setattr(files, "held", lambda: [])
    with pytest.raises(ValueError, match='the learned "sharp things" is too large to travel along'):
        ConceptGuardSavePreset.execute(hand, clip, "Named")


# --- both forms ------------------------------------------------------------------------------------------------------


def test_both_forms_say_the_same() -> None:
    preset = read(json.dumps(document(*LEARNED)))
    data = packed(preset)
    assert read(data) == preset and packed(read(data)) == data and read(write(preset)) == preset
    told = report(data)
    assert told["ok"] and read(told["text"]) == preset and told["missing"] == []
    assert {**told, "text": 0} == {**report(write(preset)), "text": 0}


def test_words_alone_pack_too() -> None:
    preset = read(json.dumps(DOCUMENT))
    assert read(packed(preset)) == preset


def test_what_is_missing_is_told_before_it_is_kept(models_folder: Path) -> None:
    gone = {**reference("concept"), "file": "gone.safetensors"}
    other = {**reference("concept"), "sha256": HASH}
    for source, complaint in ((gone, '"gone.safetensors" is not in the models folder'), (other, "has other contents")):
        text = json.dumps({**DOCUMENT, "edits": [{**edit("concept"), "concept": source}]})
        told = report(text)
        assert told["ok"] and complaint in told["missing"][0]
        assert complaint in str(ConceptGuardApplyPreset.validate_inputs(text))


def test_of_two_files_of_a_name_the_right_one_is_taken(model: Any, clip: Any, models_folder: Path) -> None:
    other = replace(LEARNED["concept"], tensors={"learned": K[:2] + 1, "empty": K})
    path = artefacts.write(other, models_folder.parent / "concept.safetensors")
    try:
        text = json.dumps(document("concept", carried=False))
        assert keys(make(ConceptGuardApplyPreset, model, clip, text)) == keys(by_hand(model, "concept"))
    finally:
        path.unlink()


# --- hostile ---------------------------------------------------------------------------------------------------------


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path("exploited"),)


def zipped() -> bytes:
    with zipfile.ZipFile(out := BytesIO(), "w") as file:
        file.writestr("data.pkl", pickle.dumps(Exploit()))
    return out.getvalue()


GOOD = packed(read(json.dumps(document("direction", "concept"))))
SIZE = struct.unpack("<Q", GOOD[:8])[0]
HEAD: dict[str, Any] = json.loads(GOOD[8 : 8 + SIZE])
BODY = GOOD[8 + SIZE :]


def form(body: bytes = BODY, **changes: Any) -> bytes:
    """GOOD with its metadata changed, or without what is None."""
    head = {**HEAD, "__metadata__": {k: v for k, v in {**HEAD["__metadata__"], **changes}.items() if v is not None}}
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + body


def inside(**changes: Any) -> bytes:
    return form(document=json.dumps({**json.loads(HEAD["__metadata__"]["document"]), **changes}))


def renamed(old: str, new: str) -> bytes:
    head = {new if name == old else name: entry for name, entry in HEAD.items()}
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + BODY


BAD_DOCUMENTS = [
    (document("direction", files=[{**along("direction"), "sha256": HASH}]), "other contents than its sha256 says"),
    (document("direction", files=[along("direction"), along("direction")]), "travels along twice"),
    (document("direction", files=[along("concept")]), "no edit needs it"),
    (document("direction", files=[{**along("direction"), "data": "%%%"}]), "not in base64"),
    (document("direction", files=[{**along("direction"), "data": along("direction")["data"] + "\n"}]), "base64"),
    (document("direction", files=[{**along("direction"), "file": "../x.safetensors"}]), "bare name"),
    (document("direction", files=[{**along("direction"), "path": "x"}]), "Extra inputs"),
    (document("direction", files=along("direction")), "files"),
]
for _data in (zipped(), pickle.dumps(Exploit()), b"", data_of(LEARNED["direction"])[:-4], data_of(LEARNED["concept"])):
    _file = along("direction", _data)
    _edit = {**edit("direction"), "direction": {k: _file[k] for k in ("file", "sha256")}}
    BAD_DOCUMENTS.append((document(edits=[_edit], files=[_file]), 'cannot use "direction.safetensors"'))
BAD_FORMS = [
    (zipped(), "not a JSON object"),
    (pickle.dumps(Exploit()), "not a JSON object"),
    (b"\x80\0\0\0\0\0\0\0{" + bytes(9), "cut short"),
    (struct.pack("<Q", 2**40) + b"{}", "cut short"),
    (struct.pack("<Q", 2**20 + 8) + b"{" + b" " * (2**20 + 7), "header has .* bytes, more than"),
    (struct.pack("<Q", 800_000) + b'{"a":' * 160_000, "header cannot be read|larger than"),
    (GOOD[:-8], "damaged"),
    (GOOD + bytes(8), "damaged"),
    (GOOD[:-4] + b"\xff" * 4, "other contents than its sha256 says|NaN"),
    (form(format="pt"), "no preset"),
    (form(kind="direction"), "no preset"),
    (form(schema="9"), "has version 9 .* update ConceptGuard"),
    (form(needs='["bent lines"]'), "it uses 'bent lines', which .* update ConceptGuard"),
    (form(schema="x"), "damaged"),
    (form(document=None), "damaged"),
    (form(document="[]"), "damaged"),
    (form(document='{"a":' * 5000), "damaged"),
    (form(document='{"name": 1, "name": 2}'), "damaged"),
    (inside(schema_version=9), "has version 9 .* update ConceptGuard"),
    (inside(extra=1), "extra: Extra inputs"),
    (inside(files=[]), "belongs to no file"),
    (inside(files=[1]), "damaged"),
    (form(**{"file 0": None}), "damaged"),
    (form(**{"file 0": "{}"}), "other contents"),
    (form(**{"file 0": "[]"}), "damaged"),
    (renamed("0/a", "2/a"), "other contents|damaged|belongs to no file"),
    (renamed("0/a", "../a"), "other contents|belongs to no file"),
    (data_of(LEARNED["direction"]), "a safetensors file, but no preset"),
    (b"{" + b" " * MAX_FILE, "larger than 2 MB"),
]


ALL: list[tuple[Any, str]] = [*BAD_DOCUMENTS, *BAD_FORMS]


@pytest.mark.parametrize(("hostile", "complaint"), ALL, ids=range(len(ALL)))
def test_hostile_files_are_refused_in_few_words(hostile: Any, complaint: str) -> None:
    data = json.dumps(hostile) if isinstance(hostile, dict) else hostile
    with pytest.raises(ValueError, match=complaint) as error:
        read(data)
    assert str(error.value).startswith("preset: ") and len(str(error.value)) < 1500
    assert report(data)["ok"] is False and not Path("exploited").exists()


def test_too_much_may_not_travel_along() -> None:
    large = replace(LEARNED["concept"], tensors={"learned": K[:2], "empty": torch.zeros(MAX_LEARNED // 4 // W, W)})
    file = along("concept", data_of(large))
    with pytest.raises(ValueError, match="more than 1024 KB in all|at most"):
        read(json.dumps(document("concept", files=[file])))


def test_a_name_is_shown_without_what_could_hide_in_it() -> None:
    file = along("concept", data_of(replace(LEARNED["concept"], name="a\u202e<b>\n")))
    source = {key: file[key] for key in ("file", "sha256")}
    preset = read(json.dumps(document(edits=[{**edit("concept"), "concept": source}], files=[file])))
    assert '"a??b??"' in brought(preset)[0]


# --- fuzz ------------------------------------------------------------------------------------------------------------

TEXT = json.dumps(document("direction", "concept"))
LIKELY = [HASH, "../x.safetensors", "x.safetensors", reference("concept"), along("direction"), "in-flight", 0.5]
FIELDS = st.sampled_from(["file", "sha256", "data", "kind", "discriminator", "at_percent"])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(LIKELY),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=3),
    max_leaves=5,
)
GATE = {"kind": "in-flight", "discriminator": reference("concept"), "at_percent": 0.2, "soft": True, "restart": False}
SPOTS = [
    ("files",),
    ("files", 0),
    *(("files", 0, key) for key in ("file", "sha256", "data")),
    ("edits", 0, "direction"),
    ("edits", 0, "direction", "file"),
    ("edits", 0, "direction", "sha256"),
    ("edits", 0, "method"),
    ("edits", 1, "concept"),
    ("edits", 1, "gate"),
    *(("edits", 1, "gate", key) for key in GATE),
    ("edits", 1, "gate", "decode"),
    ("edits", 1, "gate", "threshold"),
    ("edits", 1, "gate", "discriminator", "file"),
]
FUZZ = Fuzz()


def agreed(data: str | bytes) -> None:
    """Refused in our words, or a preset that survives both forms."""
    try:
        with FUZZ.reading():
            preset = read(data)
    except ValueError as error:
        assert str(error).startswith("preset: ") and len(str(error)) < 2000
        return
    assert read(write(preset)) == preset
    assert all(line.isprintable() or "\u200d" in line or "\u200c" in line for line in described(preset))
    with FUZZ.reading():
        report(data)


@settings(max_examples=250, database=None)
@given(ANY)
def with_changed_gates_and_files(value: Any) -> None:
    for path in SPOTS:
        changed = json.loads(TEXT)
        changed["edits"][1]["gate"] = json.loads(json.dumps(GATE))
        place: Any = changed
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        agreed(json.dumps(changed))


@settings(max_examples=1000, database=None)
@given(st.binary(max_size=24), st.integers(0, len(GOOD)), st.integers(0, 40))
def with_changed_bytes(noise: bytes, at: int, cut: int) -> None:
    agreed(GOOD[:at] + noise + GOOD[at + cut :])
    head = at % (SIZE + 8)
    agreed(GOOD[:head] + noise + GOOD[head + len(noise) :])


@settings(max_examples=300, database=None)
@given(st.sampled_from([*HEAD["__metadata__"], "file 1", "file x"]), ANY)
def with_changed_metadata(key: str, value: Any) -> None:
    agreed(form(**{key: value if isinstance(value, str) else json.dumps(value)}))


@pytest.mark.parametrize(
    ("fuzz", "least"),
    [(with_changed_gates_and_files, 4000), (with_changed_bytes, 2000), (with_changed_metadata, 300)],
    ids=["gates and files", "bytes", "metadata"],
)
@pytest.mark.slow
def test_the_fuzz_writes_no_file(fuzz: Any, least: int) -> None:
    for good in (GOOD, TEXT):
        agreed(good)
    FUZZ.read, FUZZ.done = 0, []
    fuzz()
    assert FUZZ.read >= least and FUZZ.done == []


# --- saving ----------------------------------------------------------------------------------------------------------


def test_writers_at_once_lose_nothing() -> None:
    presets = [read(json.dumps({**document("direction"), "author": f"writer {i}"})) for i in range(24)]
    presets += [read(json.dumps({**DOCUMENT, "author": f"writer {i}"})) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(save, presets))
    assert len(set(paths)) == len(presets)
    assert [read(path.read_bytes()) for path in paths] == presets
    assert not list(paths[0].parent.glob(".*"))
