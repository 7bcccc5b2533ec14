"""Learned files: safetensors that say what they hold, and of which nothing is believed before it is checked.

A kind of file is a row of KINDS. Reading costs at most the kind's limit in memory, and runs no code that a file brings.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..edits.digest import Shared
from ..gates.features import TRUNK

FORMAT, SCHEMA = "concept-guard", 1
DTYPES = {torch.float32: "F32", torch.float16: "F16"}  # that we write; ours are all fp32, the host's LoRAs fp16
HEADER = 2**20  # bytes of names, shapes and metadata that a file may have
TEXT = ("method", "name", "backbone", "mechanism", "blocks", "version")
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Kind:
    """What a kind of file may hold: tensor name -> shape, all fp32 and finite.

    A letter in a shape stands for any number that is the same in the whole file; W is the metadata's text_width and
    T its tokens. A name that ends in "?" may be missing.
    """

    tensors: Mapping[str, Shape]
    limit: int = 2**26  # bytes of the whole file


KINDS: dict[str, Kind] = {
    "direction": Kind(
        {
            "b": ("T", 1),
            "a": (1, "W"),
            "adam.b?": (2, "T", 1),
            "adam.a?": (2, 1, "W"),
            "z?": ("B", "C", "H", "X"),
            "losses?": ("steps",),
        }
    ),
    "eiup-weight": Kind(
        {
            "mean": ("B",),
            "spread": ("B",),
            "0.weight": (64, "B"),
            "0.bias": (64,),
            "2.weight": (32, 64),
            "2.bias": (32,),
            "4.weight": (1, 32),
            "4.bias": (1,),
        }
    ),
    "discriminator": Kind({"mean": ("F",), "spread": ("F",), "w": ("F",), "b": (1,), "probe": ("F",)}),
    "features": Kind(
        {
            f"layers.{i}.{name}": shape
            for i, (a, b) in enumerate(pairwise(TRUNK))
            for name, shape in (("0.weight", (b, a, 3, 3)), ("0.bias", (b,)), ("1.weight", (b,)), ("1.bias", (b,)))
        }
    ),
    "prompt": Kind({"k": ("T", "W"), "v": ("T", "W")}),
    "kpop-checkpoint": Kind(
        {
            "weights": ("N",),
            "adam.m": ("N",),
            "adam.v": ("N",),
            "adam.t": (1,),
            "prompt.k": ("P",),
            "prompt.v?": ("P",),
            "prompt.adam.m": ("M",),
            "prompt.adam.v": ("M",),
            "prompt.adam.t": (1,),
            "z": ("Z",),
            "losses": ("steps",),
        },
        limit=2**35,
    ),
    "concept": Kind({"learned": ("T", "W"), "empty": ("L", "W"), "neutral?": ("L", "W")}),
    "concept-checkpoint": Kind(
        {"learned": ("N",), "adam.m": ("N",), "adam.v": ("N",), "adam.t": (1,), "losses": ("steps",)}
    ),
}


@dataclass(frozen=True, eq=False)
class Artefact(Shared):
    """A learned thing as its file holds it. `training` is whatever JSON says how it was made; 0 and "" are "any"."""

    kind: str
    name: str
    tensors: Mapping[str, Tensor]
    method: str = ""
    concepts: tuple[str, ...] = ()
    backbone: str = ""  # the fingerprint of the model that it was learned on (binding.fingerprint)
    text_width: int = 0
    tokens: int = 0
    mechanism: str = ""
    blocks: str = "all"
    training: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""  # of the package that wrote it


def write(artefact: Artefact, path: Path) -> Path:
    """The file, whole or not at all. Raises ValueError for tensors that `read` would refuse."""
    return put(data_of(artefact), path)


def data_of(artefact: Artefact) -> bytes:
    """A file's bytes, the same for the same artefact. Raises ValueError for tensors that `parse` would refuse."""
    tensors = {key: t.detach().to("cpu", torch.float32).contiguous() for key, t in artefact.tensors.items()}
    metadata = {
        "format": FORMAT,
        "schema": str(SCHEMA),
        "kind": artefact.kind,
        "text_width": str(artefact.text_width),
        "tokens": str(artefact.tokens),
        "concepts": json.dumps(artefact.concepts),
        "training": json.dumps(dict(artefact.training)),
        **{key: getattr(artefact, key) for key in TEXT},
        "version": artefact.version or package_version(),
    }
    data = packed(tensors, metadata)
    parse(data, artefact.kind)
    return data


def bare(artefact: Artefact) -> Artefact:
    """Without what only going on with its training needs."""
    wanted = KINDS[artefact.kind].tensors
    return replace(artefact, tensors={name: t for name, t in artefact.tensors.items() if name in wanted})


def put(data: bytes, path: Path) -> Path:
    """A file with these bytes, whole or not at all."""
    part = part_of(data, path)
    try:
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def put_beside(data: bytes, path: Path) -> Path:
    """A new file with these bytes, whole or not at all: name.json, name-2.json, .. whichever nobody has yet.

    Of several writers at once, each gets a file of its own.
    """
    part = part_of(data, path)
    try:
        for i in count(1):
            new = path if i == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}")
            if moved(part, new):
                return new
        raise AssertionError
    finally:
        part.unlink(missing_ok=True)


def moved(part: Path, new: Path) -> bool:
    """Give a file another name, unless one has it already."""
    try:
        os.link(part, new)
    except FileExistsError:
        return False
    except OSError:  # a disk without links: take the name first, then fill it
        try:
            os.close(os.open(new, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        os.replace(part, new)
    return True


def part_of(data: bytes, path: Path) -> Path:
    """These bytes under a name of their own beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)  # mkstemp's files are their maker's alone
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The safetensors format, but the same bytes every time: the library's own writer shuffles the metadata."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    parts, end = [], 0
    for name, tensor in sorted(tensors.items()):
        parts.append(tensor.contiguous().numpy().tobytes())
        start, end = end, end + len(parts[-1])
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def read(path: Path, kind: str) -> Artefact:
    """What a file of this kind holds. Raises ValueError, which names the file and the mend, for any other file."""
    mend = f'choose a {kind} file that ConceptGuard saved, or fetch "{path.name}" again'
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with path.open("rb") as file:
            size, most = os.fstat(file.fileno()).st_size, KINDS[kind].limit
            if size > most:
                raise ValueError(f"it has {size} bytes, and a {kind} at most {most}")
            start = file.read(8)
            rest = header_size(start, size)
            head = file.read(rest)
            header_of(head)  # before the rest is read
            return parse(start + head + file.read(size - 8 - rest), kind)
    except (OSError, ValueError) as error:
        raise ValueError(f'cannot use "{path.name}": {error}; {mend}') from error


def kind_of(path: Path) -> str | None:
    """The kind that a file claims to be, from its header alone; None if it cannot be told."""
    try:
        with path.open("rb") as file:
            size = header_size(file.read(8), os.fstat(file.fileno()).st_size)
            metadata = header_of(file.read(size)).get("__metadata__", {})
        return metadata.get("kind") if metadata.get("format") == FORMAT else None
    except (OSError, ValueError):
        return None


def header_size(start: bytes, size: int) -> int:
    """Of a file of `size` bytes that begins so."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError("it is cut short, or is no safetensors file")
    if length > HEADER:
        raise ValueError(f"its header has {length} bytes, more than the {HEADER} that are read")
    return length


def header_of(data: bytes) -> dict[str, Any]:
    """A header's JSON: tensor name -> dtype, shape, data_offsets, and text -> text under __metadata__."""
    try:
        header = json.loads(data, object_pairs_hook=without_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__}); it is no safetensors file") from None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is not a safetensors file's")
    return header


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("the same name twice")
    return found


def parse(data: bytes, kind: str) -> Artefact:
    """A whole file's bytes, checked: who wrote it, its tensors' names, dtypes and shapes, its numbers."""
    size = header_size(data[:8], len(data))
    header = header_of(data[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    about = described(metadata, kind)
    sizes = check_shapes(header, KINDS[kind].tensors)
    for letter, key in (("W", "text_width"), ("T", "tokens")):
        if sizes.get(letter, about[key]) != about[key]:
            raise ValueError(f"its {key} is {about[key]}, but its tensors have {sizes[letter]}")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"its tensors cannot be read ({error})") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"its tensor {name} holds NaN or infinity")
    return Artefact(kind, tensors=tensors, **about)


def described(metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    """An Artefact's fields from a file's metadata."""
    if metadata.get("format") != FORMAT:
        raise ValueError("ConceptGuard did not write it")
    if metadata.get("schema") != str(SCHEMA):
        raise ValueError(
            f"it has version {metadata.get('schema', '')[:20]!r} of our format, and this ConceptGuard "
            f"reads version {SCHEMA} only; update ConceptGuard"
        )
    if metadata.get("kind") != kind:
        raise ValueError(f"it holds a {metadata.get('kind', 'nothing')[:40]}, not a {kind}")
    try:
        about: dict[str, Any] = {key: metadata[key] for key in TEXT}
        about |= {key: int(metadata[key]) for key in ("text_width", "tokens")}
        concepts, training = json.loads(metadata["concepts"]), json.loads(metadata["training"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"its metadata is damaged ({type(error).__name__})") from None
    if not isinstance(concepts, list) or not all(isinstance(c, str) for c in concepts):
        raise ValueError("its metadata is damaged (concepts)")
    if not isinstance(training, dict) or min(about["text_width"], about["tokens"]) < 0:
        raise ValueError("its metadata is damaged (training)")
    return {**about, "concepts": tuple(concepts), "training": training}


def check_shapes(header: Mapping[str, Any], allowed: Mapping[str, Shape]) -> dict[str, int]:
    """The sizes that the letters of a kind's shapes stand for; raises if a tensor is not as its row says."""
    sizes: dict[str, int] = {}
    shapes = {name.removesuffix("?"): shape for name, shape in allowed.items()}
    if unknown := header.keys() - shapes.keys():
        raise ValueError(f"it has a tensor {min(unknown)[:40]!r}, which does not belong there")
    if missing := {name for name in allowed if not name.endswith("?")} - header.keys():
        raise ValueError(f"it lacks the tensor {min(missing)!r}")
    for name, entry in header.items():
        dtype, shape = (entry.get(key) for key in ("dtype", "shape")) if isinstance(entry, dict) else (None, None)
        if dtype != "F32":
            raise ValueError(f"its tensor {name} has the dtype {str(dtype)[:20]}, not F32")
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"its tensor {name} has no shape")
        known, row = dict(sizes), shapes[name]
        wanted = [sizes.setdefault(n, m) if isinstance(n, str) else n for n, m in zip(row, shape, strict=False)]
        if shape != wanted or len(shape) != len(row):
            raise ValueError(f"its tensor {name} has the shape {str(shape)[:60]}, not {written(row, known)}")
    return sizes


def written(shape: Shape, sizes: Mapping[str, int]) -> str:
    return f"[{', '.join(str(sizes.get(n, n) if isinstance(n, str) else n) for n in shape)}]"


PART = re.compile(r"(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))\w[\w ()+,=@-]*(?:\.[\w ()+,=@-]+)*", re.IGNORECASE)


def file_in(folder: Path, name: str) -> Path:
    """folder/name.safetensors for a name such as "sharp things" or "mine/sharp things"; never outside the folder."""
    name = name.strip().removesuffix(".safetensors")
    parts = name.split("/")
    if len(name) > 150 or not all(PART.fullmatch(part) and not part.endswith(" ") for part in parts):
        raise ValueError(
            f"{name[:60]!r} cannot name a file here; use letters, digits, spaces and - _ , with / for a "
            "folder inside the models folder"
        )
    path = folder.joinpath(*parts[:-1], f"{parts[-1]}.safetensors")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of the models folder by a link; choose another name")
    return path


def unused(path: Path) -> Path:
    """The path with the first number from 1 that no file has: name_00001.safetensors."""
    stems: Iterable[str] = (file.stem for file in path.parent.glob("*.safetensors")) if path.parent.is_dir() else ()
    pattern = re.compile(re.escape(path.stem) + r"_(\d{5,})")
    taken = [int(found[1]) for stem in stems if (found := pattern.fullmatch(stem))]
    return path.with_name(f"{path.stem}_{max(taken, default=0) + 1:05}{path.suffix}")


@cache
def package_version() -> str:
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    found = re.search(r'^version = "([^"]+)"', project.read_text(encoding="utf-8"), re.M) if project.is_file() else None
    return found[1] if found else "unknown"
