"""Concepts from text or from a conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .beside import said_beside
from .encode import (
    Encoding,
    encode_lines,
    encoded,
    lines_of,
    mean,
    mean_of,
    mean_pooled,
    of_one_length,
    own_tokens,
    pooled_of,
    rows_of,
    stored,
    undoubled,
)
from .sayings import bare, others_told, restyled, shortest, told
from .spec import Concept, Phrase
from .styles import mean_style, says_style, styles

# Ordinary things: their mean encoding says "a picture of something", which is no part of any concept.
NEUTRAL = (
    "a cat\na dog\na fish\na car\na bicycle\nan apple\na pizza\na book\n"
    "a key\nan umbrella\na guitar\na camera\na shoe\na sunflower\na man\na woman"
)
# What is drawn in a concept's place where nobody says what: a prompt that names no thing is still one of a picture.
SOMETHING = "something"
KINDS = ("auto", "thing", "style")  # of a concept; auto: a style if all its phrases say that they are one


class Parts(NamedTuple):
    """Of a concept: its phrases, its neighbours', and what is drawn in its place, [1, T, W] and pooled [1, P]."""

    phrases: tuple[Phrase, ...]
    keep: tuple[Phrase, ...]
    instead: Tensor | None
    pooled_instead: Tensor | None


def concept_from_text(
    clip: Any,
    text: str,
    name: str = "",
    neutral: str = NEUTRAL,
    keep: str = "",
    instead: str = "",
    kind: str = KINDS[0],
) -> Concept:
    """One phrase per line of `text` and of `keep`, encoded by the host's `clip`, the mean of `neutral`'s lines, but for
    those that are the concept itself, and the mean of `instead`'s.

    With nothing to draw instead, SOMETHING is drawn for what is compared with NEUTRAL: the mean of so many unlike
    prompts is no picture. Neutral lines of somebody's own say what remains.
    kind: of KINDS. Each of a style's phrases, and what it is to keep or to become, is the mean of the neutral lines
    with it behind them, and what remains is the neutral lines' own mean.
    """
    check_inputs(clip, text, kind)
    style = kind == "style" or (kind == "auto" and all(map(says_style, lines_of(text))))
    lines = compared_with(neutral, text, style)
    drawn = instead.strip() or (SOMETHING if neutral == NEUTRAL and not style else "")
    beside: dict[str, tuple[Mapping[str, Tensor], ...]] = {}
    parts = (parts_of_style if style else parts_of_thing)(clip, text, keep, drawn, lines, beside)
    ordinary, empty = [encoded(clip, line) for line in lines], encoded(clip, "")
    concept = Concept(
        name.strip() or parts.phrases[0].text,
        parts.phrases,
        mean_of([empty], "empty", beside),
        mean_of(of_one_length(ordinary), "neutral", beside) if ordinary else None,
        neutral,
        parts.keep,
        instead=parts.instead,
        instead_text=instead.strip(),
        ordinary=tuple(
            rows_of(each.tokens, own_tokens(clip, line, each.tokens.shape[1]))
            for each, line in zip(ordinary, lines, strict=True)
        ),
        further=() if style or not lines else others_told(clip, lines),
        pooled=mean_pooled([each.pooled for each in ordinary or [empty]]),
        pooled_instead=parts.pooled_instead,
        beside=beside,
        kind="style" if style else "thing",
    )
    return not_in_vain(concept, "text")


def check_inputs(clip: Any, text: str, kind: str) -> None:
    if clip is None:
        raise ValueError("clip is empty: the checkpoint has no text encoder; load one with a CLIP loader")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
    if not lines_of(text):
        raise ValueError("text is empty; write what to erase, one phrasing a line")


def compared_with(neutral: str, text: str, style: bool) -> list[str]:
    """The neutral lines that can be: styles are no context for one another, and nothing is compared with itself."""
    lines = lines_of(neutral)
    if style:
        return [line for line in lines if not says_style(line)] or lines_of(NEUTRAL)
    return apart(lines, lines_of(text))


def parts_of_style(
    clip: Any, text: str, keep: str, instead: str, lines: Sequence[str], beside: dict[str, Any]
) -> Parts:
    phrases, kept, others = (
        styles(clip, some, lines, what, beside) for some, what in ((text, "text"), (keep, "keep"), (instead, "instead"))
    )
    drawn = [each.text for each in others]
    own = shortest([each.text for each in phrases])
    phrases = tuple(
        replace(each, becomes=restyled(clip, each.text, lines, drawn)) if short else each
        for each, short in zip(phrases, own, strict=True)
    )
    return Parts(phrases, kept, mean_style(others, "instead", beside), mean_pooled([each.pooled for each in others]))


def parts_of_thing(
    clip: Any, text: str, keep: str, instead: str, lines: Sequence[str], beside: dict[str, Any]
) -> Parts:
    phrases, kept = (encode_lines(clip, some, what, beside) for some, what in ((text, "text"), (keep, "keep")))
    others = [encoded(clip, line) for line in lines_of(instead)]
    drawn = mean_of(others, "instead", beside) if others else None
    if lines:
        phrases = told(clip, phrases, lines_of(instead))
    return Parts(phrases, kept, drawn, mean_pooled([each.pooled for each in others]))


def apart(lines: Sequence[str], phrases: Sequence[str]) -> list[str]:
    """The lines that are not one of the phrases themselves: nothing is compared with itself."""
    own = [bare(phrase) for phrase in phrases]
    return [line for line in lines if bare(line) not in own]


def concept_from_conditioning(
    conditioning: Sequence[Any],
    name: str = "",
    empty: Sequence[Any] | None = None,
    neutral: Sequence[Any] | None = None,
    keep: Sequence[Any] | None = None,
    instead: Sequence[Any] | None = None,
) -> Concept:
    """One phrase per entry of `conditioning` and `keep` (and per row of an entry); all its tokens count as its own.

    The mean of `neutral`'s entries is the neutral encoding, that of `instead`'s what is drawn in its place.
    """
    name = name.strip() or "concept"
    phrases = phrases_of(conditioning, "conditioning", name)
    kept = phrases_of(keep, "keep", f"{name}, kept") if keep is not None else ()
    given = {"empty": empty, "neutral": neutral, "instead": instead}
    means = {what: mean(checked(entries, what), what) for what, entries in given.items() if entries is not None}
    beside: dict[str, tuple[Mapping[str, Tensor], ...]] = {}
    for what, entries in {"conditioning": conditioning, "keep": keep, **given}.items():
        groups = [entries or ()] if what in given else [[entry] for entry in entries or ()]
        for group in filter(None, groups):
            mean_of([encoding_of(entry) for entry in group], what, beside)
    width = phrases[0].tokens.shape[-1]
    for what, tokens in (*means.items(), *(("keep", phrase.tokens) for phrase in kept)):
        if tokens.shape[-1] != width:
            raise ValueError(
                f"{what} was made with a text encoder of width {tokens.shape[-1]} and conditioning with one of "
                f"{width}; make both with the same CLIP"
            )
    concept = Concept(
        name,
        phrases,
        means.get("empty"),
        means.get("neutral"),
        keep=kept,
        instead=means.get("instead"),
        pooled=mean_pooled(pooled_in(neutral or empty or ())),
        pooled_instead=mean_pooled(pooled_in(instead or ())),
        beside=beside,
    )
    return not_in_vain(concept, "conditioning")


def not_in_vain(concept: Concept, what: str) -> Concept:
    """The same; raises where an edit could only put back what it takes. what: the input that says the phrases."""
    compared = "neutral" if concept.neutral is not None else "empty"
    for phrase in concept.phrases:
        if not phrase.tokens.any():
            raise ValueError(
                f"{what}: an encoding of zeros (ConditioningZeroOut's) says nothing; connect a CLIPTextEncode's"
            )
        if alike(phrase.tokens, concept.baseline):
            raise ValueError(
                f'{compared} says the same as {what}, "{phrase.text}", and is what the concept is compared with: '
                f"nothing would be left to erase. Put other words into one of them"
            )
        if any(alike(phrase.tokens, kept.tokens) for kept in concept.keep):
            raise ValueError(f'keep holds "{phrase.text}", which is the concept itself; take it out')
        if alike(phrase.tokens, concept.instead):
            raise ValueError(f'"{phrase.text}" would be drawn instead of itself; put another thing into instead')
    return concept


def alike(a: Tensor, b: Tensor | None) -> bool:
    """Whether two encodings [1, T, W] are the same text's."""
    return b is not None and a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def encoding_of(entry: Sequence[Any]) -> Encoding:
    """Of an entry of a CONDITIONING."""
    (tokens,) = checked([entry], "conditioning")
    return Encoding(tokens, None, said_beside(entry[1]) if len(entry) > 1 else {})


def phrases_of(conditioning: Sequence[Any], what: str, name: str) -> tuple[Phrase, ...]:
    """A phrase for each row of an input's entries."""
    rows = []
    for tokens, pooled in zip(checked(conditioning, what), pooled_in(conditioning), strict=True):
        of_rows = pooled.split(1) if pooled is not None and len(pooled) == len(tokens) else [None] * len(tokens)
        rows += list(zip(tokens.split(1), of_rows, strict=True))
    return tuple(
        Phrase(f"{name} {i}", row, tuple(range(row.shape[1])), pooled=pooled) for i, (row, pooled) in enumerate(rows, 1)
    )


def pooled_in(conditioning: Sequence[Any]) -> list[Tensor | None]:
    """The pooled text of each entry."""
    return [pooled_of(entry[1].get("pooled_output")) if len(entry) > 1 else None for entry in conditioning]


def checked(conditioning: Sequence[Any], name: str) -> list[Tensor]:
    """The encodings of a CONDITIONING's entries, one width and finite."""
    if not conditioning:
        raise ValueError(f"{name} has no entries; connect what a CLIPTextEncode makes")
    entries = [entry[0] for entry in conditioning]
    if not all(isinstance(entry, Tensor) and entry.ndim == 3 for entry in entries):
        raise ValueError(f"{name} is not a text encoding of shape [batch, tokens, width]; connect a CLIPTextEncode's")
    if len({entry.shape[-1] for entry in entries}) > 1:
        raise ValueError(f"{name} mixes the encodings of several text encoders; make all of it with one CLIP")
    entries = [undoubled(stored(entry)) for entry in entries]
    if not all(torch.isfinite(entry).all() for entry in entries):
        raise ValueError(f"{name} holds NaN or infinity; encode it again, in fp32 if the text encoder runs in fp16")
    return entries
