"""The rows of texts that closed-form edits are made of: [n, W] in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..edits.spec import Concept, Phrase


def said(phrase: Phrase) -> Tensor:
    """From the last of a text's own tokens to its end: with a causal encoder, those that know the whole of it."""
    return phrase.tokens[0, phrase.own[-1] :].double()


def erased(phrases: Sequence[Phrase], empty: Tensor, instead: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """C and G: the rows of some phrasings, and for each of them in turn what stands behind the start of the empty
    prompt, row by row; or what stands at the same places in a prompt to be read instead, both [1, T, W]. Where that has
    no more rows, its last."""
    C = [said(phrase) for phrase in phrases]
    g = (empty if instead is None else instead)[0].double()
    starts = [1 if instead is None else phrase.own[-1] for phrase in phrases]
    G = [g[(start + torch.arange(len(rows))).clamp(max=len(g) - 1)] for start, rows in zip(starts, C, strict=True)]
    return torch.cat(C), torch.cat(G)


def preserved(phrases: Sequence[Phrase], like: Tensor) -> Tensor:
    """P: the rows of what is to stay, of the width of `like`."""
    return torch.cat([like.double()[:0], *map(said, phrases)])


def pooled_rows(concept: Concept, keep: Sequence[Phrase]) -> tuple[Tensor, Tensor, Tensor] | None:
    """C, G and P of the pooled texts: the phrases', what each is to become, and what is to stay; None where the text
    encoder makes none."""
    guide = concept.pooled if concept.given_instead is None else concept.pooled_instead
    C = [phrase.pooled.double() for phrase in concept.phrases if phrase.pooled is not None]
    if guide is None or not C:
        return None
    P = [phrase.pooled.double() for phrase in (*keep, *concept.keep) if phrase.pooled is not None]
    return torch.cat(C), guide.double().expand(len(torch.cat(C)), -1), torch.cat([C[0][:0], *P])
