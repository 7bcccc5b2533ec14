"""The safetensors format: its header, which is read and judged before the rest of a file, and bytes to write."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

FORMAT = "concept-guard"  # what our files say under "format"
DTYPES = {torch.float32: "F32", torch.float16: "F16"}  # that we write; ours are all fp32, the host's LoRAs fp16
HEADER = 2**20  # bytes of names, shapes and metadata that a file may have


class Twins(ValueError):
    """A name stands twice in an object of JSON: readers differ in which of the two they take."""


def json_of(text: str | bytes, **options: Any) -> Any:
    """Anybody's JSON; options: json.loads's. Raises ValueError, or RecursionError for one too deep."""
    return json.loads(text, object_pairs_hook=without_twins, **options)


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Twins(f"has the name {name[:40]!r} twice in one place")
        found[name] = value
    return found


def header_in(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of an open file, of which no more is read, and how many bytes follow it."""
    size = os.fstat(file.fileno()).st_size
    length = header_size(file.read(8), size)
    return header_of(file.read(length)), size - 8 - length


def header_and_body(data: bytes) -> tuple[dict[str, Any], int]:
    """The same of a whole file's bytes."""
    length = header_size(data[:8], len(data))
    return header_of(data[8 : 8 + length]), len(data) - 8 - length


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
        header = json_of(data)
    except Twins as error:
        raise ValueError(f"its header {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__}); it is no safetensors file") from None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is not a safetensors file's")
    return header


def packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file's bytes, the same every time: the library's own writer shuffles the metadata."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    parts, end = [], 0
    for name, tensor in sorted(tensors.items()):
        parts.append(tensor.contiguous().numpy().tobytes())
        start, end = end, end + len(parts[-1])
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])
