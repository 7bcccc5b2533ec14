"""Learned files: what is written comes back, and whatever else a file may be is refused before it is used."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from conceptguard.editing.files import artefacts
from conceptguard.editing.files.artefacts import Artefact, bare, kind_of, parse, read, write
from conceptguard.editing.files.kinds import KINDS

B, A = torch.arange(3.0)[:, None], torch.ones(1, 4)
SHIFT = Artefact(
    "direction",
    "sharp things",
    {"b": B, "a": A},
    method="safe region",
    concepts=("knife", "schwert ü"),
    backbone="SD15 0123456789abcdef",
    text_width=4,
    tokens=3,
    training={"steps": 7, "prompts": ["a knife"]},
)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = write(SHIFT, tmp_path / "deep" / "x.safetensors")
    back = read(path, "direction")
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in SHIFT.tensors.items())
    assert back.version == artefacts.package_version() != "unknown"
    assert vars(back) | {"tensors": 0, "version": ""} == vars(SHIFT) | {"tensors": 0}
    assert kind_of(path) == "direction" and os.listdir(path.parent) == ["x.safetensors"]


def test_the_same_artefact_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write(SHIFT, tmp_path / f"{i}.safetensors").read_bytes() for i in range(2))
    assert one == two


@pytest.mark.parametrize("bad", [{"b": B, "a": A * float("nan")}, {"b": B}, {"b": B, "a": A, "c": A}])
def test_what_could_not_be_read_is_not_written(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = write(SHIFT, tmp_path / "x.safetensors")
    before = path.read_bytes()
    with safe_open(path, "pt") as file:  # as other programs read it
        assert torch.equal(file.get_tensor("b"), B) and file.metadata()["kind"] == "direction"
    with pytest.raises(ValueError, match="tensor"):
        write(replace(SHIFT, tensors=bad), path)
    assert os.listdir(tmp_path) == ["x.safetensors"] and path.read_bytes() == before


# --- hostile files ---------------------------------------------------------------------------------------------------


def bytes_of(tmp_path: Path) -> tuple[dict[str, Any], bytes]:
    return bytes_of_file(write(SHIFT, tmp_path / "good.safetensors"))


def bytes_of_file(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def packed(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def changed(**entries: Any) -> Callable[[dict[str, Any], bytes], bytes]:
    """A file whose header differs: `meta__x` in the metadata, `b__x` in tensor b."""

    def make(header: dict[str, Any], body: bytes) -> bytes:
        for where, value in entries.items():
            part, key = where.split("__", 1)
            header["__metadata__" if part == "meta" else part][key] = value
        return packed(header, body)

    return make


def added(name: str) -> Callable[[dict[str, Any], bytes], bytes]:
    def make(header: dict[str, Any], body: bytes) -> bytes:
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        return packed(header, body + bytes(4))

    return make


def floats(value: float) -> Callable[[dict[str, Any], bytes], bytes]:
    return lambda header, body: packed(header, body[:-4] + struct.pack("<f", value))


class Exploit:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploited",)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any], bytes], bytes], str]] = {
    "empty": (lambda h, b: b"", "cut short"),
    "a few bytes": (lambda h, b: b"\x01\x00", "cut short"),
    "truncated header": (lambda h, b: packed(h, b)[:50], "cut short"),
    "truncated data": (lambda h, b: packed(h, b)[:-3], "tensors cannot be read"),
    "data behind the end": (lambda h, b: packed(h, b + bytes(64)), "tensors cannot be read"),
    "10 GB header claim": (lambda h, b: struct.pack("<Q", 10 * 2**30) + packed(h, b)[8:], "cut short"),
    "negative header claim": (lambda h, b: b"\xff" * 8 + packed(h, b)[8:], "cut short"),
    "2 MB metadata": (changed(meta__x="x" * 2**21), "header has .* bytes, more than"),
    "wrong dtype": (changed(a__dtype="F16"), "dtype F16, not F32"),
    "dtype of no kind": (changed(a__dtype=["F32"]), "dtype"),
    "wrong shape": (changed(a__shape=[4, 1]), r"shape \[4, 1\], not \[1, W\]"),
    "another count": (changed(meta__tokens="5"), "tokens is 5, but its tensors have 3"),
    "another width": (changed(meta__text_width="768"), "text_width is 768, but its tensors have 4"),
    "too many dimensions": (changed(a__shape=[1, 4, 1]), "shape"),
    "a negative shape": (changed(a__shape=[-1, -4]), "no shape"),
    "a huge shape": (changed(a__shape=[1, 2**62]), "they take .* bytes, and the file has 28"),
    "a shape of truths": (changed(a__shape=[True, 4]), "no shape"),
    "offsets of another": (changed(a__data_offsets=[4, 20]), "tensors cannot be read"),
    "offsets outside": (changed(a__data_offsets=[0, 2**60]), "tensors cannot be read"),
    "NaN": (floats(float("nan")), "NaN or infinity"),
    "infinity": (floats(float("-inf")), "NaN or infinity"),
    "a path in a name": (added("../../etc/passwd"), "does not belong there"),
    "one tensor more": (added("c"), "does not belong there"),
    "one tensor less": (lambda h, b: packed({k: v for k, v in h.items() if k != "a"}, b), "lacks the tensor 'a'"),
    "a pickle": (lambda h, b: pickle.dumps(Exploit()), "cut short|header"),
    "a long pickle": (lambda h, b: pickle.dumps([Exploit(), "x" * 2**22]), "cut short|header"),
    "no JSON": (lambda h, b: packed(b"\xff" * 100, b), "header cannot be read"),
    "JSON without end": (lambda h, b: packed(b"[" * 500_000, b), "header cannot be read"),
    "JSON of another form": (lambda h, b: packed([1], b), "not a safetensors file's"),
    "metadata of another form": (lambda h, b: packed({**h, "__metadata__": {"kind": [1]}}, b), "not a safetensors"),
    "a name twice": (lambda h, b: packed(json.dumps(h)[:-1].encode() + b', "a": 1}', b), "has the name 'a' twice"),
    "not ours": (lambda h, b: packed({k: v for k, v in h.items() if k != "__metadata__"}, b), "did not write"),
    "a newer version": (changed(meta__schema="2"), "has version 2 .* reads up to version 1; update ConceptGuard"),
    "version 0": (changed(meta__schema="0"), "metadata is damaged"),
    "a version that is none": (changed(meta__schema="one"), "metadata is damaged"),
    "no end of versions": (changed(meta__schema="9" * 5000), "metadata is damaged"),
    "an unknown feature": (changed(meta__needs='["bent lines"]'), "it uses 'bent lines', which .* update ConceptGuard"),
    "features that are none": (changed(meta__needs="[[]]"), "metadata is damaged"),
    "another kind": (changed(meta__kind="prompt"), "holds a prompt, not a direction"),
    "a number that is none": (changed(meta__tokens="many"), "metadata is damaged"),
    "a setting twice": (changed(meta__training='{"a": 1, "a": 2}'), "metadata is damaged"),
    "concepts that are none": (changed(meta__concepts='{"a": 1}'), "metadata is damaged"),
    "training that is none": (changed(meta__training="[" * 10000), "metadata is damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = HOSTILE[case]
    path = tmp_path / "got.safetensors"
    path.write_bytes(make(*bytes_of(tmp_path)))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=f'(?s)cannot use "got.safetensors": .*{message}.*; choose a direction file'):
        read(path, "direction")
    assert len(kind_of(path) or "") < 20
    assert sorted(os.listdir(tmp_path)) == before


def test_large_files_are_not_even_read(tmp_path: Path) -> None:
    header, body = bytes_of(tmp_path)
    path = tmp_path / "got.safetensors"
    tracemalloc.start()
    for claim in (100 * 2**20, 10 * 2**30):  # sparse: a header of 100 MB that is all there, and one that is not
        with path.open("wb") as file:
            file.write(struct.pack("<Q", claim))
            file.truncate(100 * 2**20 + 8)
        with pytest.raises(ValueError, match="its header has|cut short"):
            read(path, "direction")
        assert kind_of(path) is None
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: os.mkfifo(p)])
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match='cannot use "x.safetensors": it is no file'):
        read(tmp_path / "x.safetensors", "direction")


@settings(max_examples=40)
@given(st.data())
def test_no_damage_is_anything_but_a_value_error(tmp_path_factory: Any, data: st.DataObject) -> None:
    whole = bytearray(packed(*bytes_of(tmp_path_factory.mktemp("x"))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = parse(bytes(whole), "direction")
    except ValueError:
        return
    assert all(torch.isfinite(t).all() for t in found.tensors.values())


CHECKPOINT = [name.removesuffix("?") for name in KINDS["kpop-checkpoint"].tensors]


def test_of_a_file_of_another_kind_only_the_header_is_read(tmp_path: Path) -> None:
    """However large: a checkpoint of a training in the place of a direction, or of one whose header lies."""
    state = Artefact("kpop-checkpoint", "unfinished training", dict.fromkeys(CHECKPOINT, torch.zeros(1)))
    head, body = bytes_of_file(write(state, tmp_path / "small.safetensors"))
    path = tmp_path / "large.safetensors"
    tracemalloc.start()
    for size, wanted, why in [
        (2**30, "direction", "it holds a kpop-checkpoint, not a direction"),
        (2**30, "kpop-checkpoint", "they take 44 bytes, and the file has 1073741824"),
    ]:
        with path.open("wb") as file:
            file.write(packed(head, body))
            file.truncate(file.tell() - len(body) + size)
        with pytest.raises(ValueError, match=why):
            read(path, wanted)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_an_error_of_the_disk_names_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(SHIFT, tmp_path / "x.safetensors")

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ValueError, match='cannot use "x.safetensors": Permission denied; choose') as error:
        read(path, "direction")
    assert str(tmp_path) not in str(error.value)


def test_what_is_shared_keeps_all_but_the_training(tmp_path: Path) -> None:
    state = {"adam.b": torch.zeros(2, 3, 1), "losses": torch.zeros(2)}
    direction = replace(SHIFT, tensors={**SHIFT.tensors, **state})
    assert bare(direction).tensors.keys() == {"a", "b"}
    concept = Artefact("concept", "x", {"learned": A, "empty": A, "neutral": A + 1}, text_width=4, tokens=1)
    assert bare(concept).tensors.keys() == concept.tensors.keys()
