"""Edits as data: what is edited, how strongly, when and where.

A spec holds numbers and CPU tensors only, so a MODEL that carries it can be cloned, cached and shared freely; whatever
depends on the model, its weights or its device is worked out while sampling (plan.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from ..files.artefacts import Artefact
from .blocks import parse_blocks
from .digest import Shared, digest
from .method import Method, method


@dataclass(frozen=True, eq=False)
class Phrase(Shared):
    """One phrasing of a concept as its text encoding. tokens: [1, T, W] fp32 on the CPU.

    like: rows [n, W] of the encodings of more prompts that say the same, for methods/said.py; stem: of the phrase
    itself there, if other than its own; becomes: such rows, and those in their place where these prompts say what is to
    be drawn instead, [n, W] each, for methods/reread.py;
    pooled: of the whole phrase, [1, P] fp32 on the CPU, if its text encoder makes one.
    """

    text: str
    tokens: Tensor
    own: tuple[int, ...]  # the positions of the phrase's own tokens: no start, end or padding
    like: tuple[Tensor, ...] = ()
    pooled: Tensor | None = None
    becomes: tuple[Tensor, Tensor] | None = None
    stem: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or len(self.tokens) != 1:
            raise ValueError(f'phrase "{self.text}": tokens of shape {tuple(self.tokens.shape)}, not [1, T, W]')
        if not self.own or not set(self.own) <= set(range(self.tokens.shape[1])):
            raise ValueError(f'phrase "{self.text}": own tokens {self.own} of {self.tokens.shape[1]}')

    @cached_property
    def key(self) -> str:
        later = [*self.like, *([] if self.pooled is None else [self.pooled]), *(self.becomes or ())]
        return digest((self.tokens, self.own, *later))


@dataclass(frozen=True, eq=False)
class Concept(Shared):
    """What an edit removes: phrasings, each one steering vector, and encodings [1, T, W] they are compared with.

    empty: of the empty prompt, if known; neutral: the mean of ordinary prompts', if other than that, and their text;
    keep: neighbours that must survive: an edit leaves alone what is more like one of them.
    instead: what is drawn in its place, [1, T, W], and its text; None: what it is compared with.
    ordinary: rows [n, W] of the encodings of prompts that do not say it, for methods/said.py; further: of such prompts
    in more words, where encodings themselves are asked.
    pooled, pooled_instead: as the phrases', [1, P], of what it is compared with, and of what is drawn in its place.
    beside: of an encoding, by its digest, what its text encoder says of the prompt beside it, for models that read that
    as well (edits/beside.py): of each of the prompts that it is the mean of.
    """

    socket = "concept"  # what nodes call an input that takes one
    name: str
    phrases: tuple[Phrase, ...]
    empty: Tensor | None = None
    neutral: Tensor | None = None
    neutral_text: str = ""
    keep: tuple[Phrase, ...] = ()
    artefact: Artefact | None = None  # what a file of it holds, if it was learned
    instead: Tensor | None = None
    instead_text: str = ""
    ordinary: tuple[Tensor, ...] = ()
    further: tuple[Tensor, ...] = ()
    pooled: Tensor | None = None
    pooled_instead: Tensor | None = None
    kind: Literal["thing", "style"] = "thing"  # of a style, phrases are what ordinary prompts become with it
    beside: Mapping[str, tuple[Mapping[str, Tensor], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        encodings = [phrase.tokens for phrase in (*self.phrases, *self.keep)]
        encodings += [tokens for tokens in (self.empty, self.neutral, self.instead) if tokens is not None]
        if not self.phrases or len({tokens.shape[-1] for tokens in encodings}) > 1:
            raise ValueError(f'concept "{self.name}" needs phrases, all of them encoded by the same text encoder')

    @property
    def width(self) -> int:
        return self.phrases[0].tokens.shape[-1]

    @property
    def baseline(self) -> Tensor | None:
        return self.empty if self.neutral is None else self.neutral

    @property
    def given_instead(self) -> Tensor | None:
        """What somebody said to draw instead, or a style's neutral prompts; None where `concept_from_text` chose."""
        if self.instead_text or not self.ordinary:
            return self.instead
        return self.neutral if self.kind == "style" else None

    @cached_property
    def apart(self) -> tuple[Tensor, list[Tensor]] | None:
        """Its phrases `apart` from the empty prompt, if that is known."""
        return None if self.empty is None else apart(self.phrases, self.empty)

    @cached_property
    def baseline_key(self) -> str:
        return "" if self.baseline is None else digest((self.baseline,))

    @cached_property
    def ordinary_key(self) -> str:
        return digest(self.ordinary)

    @cached_property
    def key(self) -> str:
        later = [
            x for x in (*self.ordinary, *self.further, self.instead, self.pooled, self.pooled_instead) if x is not None
        ]
        phrases = ([phrase.key for phrase in some] for some in (self.phrases, self.keep))
        further = [x for prompts in self.beside.values() for said in prompts for x in said.values()]
        return digest((self.baseline_key, *phrases, *later, *further))


def apart(phrases: Sequence[Phrase], empty: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What all tokens of an empty prompt's encoding [1, T, W] share, [W], and each phrase's own tokens without it, of
    length 1, [n, W]."""
    common = empty[0].mean(0)
    return common, [F.normalize(phrase.tokens[0, list(phrase.own)] - common, dim=-1) for phrase in phrases]


@dataclass(frozen=True, eq=False)
class PromptTokens(Shared):
    """Learned tokens that join the context, apart for keys and values. k, v: [1, n, W] fp32 on the CPU.

    mechanism and blocks: how and where they were learned (kpop.py). An edit appends them; what is to be added is a
    Direction.
    """

    socket = "prompt"
    name: str
    k: Tensor
    v: Tensor
    mechanism: str = "concat"
    blocks: str = "middle"
    artefact: Artefact | None = None  # what a file of it holds

    @property
    def width(self) -> int:
        return self.k.shape[-1]

    @cached_property
    def key(self) -> str:
        return digest((self.k, self.v))


@dataclass(frozen=True, eq=False)
class Direction(Shared):
    """A learned shift of the text encoding. d: [T, W] fp32 on the CPU, or [1, W] for the same shift at every token."""

    socket = "direction"
    name: str
    d: Tensor
    artefact: Artefact | None = None  # what a file of it holds

    @property
    def width(self) -> int:
        return self.d.shape[-1]

    @property
    def backbone(self) -> str:
        """The fingerprint of the model that it was learned on; empty for any, and for an additive prompt."""
        return self.artefact.backbone if self.artefact is not None and self.artefact.kind == "direction" else ""

    @cached_property
    def key(self) -> str:
        return digest((self.d,))


@dataclass(frozen=True, eq=False, repr=False)
class InFlight(Shared):
    """A decision made in a sampling run, at a percent of the timesteps, on the clean images predicted there; with a
    restart once more behind the last step, about the images that are not flagged yet, and about what the edit left.

    look: latents [B, C, h, w], as a VAE decodes them, and the model's latent format, to the confidence in each image,
    B floats from 0 to 1.
    report: told the confidences and the gate's values, one an image, whenever they are found, and whether that is what
    it sees when all has been done.
    """

    key: str  # of all that the decision depends on: the discriminator, the decoder
    look: Callable[[Tensor, Any], list[float]]
    at_percent: float
    threshold: float = 0.5
    soft: bool = False
    restart: bool = False  # begin again from the first noise, edited, if an edit's window has begun by then
    models: tuple[Any, ...] = ()  # the patchers that `look` uses, for the host to load along
    report: Callable[[list[float], tuple[float, ...], bool], None] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.at_percent < 1:
            raise ValueError(f"at_percent is {self.at_percent}; give a number from 0 (the first step) to below 1")

    def __repr__(self) -> str:
        return f"InFlight({(self.key, self.at_percent, self.threshold, self.soft, self.restart)})"

    @cached_property
    def id(self) -> str:
        """Gates of the same id decide alike: they are asked once."""
        return repr(self)


def opened(scores: list[float], threshold: float, soft: bool = False) -> tuple[float, ...]:
    """A gate's values: 1 for a confidence of at least `threshold`, the paper's round(f) at 0.5; or that confidence."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; give a number from 0 (always open) to 1")
    if not scores or not all(0 <= score <= 1 for score in scores):  # catches NaN as well
        raise ValueError(f"the discriminator gave {scores}, not a number from 0 to 1 for each image")
    return tuple((score if soft else 1.0) if score >= threshold else 0.0 for score in scores)


@dataclass(frozen=True, eq=False)
class Rule(Shared):
    """How a gate decides, whatever it decided about one run's pictures: what a preset keeps of it (gates.py).

    judge: a discriminator, or the concept that prompts are compared with; options: what only this kind has.
    """

    kind: str
    judge: Any
    threshold: float
    soft: bool
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate(Shared):
    """What a discriminator decided: one value per image of the batch, or one for all. 0 is closed, 1 open.

    With `inflight` its verdict, found during sampling, multiplies the values; until then the gate is closed.
    """

    values: tuple[float, ...] = (1.0,)
    inflight: InFlight | None = None
    rule: Rule | None = field(default=None, compare=False, repr=False, kw_only=True)

    drawn = False  # by lot, for each image

    def __post_init__(self) -> None:
        if not self.values or not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"a gate needs finite values, one or one per image, and has {self.values}")

    def per_image(self, images: int, window: tuple[int, ...] | None = None) -> tuple[float, ...]:
        """Values for so many images, or for those of a larger batch that `window` names."""
        if len(self.values) > 1 and window is not None and len(window) == images:
            if len(self.values) <= max(window):
                raise ValueError(
                    f"the gate decided about {len(self.values)} images, but a context window shows image "
                    f"{max(window) + 1}; give it as many images as the batch has, or one that decides for all"
                )
            return tuple(self.values[i] for i in window)
        if len(self.values) not in (1, images):
            raise ValueError(
                f"the gate decided about {len(self.values)} images, but {images} are being sampled at once; "
                "give it as many images as the batch has, or one that decides for all"
            )
        return self.values if len(self.values) == images else self.values * images

    def decided(self, verdict: tuple[float, ...]) -> Gate:
        """The gate once its `inflight` has found a verdict for each image."""
        return Gate(tuple(a * b for a, b in zip(self.per_image(len(verdict)), verdict, strict=True)))


@dataclass(frozen=True)
class Draw(Gate):
    """Open for the images that draw `index` of `of`, each image on its own: image i of a seed always draws the same."""

    gate: Gate = Gate()  # decides as well
    seed: str = ""
    index: int = 0
    of: int = 1

    drawn = True

    def per_image(self, images: int, window: tuple[int, ...] | None = None) -> tuple[float, ...]:
        gates = self.gate.per_image(images, window)
        shown = window if window is not None and len(window) == images else tuple(range(images))
        return tuple(gate * (draw(self.seed, i, self.of) == self.index) for i, gate in zip(shown, gates, strict=True))

    def decided(self, verdict: tuple[float, ...]) -> Draw:
        gate = self.gate.decided(verdict)
        return replace(self, values=gate.values, inflight=None, gate=gate)


def draw(seed: str, image: int, of: int) -> int:
    """One of `of` numbers, all of them as likely."""
    return random.Random(f"{seed} {image}").randrange(of)


ROWS = ("conditional", "all")


@dataclass(frozen=True, eq=False)
class EditSpec(Shared):
    """One edit of one MODEL: `method` applied with `source`, between two percents of the timesteps, in some blocks.

    scale: times the strength, one number an image of the batch, as a first look found them; empty: 1.
    rows: of a batch; "conditional", those of the prompts that the guider calls positive, or "all": where the guidance
    follows another prompt, or goes beyond all of them.
    last: whether it is applied to what all other edits leave (a server's policy), and not found together with them.
    """

    method: str
    source: Any  # of the method's own type: a Concept, a PromptTokens, a Direction
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    blocks: str = "all"
    gate: Gate = Gate()
    options: Any = None  # of the method's own type
    node: str = "ConceptGuard"  # who asked: every error names it
    scale: tuple[float, ...] = ()
    rows: str = ROWS[0]
    report: Callable[[str], None] | None = None  # told at the end of a run what the edit did in it
    last: bool = False

    def __post_init__(self) -> None:
        complaint = complaint_about(self.strength, self.start_percent, self.end_percent, self.blocks)
        try:
            how = self.how
        except ValueError as error:
            raise self.error(str(error)) from None
        if (type(self.source), type(self.options)) != (how.source, how.options):
            given = f"{type(self.source).__name__} and {type(self.options).__name__}"
            complaint = f"the method {self.method!r} cannot do anything with {given}"
        if self.rows not in ROWS:
            complaint = complaint or f"rows is {self.rows!r}; choose one of {', '.join(ROWS)}"
        complaint = complaint or how.complaint(self)
        flight = self.gate.inflight
        if flight and not flight.restart:
            complaint = complaint or too_late(flight.at_percent, self.start_percent, self.end_percent)
        if complaint:
            raise self.error(complaint)

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.node}: {text}")

    @property
    def how(self) -> Method:
        return method(self.method)

    @cached_property
    def idle(self) -> bool:
        """Whether this edit can never do anything: it is then never installed."""
        closed = not any(self.gate.values)
        scaled_away = bool(self.scale) and not any(self.scale)
        off = self.strength == 0 or self.start_percent >= self.end_percent
        return off or closed or scaled_away or self.how.idle(self)

    def strengths(self, images: int, window: tuple[int, ...] | None = None) -> list[float]:
        """The strength in each of so many images, or of those of a larger batch that `window` names."""
        try:
            gates = self.gate.per_image(images, window)
        except ValueError as error:
            raise self.error(str(error)) from None
        shown = window if window is not None and len(window) == images else range(images)
        scales = [self.scale[i] for i in shown] if self.scale else [1.0] * images
        return [self.strength * gate * scale for gate, scale in zip(gates, scales, strict=True)]

    @cached_property
    def key(self) -> str:
        window = (self.start_percent, self.end_percent)
        later = [self.scale] * bool(self.scale) + [self.rows] * (self.rows != ROWS[0]) + ["last"] * self.last
        numbers = (self.strength, window, self.blocks, self.gate, self.options, *later)
        return digest((self.method, self.source.key, *numbers))

    @cached_property
    def order(self) -> tuple[bool, int, str, str]:
        return self.last, self.how.order, self.source.name, self.key


def complaint_about(strength: float, start_percent: float, end_percent: float, blocks: str) -> str | None:
    """What is wrong with an edit's inputs and how to mend it; None when they are fine."""
    if not math.isfinite(strength):
        return f"strength is {strength}; give a finite number (0 switches the edit off)"
    for name, percent in (("start_percent", start_percent), ("end_percent", end_percent)):
        if not 0 <= percent <= 1:  # catches NaN as well
            return f"{name} is {percent}; give a number from 0 (start of sampling) to 1 (its end)"
    if start_percent > end_percent:
        return f"start_percent {start_percent} lies after end_percent {end_percent}; swap them or move one"
    try:
        parse_blocks(blocks)
    except ValueError as error:
        return str(error)
    return None


def too_late(at_percent: float, start_percent: float, end_percent: float) -> str | None:
    """What is wrong with a gate that decides so, without a restart, about an edit of this window."""
    if not start_percent < end_percent <= at_percent:
        return None
    return (
        f"the gate decides at {at_percent:g}, but the edit ends at {end_percent:g}; let the gate decide earlier or "
        "restart, or let the edit end later"
    )
