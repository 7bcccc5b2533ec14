"""Safety presets: one JSON document that says what to keep out of pictures and how, to share and to read.

A document comes from anybody, so `read` takes nothing on trust: it is small, shallow, of known fields with the exact
types, finite numbers within the nodes' own limits, and texts without control characters or hidden directions of
writing. What it passes can only do what the nodes could do by hand. preset_edits.py turns it into edits and back.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from .cre import DEFAULTS as CRE
from .encode import NEUTRAL
from .spec import complaint_about

KIND = "concept-guard preset"
VERSION = 1
MAX_BYTES = 256 * 1024
MAX_PHRASES = 256  # in the whole document: each costs a cross-attention at every step
JOINERS = "\u200c\u200d"  # several scripts cannot be written without them
METHODS = {"CRE": "projection", "EIUP": "erasure", "KPOP": "prompt", "safe region": "direction"}


# --- texts -----------------------------------------------------------------------------------------------------------


def plain(text: str, allowed: str = "") -> str:
    """Raise for characters that do not show, or change how others show."""
    for c in text:
        if c not in allowed and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            raise ValueError(f"holds the invisible character U+{ord(c):04X}; take it out")
    return text


def line(text: str, allowed: str = "") -> str:
    if plain(text, allowed) != text.strip():
        raise ValueError("begins or ends with a space; take it away")
    return text


def name(text: str) -> str:
    if line(text) != unicodedata.normalize("NFC", text):
        raise ValueError("is not in Unicode's composed form (NFC); write it anew")
    return text


def phrase(text: str) -> str:
    if "embedding:" in line(text, JOINERS).lower():  # the host's text encoders read a file there
        raise ValueError('names a file ("embedding:"); a phrase of a preset is words alone')
    return text


def file_name(text: str) -> str:
    if not text.endswith(".safetensors") or any(c in '/\\:*?"<>|' for c in name(text)) or text.startswith("."):
        raise ValueError("must be the bare name of a .safetensors file, without a folder")
    return text


Name = Annotated[str, Field(min_length=1, max_length=80), AfterValidator(name)]
Phrase = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(phrase)]
Prose = Annotated[str, Field(max_length=4000), AfterValidator(lambda text: plain(text, "\n" + JOINERS))]
Line = Annotated[str, Field(max_length=200), AfterValidator(line)]
Percent = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


# --- the document ----------------------------------------------------------------------------------------------------


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


class Artefact(Part):
    """A learned file that the document needs, known by its contents."""

    file: Annotated[str, Field(min_length=1, max_length=120), AfterValidator(file_name)]
    sha256: Sha256


def words_or_file(value: Any) -> str:
    return "file" if isinstance(value, Artefact) or (isinstance(value, dict) and "file" in value) else "words"


Source = Annotated[
    Annotated[Words, Tag("words")] | Annotated[Artefact, Tag("file")],
    Discriminator(words_or_file),
]


class Gate(Part):
    """Which discriminator decides whether an edit is on."""

    kind: Literal["image", "prompt", "in-flight"]
    threshold: Percent = 0.5
    discriminator: Artefact | None = None


class Edit(Part):
    """What all edits share; the same limits as the nodes'. `why` gives the reasons for the numbers."""

    strength: Annotated[float, Field(ge=0, le=16)] = 1.0
    start_percent: Percent = 0.0
    end_percent: Percent = 1.0
    blocks: Annotated[str, Field(min_length=1, max_length=200)] = "all"
    gate: Gate | None = None
    why: Prose = ""

    @model_validator(mode="after")
    def _as_the_nodes_check(self) -> Edit:
        complaint = complaint_about(self.strength, self.start_percent, self.end_percent, self.blocks)
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


Weight = Annotated[float, Field(ge=-256, le=256)]


class EIUPEdit(Edit):
    method: Literal["EIUP"]
    concept: Source
    weights: Annotated[tuple[Weight, ...], Field(min_length=1, max_length=64)] = (-1.0,)
    form: Literal["separate", "joint"] = "separate"
    evidence: Literal["none", "share"] = "none"

    @model_validator(mode="after")
    def _a_weight_for_each_phrase(self) -> EIUPEdit:
        if isinstance(self.concept, Words) and len(self.weights) not in (1, len(self.concept.phrases)):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.concept.phrases)} phrases; give one, or as many"
            )
        return self


class KPOPEdit(Edit):
    method: Literal["KPOP"]
    prompt: Artefact


class DirectionEdit(Edit):
    method: Literal["safe region"]
    direction: Artefact


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

    @model_validator(mode="after")
    def _not_too_much(self) -> Preset:
        concepts = [edit.concept for edit in self.edits if isinstance(edit, CREEdit | EIUPEdit)]
        count = sum(len(concept.phrases) for concept in concepts if isinstance(concept, Words))
        if count > MAX_PHRASES:
            raise ValueError(f"{count} phrases in all; {MAX_PHRASES} are the most that a preset may have")
        return self


class Header(BaseModel):
    """What tells a newer document from a broken one."""

    model_config = ConfigDict(strict=True)  # true is not 1
    schema_version: int
    kind: str


def read(document: str | bytes) -> Preset:
    """The document, checked. Raises ValueError that says what is wrong with it, and nothing else."""
    try:
        data = document.encode() if isinstance(document, str) else document
    except UnicodeEncodeError:
        raise ValueError("preset: it is not text in Unicode; export it again") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"preset: it is larger than {MAX_BYTES // 1024} KB; a preset is words and numbers")
    if not data.strip():
        raise ValueError("preset: it is empty; choose one in the ConceptGuard panel, or paste a preset's text")
    if not data.lstrip().startswith(b"{"):
        raise ValueError("preset: it is not a JSON object; a preset is a .json file that ConceptGuard wrote")
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


def explained(error: ValidationError, most: int = 3) -> str:
    """The first complaints, each with its place in the document."""
    out = []
    for each in error.errors(include_url=False, include_input=False, include_context=False)[:most]:
        place = ".".join(str(step)[:40] for step in each["loc"])
        message = each["msg"].removeprefix("Value error, ")[:200]
        out.append(f"{place}: {message}" if place else message)
    more = error.error_count() - most
    return "; ".join(out) + (f"; and {more} more" if more > 0 else "")


# --- in plain words --------------------------------------------------------------------------------------------------


def described(preset: Preset) -> list[str]:
    """What each edit will do, a line each."""
    return [f"{_what(edit)}, {_when(edit)}{_where(edit)}{_whether(edit)}." for edit in preset.edits]


def _what(edit: Edit) -> str:
    if isinstance(edit, KPOPEdit):
        return f"Puts the learned prompt {edit.prompt.file} back (KPOP, strength {edit.strength:g})"
    if isinstance(edit, DirectionEdit):
        return f"Moves the prompt along {edit.direction.file} (safe region, strength {edit.strength:g})"
    assert isinstance(edit, CREEdit | EIUPEdit)
    if isinstance(edit.concept, Artefact):
        thing = f"the concept in {edit.concept.file}"
    else:
        thing = f'"{edit.concept.name}"'
        if edit.concept.phrases != (edit.concept.name,):
            thing += " (" + "; ".join(edit.concept.phrases) + ")"
    if isinstance(edit, CREEdit):
        return f"{'Erases' if edit.strength else 'Leaves'} {thing} (CRE, strength {edit.strength:g})"
    weights = ", ".join(f"{weight:g}" for weight in edit.weights)
    verb = "Adds" if all(weight > 0 for weight in edit.weights) else "Weakens or adds"
    verb = "Takes away" if all(weight <= 0 for weight in edit.weights) else verb
    scaled = "" if edit.strength == 1 else f", strength {edit.strength:g}"
    return f"{verb} what attends to {thing} (EIUP, weight {weights}{scaled})"


def _when(edit: Edit) -> str:
    if edit.start_percent >= edit.end_percent:
        return "never active"
    if (edit.start_percent, edit.end_percent) == (0, 1):
        return "through the whole sampling"
    return f"from {100 * edit.start_percent:g} % to {100 * edit.end_percent:g} % of the timesteps"


def _where(edit: Edit) -> str:
    return "" if edit.blocks.strip() == "all" else f", in {edit.blocks}"


def _whether(edit: Edit) -> str:
    return "" if edit.gate is None else f", where the {edit.gate.kind} gate says so (from {edit.gate.threshold:g})"
