"""What the documents of all methods share: exact types, words and files, the rules of gates, an edit's numbers."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from ..edits import spec
from ..edits.concept import NEUTRAL, concept_from_text
from ..edits.learned import concept_of
from ..edits.spec import complaint_about, too_late
from ..files import artefacts
from ..gates.gates import image_gate, in_flight_gate, prompt_gate
from .texts import Percent, Phrase, Prose, Sha256, file_name
from .versions import since

MAX_LEARNED = 2**20  # bytes of all files that travel along: a workflow, and each of its pictures, carries them


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
    instead: Annotated[tuple[Phrase, ...], Field(max_length=8), since(2, "what to draw instead")] = ()
    kind: Annotated[Literal["thing", "style"], since(4, "concepts that are styles")] = "thing"

    @property
    def count(self) -> int:
        """Phrases that cost a cross-attention."""
        return len(self.phrases) + len(self.keep)

    def encoded(self, clip: Any) -> spec.Concept:
        text, neutral, keep, instead = map("\n".join, (self.phrases, self.neutral, self.keep, self.instead))
        return concept_from_text(clip, text, self.name, neutral, keep, instead, self.kind)

    def concept(self, maker: Any) -> spec.Concept:
        given = maker.given
        return self.encoded(given.clip) if given.concept is None else given.concept(self)

    def files(self) -> Iterator[tuple[LearnedFile, str]]:
        """The learned files that it needs, each with its kind."""
        yield from ()

    def said(self) -> str:
        phrases = "" if self.phrases == (self.name,) else f" ({'; '.join(self.phrases)})"
        return f'{"the style " if self.kind == "style" else ""}"{self.name}"{phrases}'


class LearnedFile(Part):
    """A file that the document needs, known by its contents; its name is for people."""

    file: Annotated[str, Field(min_length=1, max_length=120), AfterValidator(file_name)]
    sha256: Sha256

    count: ClassVar[int] = 0  # as a concept it says neither its phrases nor what it keeps
    phrases: ClassVar[tuple[str, ...]] = ()
    keep: ClassVar[tuple[str, ...]] = ()
    instead: ClassVar[tuple[str, ...]] = ()

    def concept(self, maker: Any) -> spec.Concept:
        return concept_of(maker.artefact(self, "concept"))

    def files(self) -> Iterator[tuple[LearnedFile, str]]:
        yield self, "concept"

    def said(self) -> str:
        return f"the concept in {self.file}"


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


def parsed(file: Embedded, kind: str) -> artefacts.Artefact:
    """What a file that travels along holds, as strictly checked as one of the models folder."""
    try:
        return artefacts.parse(bytes_of(file), kind)
    except ValueError as error:
        raise ValueError(f'cannot use "{file.file}": {error}; export the preset again') from None


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

    def made(self, judge: Any, given: Any) -> spec.Gate:
        """The gate. judge: a discriminator, or the edit's own concept; given: presets.apply.Given."""
        raise NotImplementedError

    def too_late(self, start_percent: float, end_percent: float) -> str | None:
        """What is wrong with it for an edit of this window."""
        return None

    def said(self) -> str:
        """The end of a sentence."""
        raise NotImplementedError

    def shown(self, discriminator: LearnedFile | None) -> str:
        judge = discriminator.file if discriminator is not None else "its likeness to the concept"
        return f"({judge}, from {self.threshold:g}{', the surer the stronger' if self.soft else ''})"


class ImageGate(Gate):
    kind: Literal["image"]
    discriminator: LearnedFile
    decides: Literal["each", "any"] = "each"

    def made(self, judge: Any, given: Any) -> spec.Gate:
        image = needed("image", "a reference picture", given.image)
        return image_gate(judge, image, self.threshold, self.soft, self.decides)[0]

    def said(self) -> str:
        which = "any" if self.decides == "any" else "the"
        return f", only if {which} reference picture shows it {self.shown(self.discriminator)}"


class PromptGate(Gate):
    """Without a discriminator the prompt is compared with the edit's own concept."""

    kind: Literal["prompt"]
    discriminator: LearnedFile | None = None

    def made(self, judge: Any, given: Any) -> spec.Gate:
        text = needed("text", "the prompt", given.text)
        return prompt_gate(judge, given.clip, text, self.threshold, self.soft)[0]

    def said(self) -> str:
        return f", only if the prompt asks for it {self.shown(self.discriminator)}"


class InFlightGate(Gate):
    kind: Literal["in-flight"]
    discriminator: LearnedFile
    at_percent: Annotated[float, Field(ge=0, lt=1)] = 0.3
    restart: bool = True
    decode: Literal["vae", "preview"] = "vae"

    def made(self, judge: Any, given: Any) -> spec.Gate:
        vae = needed("vae", "a VAE", given.vae) if self.decode == "vae" else None
        return in_flight_gate(judge, vae, self.at_percent, self.threshold, self.soft, self.restart, given.report)

    def too_late(self, start_percent: float, end_percent: float) -> str | None:
        return None if self.restart else too_late(self.at_percent, start_percent, end_percent)

    def said(self) -> str:
        again = "; it then begins again" if self.restart else ""
        when = f"at {100 * self.at_percent:g} % of the timesteps"
        return f", only in pictures that show it {when} {self.shown(self.discriminator)}{again}"


AnyGate = Annotated[ImageGate | PromptGate | InFlightGate, Field(discriminator="kind")]
GATES = {"image": ImageGate, "prompt": PromptGate, "in-flight": InFlightGate}


def needed(input: str, what: str, value: Any) -> Any:
    if value is None:
        raise ValueError(
            f"its gate needs {what}; give it to a Preset Gate node (`{input}`), and connect that to `gate`"
        )
    return value


class Edit(Part):
    """What all edits share; the same limits as the nodes'. `why` gives the reasons for the numbers.

    A method's own class adds `method`, a Literal of the method's label.
    """

    strength: Annotated[float, Field(ge=0, le=16)] = 1.0
    start_percent: Percent = 0.0
    end_percent: Percent = 1.0
    blocks: Annotated[str, Field(min_length=1, max_length=200)] = "all"
    gate: AnyGate | None = None
    why: Prose = ""
    rows: Literal["conditional", "all"] = "conditional"

    @model_validator(mode="after")
    def _as_the_nodes_check(self) -> Edit:
        complaint = complaint_about(self.strength, self.start_percent, self.end_percent, self.blocks)
        if self.gate is not None:
            complaint = complaint or self.gate.too_late(self.start_percent, self.end_percent)
        if complaint:
            raise ValueError(complaint)
        return self

    @property
    def phrases(self) -> int:
        """How many cost a cross-attention at every step."""
        return 0

    def learned(self) -> Iterator[tuple[LearnedFile, str]]:
        """The learned files that it needs, each with the kind of file that it must be (artefacts.KINDS)."""
        if self.gate is not None and self.gate.discriminator is not None:
            yield self.gate.discriminator, "discriminator"


class ConceptEdit(Edit):
    """One of a concept, in words or learned."""

    concept: Source

    @property
    def phrases(self) -> int:
        return self.concept.count

    def learned(self) -> Iterator[tuple[LearnedFile, str]]:
        yield from self.concept.files()
        yield from super().learned()


class LearnedEdit(Edit):
    """One without a concept."""

    @model_validator(mode="after")
    def _a_gate_that_knows_what_to_look_for(self) -> LearnedEdit:
        if self.gate is not None and self.gate.discriminator is None:
            raise ValueError("a prompt gate needs a discriminator here: the edit has no concept to compare with")
        return self
