"""A preset's .safetensors form: the document in the metadata, and the tensors of the files that travel along.

Tensor "0/b" is the tensor b of the document's first file, whose own metadata stands under "file 0". Both forms hold the
same: here files become bytes again, and whoever reads the document compares them with their sha256.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..files.header import FORMAT, header_and_body, json_of, packed
from ..files.migrate import stamped
from . import versions

PACKED = "preset"


def is_packed(data: bytes) -> bool:
    """Whether these bytes begin as a safetensors file does: with a length, which no JSON has."""
    return b"\0" in data[:8] and data[8:9] == b"{"


def pack(document: str) -> bytes:
    """A checked document's .safetensors form."""
    found = json.loads(document)
    metadata = {"format": FORMAT, "kind": PACKED, "schema": str(found["schema_version"])}
    if "needs" in found:
        metadata["needs"] = json.dumps(found["needs"])
    tensors: dict[str, Tensor] = {}
    for i, file in enumerate(found.get("files", [])):
        data = base64.b64decode(file.pop("data"))
        metadata[f"file {i}"] = json.dumps(header_and_body(data)[0]["__metadata__"])
        tensors |= {f"{i}/{name}": tensor for name, tensor in load(data).items()}
    return packed(tensors, {**metadata, "document": json.dumps(found, ensure_ascii=False)})


def unpacked(data: bytes) -> bytes:
    """The JSON of a .safetensors form. Raises ValueError for other files; whether it is a preset, `read` says."""
    header, _ = header_and_body(data)
    metadata = header.pop("__metadata__", {})
    if metadata.get("format") != FORMAT or metadata.get("kind") != PACKED:
        raise ValueError("it is a safetensors file, but no preset; choose one that ConceptGuard exported")
    versions.admit(*stamped(metadata))
    if not all(isinstance(entry, dict) and entry.get("dtype") == "F32" for entry in header.values()):
        raise ValueError("it has a tensor that is not of type F32; export the preset again")
    try:
        document = json_of(metadata["document"])
        files = document.get("files", [])
        tensors = load(data)
        for i, file in enumerate(files):
            file["data"] = filled(i, tensors, metadata)
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"its document is damaged ({type(error).__name__}); export the preset again") from None
    if tensors:
        raise ValueError(f"it has a tensor {min(tensors)[:40]!r} that belongs to no file; export the preset again")
    return json.dumps(document).encode()


def filled(i: int, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """The i-th file in base64; its tensors are taken away."""
    names = [name for name in tensors if name.startswith(f"{i}/")]
    own: dict[str, Any] = {name.split("/", 1)[1]: tensors.pop(name) for name in names}
    about = json_of(metadata[f"file {i}"])
    return base64.b64encode(packed(own, about)).decode()
