"""A style is no thing of its own: it is what "a cat in the style of .." has beyond "a cat"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .beside import beside_mean
from .digest import digest
from .encode import encode_lines, encoded, mean, mean_of, mean_pooled, of_one_length, own_tokens, rows_of
from .spec import Phrase


def says_style(line: str) -> bool:
    """Whether a phrase says how something is drawn, not what: "in the style of ..", "watercolour style", "by .."."""
    return bool(re.search(r"\bstyle\b|^by\s", line.lower()))


def styles(clip: Any, text: str, contexts: Sequence[str], name: str, beside: dict[str, Any]) -> tuple[Phrase, ...]:
    """One phrase per line: the mean of what the contexts are encoded to with it behind them."""
    return tuple(in_contexts(clip, phrase, contexts, beside) for phrase in encode_lines(clip, text, name))


def in_contexts(clip: Any, phrase: Phrase, contexts: Sequence[str], beside: dict[str, Any]) -> Phrase:
    texts = [f"{context} {phrase.text}" for context in contexts]
    found = [encoded(clip, text) for text in texts]
    own = [own_tokens(clip, text, each.tokens.shape[1]) for text, each in zip(texts, found, strict=True)]
    tokens = mean_of(of_one_length(found), phrase.text, beside)
    return replace(
        phrase,
        tokens=tokens,
        own=tuple(i for i in sorted({i for each in own for i in each}) if i < tokens.shape[1]),
        like=tuple(rows_of(each.tokens, mine) for each, mine in zip(found, own, strict=True)),
        pooled=mean_pooled([each.pooled for each in found]),
    )


def mean_style(phrases: Sequence[Phrase], name: str, beside: dict[str, Any]) -> Tensor | None:
    """The mean of what ordinary prompts become with each, [1, T, W]; none of none. beside: as `mean_of`'s."""
    if not phrases:
        return None
    tokens = mean([each.tokens for each in phrases], name)
    if said := [x for each in phrases for x in beside.get(digest((each.tokens[0],)), ())]:
        beside[digest((tokens[0],))] = beside_mean(said, name)
    return tokens
