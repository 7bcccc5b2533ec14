"""Learned files: safetensors that say what they hold, and of which nothing is believed before it is checked.

A kind of file is a row of KINDS. Reading costs at most the kind's limit in memory, looks at no more than the header of
a file that is not of the kind, and runs no code that a file brings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..edits.digest import Shared
from .header import FORMAT, header_and_body, header_in, json_of, packed
from .kinds import KINDS, check_tensors
from .migrate import brought_up, compare, newest, row_of, stamp, stamped
from .whole import put

TEXT = ("method", "name", "backbone", "mechanism", "blocks", "version")


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
        **stamp(artefact),
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
    unfinished = KINDS[artefact.kind].unfinished
    return replace(artefact, tensors={name: t for name, t in artefact.tensors.items() if name not in unfinished})


def read(path: Path, kind: str) -> Artefact:
    """What a file of this kind holds. Raises ValueError, which names the file and the mend, for any other file."""
    mend = f'choose a {kind} file that ConceptGuard saved, or fetch "{path.name}" again'
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with path.open("rb") as file:
            header, body = header_in(file)
            described(header, body, kind)  # before the rest is read
            size = file.tell() + body
            file.seek(0)
            return parse(file.read(size), kind)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error  # without the path
        raise ValueError(f'cannot use "{path.name}": {why}; {mend}') from error


def kind_of(path: Path) -> str | None:
    """The kind that a file claims to be, from its header alone; None if it cannot be told."""
    try:
        with path.open("rb") as file:
            metadata = header_in(file)[0].get("__metadata__", {})
        return metadata.get("kind") if metadata.get("format") == FORMAT else None
    except (OSError, ValueError):
        return None


def parse(data: bytes, kind: str) -> Artefact:
    """A whole file's bytes, checked: who wrote it, its tensors' names, dtypes and shapes, its numbers."""
    version, about = described(*header_and_body(data), kind)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"its tensors cannot be read ({error})") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"its tensor {name} holds NaN or infinity")
    return brought_up(Artefact(kind, tensors=tensors, **about), version)


def described(header: Mapping[str, Any], body: int, kind: str) -> tuple[int, dict[str, Any]]:
    """A file's version and what it says of itself, as an Artefact has it, once its header is found to be sound.

    body: the bytes that follow the header.
    """
    row = KINDS[kind]
    metadata = header.get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise ValueError("ConceptGuard did not write it")
    if metadata.get("kind") != kind:
        raise ValueError(f"it holds a {metadata.get('kind', 'nothing')[:40]}, not a {kind}")
    if body > row.limit:
        raise ValueError(f"it has {body} bytes of numbers, and a {kind} at most {row.limit}")
    version, needs = stamped(metadata)
    compare(version, needs, row.features, newest(row))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    sizes, about = check_tensors(tensors, row_of(row, version, needs), body), about_of(metadata)
    for letter, key in (("W", "text_width"), ("T", "tokens")):
        if sizes.get(letter, about[key]) != about[key]:
            raise ValueError(f"its {key} is {about[key]}, but its tensors have {sizes[letter]}")
    return version, about


def about_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """An Artefact's fields from a file's metadata."""
    try:
        about: dict[str, Any] = {key: metadata[key] for key in TEXT}
        about |= {key: int(metadata[key]) for key in ("text_width", "tokens")}
        concepts, training = json_of(metadata["concepts"]), json_of(metadata["training"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"its metadata is damaged ({type(error).__name__})") from None
    if not isinstance(concepts, list) or not all(isinstance(c, str) for c in concepts):
        raise ValueError("its metadata is damaged (concepts)")
    if not isinstance(training, dict) or min(about["text_width"], about["tokens"]) < 0:
        raise ValueError("its metadata is damaged (training)")
    return {**about, "concepts": tuple(concepts), "training": training}


@cache
def package_version() -> str:
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    found = re.search(r'^version = "([^"]+)"', project.read_text(encoding="utf-8"), re.M) if project.is_file() else None
    return found[1] if found else "unknown"
