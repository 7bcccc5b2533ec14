"""Concepts from text or from a conditioning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .digest import digest
from .spec import Concept, Phrase

# Ordinary things: their mean encoding says "a picture of something", which is no part of any concept.
NEUTRAL = (
    "a cat\na dog\na fish\na car\na bicycle\nan apple\na pizza\na book\n"
    "a key\nan umbrella\na guitar\na camera\na shoe\na sunflower\na man\na woman"
)


# What is drawn in a concept's place where nobody says what: a prompt that names no thing is still one of a picture.
SOMETHING = "something"
CONTEXT = 77  # tokens of one piece of prompt, where a text encoder pads
# More prompts that say a phrase, from which it is learnt how its words show (methods/said.py).
SAYINGS = ("{}", "a picture of {}", "a drawing of {} on a table", "{} and a person", "a person beside {}")
ARTICLES = ("a", "an", "the", "some")
KINDS = ("auto", "thing", "style")  # of a concept; auto: a style if all its phrases say that they are one
LLAMA = "conditioning_llama3"  # what HiDream's Llama makes of a prompt in each layer, [1, layers, L, W]
IDS = ("t5xxl_ids", "t5xxl_weights")  # a prompt's T5 tokens and their weights, [n], that Anima's adapter reads
# Of text encoders by the host's names, what a conditioning says of a prompt beside its encoding, that models read.
BESIDE = {"llama": (LLAMA,), "qwen3_06b": IDS}


class Encoding(NamedTuple):
    """A prompt's: tokens [1, T, W], pooled [1, P], if the encoder makes one, and what stands beside them; all of it on
    the CPU."""

    tokens: Tensor
    pooled: Tensor | None
    beside: Mapping[str, Tensor]


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
    kind: of KINDS. A style is no thing of its own: it is what "a cat in the style of .." has beyond "a cat". So each of
    its phrases, and what it is to keep or to become, is the mean of the neutral lines with it behind them, and what
    remains is the neutral lines' own mean.
    """
    if clip is None:
        raise ValueError("clip is empty: the checkpoint has no text encoder; load one with a CLIP loader")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
    if not lines_of(text):
        raise ValueError("text is empty; write what to erase, one phrasing a line")
    beside: dict[str, tuple[Mapping[str, Tensor], ...]] = {}
    style = kind == "style" or (kind == "auto" and all(map(says_style, lines_of(text))))
    if style:  # styles are no context for one another
        of_things = [line for line in lines_of(neutral) if not says_style(line)]
        lines = of_things or lines_of(NEUTRAL)
        phrases, kept, others = (
            styles(clip, some, lines, what, beside)
            for some, what in ((text, "text"), (keep, "keep"), (instead, "instead"))
        )
        drawn = mean([each.tokens for each in others], "instead") if others else None
        pooled_instead = mean_pooled([each.pooled for each in others])
        if drawn is not None and (said := [x for each in others for x in beside.get(digest((each.tokens[0],)), ())]):
            beside[digest((drawn[0],))] = beside_mean(said, "instead")
    else:
        lines = apart(lines_of(neutral), lines_of(text))
        phrases, kept = (encode_lines(clip, some, what, beside) for some, what in ((text, "text"), (keep, "keep")))
        phrases = (
            tuple(replace(phrase, like=tuple(sayings(clip, phrase.text))) for phrase in phrases) if lines else phrases
        )
        replacement = [
            encoded(clip, line) for line in lines_of(instead.strip() or (SOMETHING if neutral == NEUTRAL else ""))
        ]
        drawn = mean_of(replacement, "instead", beside) if replacement else None
        pooled_instead = mean_pooled([each.pooled for each in replacement])
    ordinary = [encoded(clip, line) for line in lines]
    empty = encoded(clip, "")
    return Concept(
        name.strip() or phrases[0].text,
        phrases,
        mean_of([empty], "empty", beside),
        mean_of(of_one_length(ordinary), "neutral", beside) if ordinary else None,
        neutral,
        kept,
        instead=drawn,
        instead_text=instead.strip(),
        ordinary=tuple(
            rows_of(each.tokens, own_tokens(clip, line, each.tokens.shape[1]))
            for each, line in zip(ordinary, lines, strict=True)
        ),
        pooled=mean_pooled([each.pooled for each in ordinary or [empty]]),
        pooled_instead=pooled_instead,
        beside=beside,
        kind="style" if style else "thing",
    )


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


def bare(text: str) -> list[str]:
    """Its words without articles."""
    return [word for word in text.lower().split() if word not in ARTICLES]


def apart(lines: Sequence[str], phrases: Sequence[str]) -> list[str]:
    """The lines that are not one of the phrases themselves: nothing is compared with itself."""
    own = [bare(phrase) for phrase in phrases]
    return [line for line in lines if bare(line) not in own]


def sayings(clip: Any, phrase: str) -> Iterator[Tensor]:
    """The rows of the prompts that say a phrase: each [n, W]."""
    for saying in SAYINGS:
        text = saying.format(phrase)
        tokens = encode(clip, text)
        yield rows_of(tokens, own_tokens(clip, text, tokens.shape[1]))


TAIL = (0, 1, 8)  # positions behind a prompt's own tokens that may say it as well: its end and padding


def rows_of(tokens: Tensor, own: Sequence[int]) -> Tensor:
    """The rows of an encoding [1, T, W] that can say something: start, own, end, some padding, and the last; [n, W]."""
    end, T = max(own, default=0) + 1, tokens.shape[1]
    return tokens[0, sorted({0, *own, *(end + i for i in TAIL if end + i < T), T - 1})]


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def encode_lines(clip: Any, text: str, name: str, beside: dict[str, Any] | None = None) -> tuple[Phrase, ...]:
    """beside: as a Concept's, is given the phrases'."""
    phrases = []
    for line in lines_of(text):
        tokens, pooled, _ = encoding = encoded(clip, line)
        mean_of([encoding], name, {} if beside is None else beside)
        own = own_tokens(clip, line, tokens.shape[1])
        if not own:
            raise ValueError(f'{name}: the text encoder finds no word in "{line}"; write a word, or drop the line')
        phrases.append(Phrase(line, tokens, own, pooled=pooled))
    return tuple(phrases)


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
    return Concept(
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


def of_one_length(encodings: Sequence[Encoding]) -> list[Encoding]:
    """Where a text encoder does not pad, those of the commonest length; else all of them."""
    lengths = [each.tokens.shape[1] for each in encodings]
    if all(length % CONTEXT == 0 for length in lengths):
        return list(encodings)  # pieces of prompt: one of two pieces is too long, and `mean` says so
    commonest = max(lengths, key=lengths.count)
    return [each for each in encodings if each.tokens.shape[1] == commonest]


def mean_of(encodings: Sequence[Encoding], name: str, beside: dict[str, Any]) -> Tensor:
    """[1, T, W]; beside: as a Concept's, is given that mean's."""
    tokens = mean([each.tokens for each in encodings], name)
    if all(each.beside for each in encodings):
        beside[digest((tokens[0],))] = beside_mean([{"tokens": each.tokens, **each.beside} for each in encodings], name)
    return tokens


def beside_mean(said: Sequence[Mapping[str, Tensor]], name: str) -> tuple[Mapping[str, Tensor], ...]:
    """Llama's states are as good as their mean; T5's tokens have none: then all of it, each with its encoding."""
    if not all(LLAMA in each for each in said):
        return tuple(said)
    if len({each[LLAMA].shape for each in said}) > 1:
        raise ValueError(f"{name} mixes prompts of several lengths; keep each of its lines under 75 tokens")
    return ({LLAMA: torch.cat([each[LLAMA] for each in said]).mean(0, keepdim=True)},)


def mean(encodings: Sequence[Tensor], name: str) -> Tensor:
    """Of encodings [b, T, W]: [1, T, W]."""
    if len({tokens.shape[1] for tokens in encodings}) > 1:
        raise ValueError(f"{name} mixes prompts of several lengths; keep each of its lines under 75 tokens")
    return torch.cat(list(encodings)).mean(0, keepdim=True)


def encode(clip: Any, text: str) -> Tensor:
    """[1, T, W] fp32 on the CPU."""
    return encoded(clip, text).tokens


def encoded(clip: Any, text: str) -> Encoding:
    """In fp32."""
    pieces = clip.tokenize(text)
    asked = [name for encoder, names in BESIDE.items() if encoder in pieces for name in names]
    if asked:
        given = dict(clip.encode_from_tokens(pieces, return_pooled=True, return_dict=True))
        tokens, pooled = given.pop("cond"), given.pop("pooled_output")
    else:
        (tokens, pooled), given = clip.encode_from_tokens(pieces, return_pooled=True), {}
    tokens, pooled = undoubled(stored(tokens)), pooled_of(pooled)
    if not all(torch.isfinite(x).all() for x in (tokens, pooled) if x is not None):
        raise ValueError(f'clip encodes "{text}" to NaN or infinity; run the text encoder in fp32')
    return Encoding(tokens, pooled, said_beside(given, asked))


def said_beside(given: Mapping[str, Any], asked: Sequence[str] = (LLAMA, *IDS)) -> dict[str, Tensor]:
    """What a conditioning says of its prompt beside the encoding."""
    return {name: x.detach().to("cpu", copy=True) for name in asked if isinstance(x := given.get(name), Tensor)}


def pooled_of(pooled: Any) -> Tensor | None:
    """The pooled text of a prompt, [b, P]; none where the text encoder says nothing of the kind."""
    if not isinstance(pooled, Tensor) or pooled.ndim != 2:
        return None
    return stored(pooled)


def mean_pooled(pooled: Sequence[Tensor | None]) -> Tensor | None:
    """[1, P]; none unless all are known and of one width."""
    known = [x for x in pooled if x is not None]
    if not known or len(known) < len(pooled) or len({x.shape[-1] for x in known}) > 1:
        return None
    return torch.cat(known).mean(0, keepdim=True)


def own_tokens(clip: Any, text: str, rows: int | None = None) -> tuple[int, ...]:
    """The positions of the text's own tokens among its encoding's rows: without start, end, padding, and what an
    encoder's template says around every text. rows: of the encoding, where several encoders or a template take part."""
    tokens, empty = (clip.tokenize(each, return_word_ids=True) for each in (text, ""))
    own = {name: words_in(flat(tokens[name]), flat(empty[name])) for name in tokens}
    lengths = {name: len(flat(tokens[name])) for name in tokens}
    first = "l" if lengths.get("l") else next(iter(tokens))  # SDXL's two encoders place the same words alike
    if rows is None or lengths[first] == rows:
        return own[first]
    if alone := [name for name, length in lengths.items() if length == rows]:  # Flux reads T5's rows, not CLIP's
        return own[alone[0]]
    if "t5xxl" in own and lengths[first] + lengths["t5xxl"] == rows:  # SD3 reads both, one behind the other
        return (*own[first], *(lengths[first] + i for i in own["t5xxl"]))
    dropped = max(0, lengths[first] - rows)  # Qwen-Image's encoder leaves its template's first rows out
    return tuple(i - dropped for i in own[first] if i >= dropped)


def flat(pieces: Sequence[Any]) -> list[Any]:
    return [token for piece in pieces for token in piece]


def words_in(tokens: Sequence[Any], empty: Sequence[Any]) -> tuple[int, ...]:
    """Where a text's tokens are: the host's tokenizers give start, end and padding the word id 0. Where the empty text
    has words, they are a template's, of which the text's own are in the middle."""
    words = [i for i, token in enumerate(tokens) if token[2] != 0]
    template = [repr(token[0]) for token in empty if token[2] != 0]
    if not template:
        return tuple(words)
    said = [repr(tokens[i][0]) for i in words]
    front = next((n for n, (a, b) in enumerate(zip(said, template, strict=False)) if a != b), len(template))
    return tuple(words[front : len(words) - (len(template) - front)])


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


def undoubled(tokens: Tensor) -> Tensor:
    """Without what NegPip's encoders make: every token twice, for keys and for values, the latter with the sign of its
    weight. tokens: [B, T, W]."""
    keys, values = tokens[:, 0::2], tokens[:, 1::2]
    if keys.shape != values.shape:
        return tokens
    twice = (keys == values).all(-1) | (keys == -values).all(-1)
    return keys.contiguous() if twice.all() else tokens


def stored(tokens: Tensor) -> Tensor:
    """A copy of an encoding, [1, T, W], that no model call and no other device holds."""
    return tokens.detach().to("cpu", torch.float32, copy=True)
