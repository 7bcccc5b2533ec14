"""Safety presets: one JSON document that says what to keep out of pictures and how, to share and to read.

A document comes from anybody, so `read` takes nothing on trust: it is small, shallow, of known fields with the exact
types, finite numbers within the nodes' own limits, and texts without control characters or hidden directions of
writing. What it passes can only do what the nodes could do by hand. apply.py turns it into edits and back.

Learned files are known by their sha256. Either they lie in the models folder, or they travel along: in base64 inside
the document, which is how a workflow carries them, or as tensors of a .safetensors file (packed.py).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from ..edits.encode import NEUTRAL
from ..edits.spec import complaint_about, too_late
from ..files import artefacts
from ..methods.cre import DEFAULTS as CRE
from .packed import is_packed, pack, unpacked
from .texts import Line, Name, Percent, Phrase, Prose, Sha256, file_name

KIND = "concept-guard preset"
VERSION = 1
MAX_BYTES = 256 * 1024  # of words and numbers
MAX_LEARNED = 2**20  # bytes of all files that travel along: a workflow, and each of its pictures, carries them
MAX_FILE = MAX_LEARNED + artefacts.HEADER  # bytes of either form
MAX_PHRASES = 256  # in the whole document: each costs a cross-attention at every step
METHODS = {"CRE": "projection", "EIUP": "erasure", "KPOP": "prompt", "safe region": "direction"}


class Part(BaseModel):
    """Exact types, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Words(Part):
    """A concept in words; every phrase is one phrasing, compared with the mean of the neutral ones and with neighbours
    to keep."""

    name: Phrase
    phrases: Annotated[tuple[Phrase, ...], Field(min_length=1, max_length=64)]
    neutral: Annotated[tuple[Phrase, ...], Field(max_length=64)] = tuple(NEUTRAL.splitlines())
    keep: Annotated[tuple[Phrase, ...], Field(max_length=64)] = ()


class LearnedFile(Part):
    """A file that the document needs, known by its contents; its name is for people."""

    file: Annotated[str, Field(min_length=1, max_length=120), AfterValidator(file_name)]
    sha256: Sha256


class Embedded(LearnedFile):
    """A learned file that travels along, in base64."""

    data: Annotated[str, Field(max_length=4 * MAX_LEARNED // 3 + 4)]

    @model_validator(mode="after")
    def _what_it_says_it_is(self) -> Embedded:
        contents = bytes_of(self)
        if base64.b64encode(contents).decode() != self.data:
            raise ValueError(f'"{self.file}" is not in base64 as ConceptGuard writes it; export the preset again')
        if hashlib.sha256(contents).hexdigest() != self.sha256:
            raise ValueError(f'"{self.file}" has other contents than its sha256 says; export the preset again')
        return self


def bytes_of(file: Embedded) -> bytes:
    try:
        return base64.b64decode(file.data, validate=True)
    except ValueError:
        raise ValueError(f'"{file.file}" is not in base64; export the preset again') from None


def words_or_file(value: Any) -> str:
    return "file" if isinstance(value, LearnedFile) or (isinstance(value, dict) and "file" in value) else "words"


Source = Annotated[
    Annotated[Words, Tag("words")] | Annotated[LearnedFile, Tag("file")],
    Discriminator(words_or_file),
]


class Gate(Part):
    """Whether an edit is on. A value of its own: the gate nodes decide alike."""

    threshold: Percent = 0.5
    soft: bool = False


class ImageGate(Gate):
    kind: Literal["image"]
    discriminator: LearnedFile
    decides: Literal["each", "any"] = "each"


class PromptGate(Gate):
    """Without a discriminator the prompt is compared with the edit's own concept."""

    kind: Literal["prompt"]
    discriminator: LearnedFile | None = None


class InFlightGate(Gate):
    kind: Literal["in-flight"]
    discriminator: LearnedFile
    at_percent: Annotated[float, Field(ge=0, lt=1)] = 0.3
    restart: bool = True
    decode: Literal["vae", "preview"] = "vae"


AnyGate = Annotated[ImageGate | PromptGate | InFlightGate, Field(discriminator="kind")]


class Edit(Part):
    """What all edits share; the same limits as the nodes'. `why` gives the reasons for the numbers."""

    strength: Annotated[float, Field(ge=0, le=16)] = 1.0
    start_percent: Percent = 0.0
    end_percent: Percent = 1.0
    blocks: Annotated[str, Field(min_length=1, max_length=200)] = "all"
    gate: AnyGate | None = None
    why: Prose = ""

    @model_validator(mode="after")
    def _as_the_nodes_check(self) -> Edit:
        complaint = complaint_about(self.strength, self.start_percent, self.end_percent, self.blocks)
        if isinstance(self.gate, InFlightGate) and not self.gate.restart:
            complaint = complaint or too_late(self.gate.at_percent, self.start_percent, self.end_percent)
        if complaint:
            raise ValueError(complaint)
        return self


class CREEdit(Edit):
    method: Literal["CRE"]
    concept: Source
    width: Literal["full", "head"] = "full"
    tokens: Literal["all", "own"] = "all"
    baseline: Literal["none", "neutral"] = "neutral"
    negative: Literal["keep", "clip"] = "clip"
    solve: Literal["joint", "sum"] = "joint"
    floor: Percent = CRE.floor


Weight = Annotated[float, Field(ge=-16, le=16)]


class EIUPEdit(Edit):
    method: Literal["EIUP"]
    concept: Source
    weights: Annotated[tuple[Weight, ...], Field(min_length=1, max_length=64)] = (-1.0,)
    form: Literal["separate", "joint"] = "separate"
    evidence: Literal["none", "share", "alike"] = "none"

    @model_validator(mode="after")
    def _a_weight_for_each_phrase(self) -> EIUPEdit:
        if isinstance(self.concept, Words) and len(self.weights) not in (1, len(self.concept.phrases)):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.concept.phrases)} phrases; give one, or as many"
            )
        return self


class LearnedEdit(Edit):
    """One without a concept."""

    @model_validator(mode="after")
    def _a_gate_that_knows_what_to_look_for(self) -> LearnedEdit:
        if isinstance(self.gate, PromptGate) and self.gate.discriminator is None:
            raise ValueError("a prompt gate needs a discriminator here: the edit has no concept to compare with")
        return self


class KPOPEdit(LearnedEdit):
    method: Literal["KPOP"]
    prompt: LearnedFile
    blocks: Literal["all"] = "all"  # a prompt knows those that it was learned in


class DirectionEdit(LearnedEdit):
    method: Literal["safe region"]
    direction: LearnedFile


AnyEdit = Annotated[CREEdit | EIUPEdit | KPOPEdit | DirectionEdit, Field(discriminator="method")]


class Preset(Part):
    schema_version: Literal[1] = 1
    kind: Literal["concept-guard preset"] = "concept-guard preset"
    name: Name
    description: Prose = ""
    author: Line = ""
    licence: Line = ""
    base_models: Annotated[tuple[Literal["SD1.x", "SD2.x", "SDXL"], ...], Field(max_length=3)] = ()
    edits: Annotated[tuple[AnyEdit, ...], Field(min_length=1, max_length=32)]
    files: Annotated[tuple[Embedded, ...], Field(max_length=32)] = ()

    @model_validator(mode="after")
    def _not_too_much(self) -> Preset:
        concepts = [edit.concept for edit in self.edits if isinstance(edit, CREEdit | EIUPEdit)]
        count = sum(len(each.phrases) + len(each.keep) for each in concepts if isinstance(each, Words))
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
        if isinstance(edit, KPOPEdit):
            yield edit.prompt, "prompt"
        elif isinstance(edit, DirectionEdit):
            yield edit.direction, "direction"
        elif isinstance(edit, CREEdit | EIUPEdit) and isinstance(edit.concept, LearnedFile):
            yield edit.concept, "concept"
        if edit.gate is not None and edit.gate.discriminator is not None:
            yield edit.gate.discriminator, "discriminator"


def parsed(file: Embedded, kind: str) -> artefacts.Artefact:
    """What a file that travels along holds, as strictly checked as one of the models folder."""
    try:
        return artefacts.parse(bytes_of(file), kind)
    except ValueError as error:
        raise ValueError(f'cannot use "{file.file}": {error}; export the preset again') from None


class Header(BaseModel):
    """What tells a newer document from a broken one."""

    model_config = ConfigDict(strict=True)  # true is not 1
    schema_version: int
    kind: str


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
            data = unpacked(data, VERSION)
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
    except ValidationError as error:
        raise ValueError(f"preset: {explained(error)}") from None
    if header.kind == KIND and header.schema_version > VERSION:
        raise ValueError("preset: a newer ConceptGuard wrote it; update this one")
    try:
        return Preset.model_validate_json(data)
    except ValidationError as error:
        raise ValueError(f"preset: {explained(error)}") from None


def write(preset: Preset) -> str:
    """The document as text, the same for the same preset."""
    document = preset.model_dump(mode="json", exclude_defaults=True)
    head = {"schema_version": VERSION, "kind": KIND}
    return json.dumps({**head, **document}, indent=2, ensure_ascii=False)


def packed(preset: Preset) -> bytes:
    """The .safetensors form."""
    data = pack(write(preset), VERSION)
    if read(data) != preset:  # a file that another program wrote has other bytes for the same tensors
        raise ValueError("preset: a file that travels along is not as ConceptGuard writes it; load and save it again")
    return data


def explained(error: ValidationError, most: int = 3) -> str:
    """The first complaints, each with its place in the document."""
    out = []
    for each in error.errors(include_url=False, include_input=False, include_context=False)[:most]:
        place = ".".join(str(step)[:40] for step in each["loc"])
        message = each["msg"].removeprefix("Value error, ")[:200]
        out.append(f"{place}: {message}" if place else message)
    more = error.error_count() - most
    return "; ".join(out) + (f"; and {more} more" if more > 0 else "")
