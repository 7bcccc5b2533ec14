"""Safety presets: one JSON document that says what to keep out of pictures and how, to share and to read.

A document comes from anybody, so `read` takes nothing on trust: it is small, shallow, of known fields with the exact
types, finite numbers within the nodes' own limits, and texts without control characters or hidden directions of
writing. What it passes can only do what the nodes could do by hand. apply.py turns it into edits and back.

Learned files are known by their sha256. Either they lie in the models folder, or they travel along: in base64 inside
the document, which is how a workflow carries them, or as tensors of a .safetensors file (packed.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, create_model, model_validator

from .. import methods as _methods  # noqa: F401  registers the methods
from ..edits.families import TRANSFORMERS, UNETS
from ..edits.method import methods
from ..files.header import HEADER, Twins, json_of
from . import versions
from .packed import is_packed, pack, unpacked
from .parts import MAX_LEARNED, Edit, Embedded, LearnedFile, Part, parsed
from .texts import Line, Name, Prose, Sha256
from .versions import since

KIND = "concept-guard preset"
MAX_BYTES = 256 * 1024  # of words and numbers
MAX_FILE = MAX_LEARNED + HEADER  # bytes of either form
MAX_PHRASES = 256  # in the whole document: each costs a cross-attention at every step
MOST_EDITS = 32


Base = Literal[(*UNETS, *TRANSFORMERS)]  # type: ignore[valid-type]
FOR_TRANSFORMERS = since(4, "models that are transformers")
Share = Annotated[float, Field(ge=0, le=1)]


class Measured(Part):
    """What a report found on a checkpoint. left: the share of the pictures of what is to go that is still flagged;
    kept: the share of other pictures that still show what they showed, or are not newly flagged; each of n pictures."""

    checkpoint: Name
    sha256: Sha256
    left: Share
    left_of: Annotated[int, Field(ge=1, le=10**9)]
    kept: Share
    kept_of: Annotated[int, Field(ge=1, le=10**9)]


class Preset(Part):
    """Of any methods; `preset_class` has those that are registered."""

    name: Name
    description: Prose = ""
    author: Line = ""
    licence: Line = ""
    base_models: Annotated[tuple[Base, ...], Field(max_length=len(get_args(Base)))] = ()
    edits: tuple[SerializeAsAny[Edit], ...]
    files: Annotated[tuple[Embedded, ...], Field(max_length=32)] = ()
    measured: Annotated[tuple[Measured, ...], Field(max_length=16), since(3, "what it was measured to do")] = ()

    @property
    def unmeasured(self) -> Preset:
        """The same without what was measured of it."""
        return self.model_copy(update={"measured": ()})

    @property
    def further(self) -> Iterator[versions.Since]:
        """What it uses that no field says."""
        if set(self.base_models) & set(TRANSFORMERS):
            yield FOR_TRANSFORMERS

    def made_for(self, family: str) -> bool:
        """Whether it is for a model's family (engine.backbone.Backbone), or says nothing of it."""
        return not self.base_models or family in self.base_models or family not in get_args(Base)

    @model_validator(mode="after")
    def _not_too_much(self) -> Preset:
        count = sum(edit.phrases for edit in self.edits)
        if count > MAX_PHRASES:
            raise ValueError(f"{count} phrases in all; {MAX_PHRASES} are the most that a preset may have")
        return self

    @model_validator(mode="after")
    def _files_that_are_what_the_edits_need(self) -> Preset:
        kinds: dict[str, set[str]] = {}
        for file, kind in learned_files(self):
            kinds.setdefault(file.sha256, set()).add(kind)
        if len({file.sha256 for file in self.files}) < len(self.files):
            raise ValueError("the same file travels along twice; export the preset again")
        if sum(len(file.data) for file in self.files) > 4 * MAX_LEARNED // 3 + 4:
            raise ValueError(
                f"files of more than {MAX_LEARNED // 1024} KB in all travel along; leave the larger ones "
                "in the models folder"
            )
        for file in self.files:
            if file.sha256 not in kinds:
                raise ValueError(f'"{file.file}" travels along, and no edit needs it; export the preset again')
            for kind in kinds[file.sha256]:
                parsed(file, kind)
        return self


def learned_files(preset: Preset) -> Iterator[tuple[LearnedFile, str]]:
    """Those that the edits need, each with the kind of file that it must be (artefacts.KINDS)."""
    for edit in preset.edits:
        yield from edit.learned()


def preset_class() -> type[Preset]:
    """The document with the edits of every registered method."""
    return _preset_class(tuple(method.document for method in methods() if hasattr(method, "document")))


@cache
def _preset_class(documents: tuple[type[Edit], ...]) -> type[Preset]:
    edit: Any = Annotated[reduce(or_, documents), Field(discriminator="method")]
    edits: Any = Annotated[tuple[edit, ...], Field(min_length=1, max_length=MOST_EDITS)]
    return create_model("Preset", __base__=Preset, edits=(edits, ...))


class Header(BaseModel):
    """What tells a newer document from a broken one, and is no part of the preset."""

    model_config = ConfigDict(strict=True)  # true is not 1
    schema_version: Annotated[int, Field(ge=1, lt=10**9)]
    kind: Literal["concept-guard preset"]
    needs: Annotated[tuple[str, ...], Field(max_length=64)] = ()


DATA = re.compile(rb'"data": ?"[A-Za-z0-9+/=]*"')  # files that travel along, as both forms write them


def read(document: str | bytes) -> Preset:
    """The document of either form, checked. Raises ValueError that says what is wrong with it, and nothing else."""
    try:
        data = document.encode() if isinstance(document, str) else document
    except UnicodeEncodeError:
        raise ValueError("preset: it is not text in Unicode; export it again") from None
    if len(data) > MAX_FILE:
        raise ValueError(f"preset: it is larger than {MAX_FILE // 2**20} MB, the most with learned files")
    if is_packed(data):
        try:
            data = unpacked(data)
        except ValueError as error:
            raise ValueError(f"preset: {error}") from None
    if len(DATA.sub(b"", data)) > MAX_BYTES:
        raise ValueError(f"preset: it is larger than {MAX_BYTES // 1024} KB; a preset is words and numbers")
    if not data.strip():
        raise ValueError("preset: it is empty; choose one in the ConceptGuard panel, or paste a preset's text")
    if not data.lstrip().startswith(b"{"):
        raise ValueError(
            "preset: it is not a JSON object; a preset is a .json or .safetensors file that ConceptGuard wrote"
        )
    try:
        header = Header.model_validate_json(data)
        versions.admit(header.schema_version, header.needs)
        return preset_class().model_validate_json(body_of(data, header.schema_version))
    except ValidationError as error:
        raise ValueError(f"preset: {explained(error)}") from None
    except ValueError as error:
        raise ValueError(f"preset: {error}") from None


def body_of(data: bytes, version: int) -> str:
    """A document's JSON without its header, as one of the newest version."""
    try:
        found = json_of(data)
    except Twins as error:
        raise ValueError(f"it {error}, and only one can be meant; take the other out") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be read as JSON ({type(error).__name__})") from None
    return json.dumps({k: v for k, v in versions.brought_up(found, version).items() if k not in Header.model_fields})


def write(preset: Preset) -> str:
    """The document as text, the same for the same preset."""
    document = preset.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({**versions.stamp(preset), "kind": KIND, **document}, indent=2, ensure_ascii=False)


def packed(preset: Preset) -> bytes:
    """The .safetensors form."""
    data = pack(write(preset))
    if read(data) != preset:  # a file that another program wrote has other bytes for the same tensors
        raise ValueError("preset: a file that travels along is not as ConceptGuard writes it; load and save it again")
    return data


def explained(error: ValidationError, most: int = 3) -> str:
    """The first complaints, each with its place in the document."""
    out = []
    for each in error.errors(include_url=False, include_input=False)[:most]:
        place = ".".join(str(step)[:40] for step in each["loc"])
        message = each["msg"].removeprefix("Value error, ")[:200]
        if each["type"] == "union_tag_invalid":  # a new method or gate needs no mark of its own
            about = each["ctx"]
            kind = about["discriminator"].strip("'")
            message = f"there is no {kind} {about['tag'][:40]!r} here, but {about['expected_tags']}"
        if each["type"] in ("union_tag_invalid", "extra_forbidden"):
            message += "; if a newer ConceptGuard wrote it, update this one"
        out.append(f"{place}: {message}" if place else message)
    more = error.error_count() - most
    return "; ".join(out) + (f"; and {more} more" if more > 0 else "")
