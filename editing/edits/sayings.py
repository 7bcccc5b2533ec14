"""What more prompts tell of a phrase: how its words show, and what they would be if they said something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .encode import TAIL, encode, own_tokens, rows_of
from .spec import Phrase

SAYINGS = ("{}", "a picture of {}", "a drawing of {} on a table", "{} and a person", "a person beside {}")
# More of what stands behind a phrase, and of things beside it, for what these become.
FURTHER = (
    *("{} in the style of a painting", "a picture of {} in an old style", "{} on a white background"),
    *("{} and a cat", "{} next to a car", "{} and an apple", "{} next to a book"),
)

ARTICLES = ("a", "an", "the", "some")


def bare(text: str) -> list[str]:
    """Its words without articles."""
    return [word for word in text.lower().split() if word not in ARTICLES]


def tagged(text: str) -> str:
    """Without an article in front, as tags say it: a thing is told so with one as well, and not the other way round."""
    first, _, rest = text.partition(" ")
    return rest if first.lower() in ARTICLES and rest else text


def holds(line: str, other: str) -> bool:
    """Whether a line says another one within itself, as "a picture of a mug" says "mug"."""
    words, within = bare(line), bare(other)
    return any(words[i : i + len(within)] == within for i in range(len(words) - len(within) + 1))


def shortest(lines: Sequence[str]) -> list[bool]:
    """Of each line, whether it holds no other one. Where one does, reading the shorter anew is enough."""
    return [
        not any(holds(line, other) and (j < i or not holds(other, line)) for j, other in enumerate(lines) if j != i)
        for i, line in enumerate(lines)
    ]


def told(clip: Any, phrases: Sequence[Phrase], instead: Sequence[str]) -> tuple[Phrase, ...]:
    """The phrases with their `like` (methods/said.py), and where something is drawn instead the shortest with their
    `becomes` (reread.py)."""
    own = shortest([phrase.text for phrase in phrases])
    others = [[said_in(clip, saying, thing) for thing in instead] for saying in (*SAYINGS, *FURTHER)] if instead else []
    return tuple(told_of(clip, phrase, others if short else []) for phrase, short in zip(phrases, own, strict=True))


def told_of(clip: Any, phrase: Phrase, others: Sequence[Sequence[Said]]) -> Phrase:
    """others: of each saying, the prompts that say what is drawn instead; none: it becomes nothing else."""
    text = tagged(phrase.text)
    says = [said_in(clip, saying, text) for saying in SAYINGS]
    like = tuple(rows_of(each.tokens, each.own) for each in says)
    told = replace(phrase, like=like, stem=None if text == phrase.text else like[0])
    if not others:
        return told
    says += [said_in(clip, saying, text) for saying in FURTHER]
    T, G = (torch.cat(rows) for rows in zip(*map(becomes, says, others), strict=True))
    return replace(told, becomes=(T, G))


def others_told(clip: Any, lines: Sequence[str]) -> tuple[Tensor, ...]:
    """What else a prompt says around a phrase, said of other things: rows [n, W] of an encoding for each of those ways,
    one line in each."""
    told = [said_in(clip, saying, line) for saying, line in zip((*SAYINGS[1:], *FURTHER), cycle(lines), strict=False)]
    return tuple(rows_of(each.tokens, each.own) for each in told)


class Said(NamedTuple):
    """A prompt that says a phrase: its encoding [1, T, W], where its own tokens are, and how many of these are behind
    the phrase's."""

    tokens: Tensor
    own: tuple[int, ...]
    behind: int

    @property
    def last(self) -> int:
        """Where the phrase's last token is."""
        return self.own[-1 - self.behind]


def said_in(clip: Any, saying: str, phrase: str) -> Said:
    text = saying.format(phrase)
    tokens = encode(clip, text)
    own, behind = (own_tokens(clip, part, tokens.shape[1]) for part in (text, saying.split("{}")[1]))
    return Said(tokens, own, len(behind))


def becomes(said: Said, others: Sequence[Said], first: int | None = None, plain: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of a prompt that says a phrase, from the phrase's last token on, which with a causal encoder knows the whole
    of it, or from `first`, and the mean of those in their place in prompts that say something else: [n, W] each.

    Places are told from the prompts' ends. plain: the others say nothing for the phrase, and end where it would begin.
    """
    end, T = said.own[-1] + 1, said.tokens.shape[1]
    rows = sorted({*range(said.last if first is None else first, end), *(end + i for i in TAIL if end + i < T), T - 1})
    become = []
    for other in others:
        behind = [max(0, row - end) if plain else row - end for row in rows]
        places = [min(other.own[-1] + 1 + i, other.tokens.shape[1] - 1) for i in behind]
        become.append(other.tokens[0, places])
    return said.tokens[0, rows], torch.stack(become).mean(0)


def restyled(clip: Any, style: str, contexts: Sequence[str], instead: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Of a style: rows of the contexts with it behind them, from its first token on, and those in their place with the
    other styles, or with none: [n, W] each."""
    pairs = []
    for context in contexts[: len(SAYINGS) + len(FURTHER)]:
        said, plain = said_in(clip, f"{context} {{}}", style), said_in(clip, "{}", context)
        others = [said_in(clip, f"{context} {{}}", other) for other in instead]
        pairs.append(becomes(said, others or [plain], said.own[len(plain.own)], plain=not others))
    T, G = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    return T, G
