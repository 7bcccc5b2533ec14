"""What a text encoder makes of a text: its encoding, which of its rows are the text's own, and means of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .beside import BESIDE, beside_mean, said_beside
from .digest import digest
from .spec import Phrase

CONTEXT = 77  # tokens of one piece of prompt, where a text encoder pads
TAIL = (0, 1, 8)  # positions behind a prompt's own tokens that may say it as well: its end and padding


class Encoding(NamedTuple):
    """A prompt's: tokens [1, T, W], pooled [1, P], if the encoder makes one, and what stands beside them; all of it on
    the CPU."""

    tokens: Tensor
    pooled: Tensor | None
    beside: Mapping[str, Tensor]


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
        if weight_of(clip, line) <= 0:
            raise ValueError(
                f'{name}: "{line}" gives none of its words a weight above 0, and so says nothing, or the opposite; '
                "write it without weights, or drop the line"
            )
        phrases.append(Phrase(line, tokens, own, pooled=pooled))
    return tuple(phrases)


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


def weight_of(clip: Any, text: str) -> float:
    """The largest that the text gives to one of its words."""
    tokens, empty = (clip.tokenize(each, return_word_ids=True) for each in (text, ""))
    pairs = [(flat(tokens[name]), flat(empty[name])) for name in tokens]
    return max(float(said[i][1]) for said, nothing in pairs for i in words_in(said, nothing))


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


def rows_of(tokens: Tensor, own: Sequence[int]) -> Tensor:
    """The rows of an encoding [1, T, W] that can say something: start, own, end, some padding, and the last; [n, W]."""
    end, T = max(own, default=0) + 1, tokens.shape[1]
    return tokens[0, sorted({0, *own, *(end + i for i in TAIL if end + i < T), T - 1})]


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


def mean(encodings: Sequence[Tensor], name: str) -> Tensor:
    """Of encodings [b, T, W]: [1, T, W]."""
    if len({tokens.shape[1] for tokens in encodings}) > 1:
        raise ValueError(f"{name} mixes prompts of several lengths; keep each of its lines under 75 tokens")
    return torch.cat(list(encodings)).mean(0, keepdim=True)


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
