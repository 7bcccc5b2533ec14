"""The token sets of the edits: gathered from the specs once, then bound to each cross-attention's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..edits.spec import Concept, EditSpec, Phrase, Prompt
from ..methods.attention import split_heads
from ..methods.cre import CREOptions
from ..methods.eiup import EIUPOptions


@dataclass
class KV:
    """M token sets in one cross-attention. K, V: [M, T, H, d]; owner: [M], the edit that each belongs to.

    own: the keys of each set's own tokens, M times [1, n, H, d], where they are evidence (eiup.py); scale: [M], times
    the edit's strength.
    """

    owner: Tensor
    K: Tensor
    V: Tensor
    own: list[Tensor]
    scale: Tensor


@dataclass
class TokenSet:
    """M token sets of one length. k, v: [M, T, W]; w: what the values are weighted with, [M, T, 1, 1], or None.

    own: the positions of each set's own tokens, where they are evidence; scale: of each set, all 1 if empty.
    """

    owner: list[int]
    k: Tensor
    v: Tensor
    w: Tensor | None = None
    own: list[tuple[int, ...]] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)

    def bind(self, attn: Any, dtype: torch.dtype) -> KV:
        k = self.k.to(dtype)
        K = split_heads(attn.to_k(k), attn.heads)
        V = split_heads(attn.to_v(k if self.v is self.k else self.v.to(dtype)), attn.heads)
        V = V if self.w is None else V * self.w.to(V.dtype)
        own = [K[m : m + 1, list(positions)] for m, positions in enumerate(self.own)]
        scale = torch.tensor(self.scale or [1.0] * len(k), device=k.device)
        return KV(torch.tensor(self.owner, device=k.device), K, V, own, scale)


@dataclass
class Solved:
    """Concepts that are solved together: their phrases, behind the baseline if there is one, and their neighbours."""

    options: CREOptions | EIUPOptions
    phrases: list[TokenSet]
    keep: list[TokenSet]


@dataclass
class TokenSets:
    """The edits of a cross-attention by what is done with them (plan.py), not yet bound to one."""

    joined: list[TokenSet] = field(default_factory=list)  # into the prompt's softmax
    separate: list[TokenSet] = field(default_factory=list)  # a softmax of their own
    steering: list[Solved] = field(default_factory=list)


def gather(specs: Sequence[EditSpec], here: Sequence[int], device: torch.device) -> TokenSets:
    """The token sets of the edits specs[i], i in `here`, on the device."""
    sets = TokenSets()
    separate: dict[tuple[int, str], list[tuple[int, Phrase, float]]] = {}
    steering: dict[tuple[str, str], list[tuple[int, Concept]]] = {}  # by options and baseline
    for i in here:
        source, options = specs[i].source, specs[i].options
        if isinstance(source, Prompt):
            sets.joined.append(TokenSet([i], source.k.to(device), source.v.to(device)))
        elif isinstance(source, Concept) and isinstance(options, EIUPOptions) and options.baseline == "none":
            for p, phrase in enumerate(source.phrases):
                if options.form == "joint":
                    sets.joined.append(own_set(i, phrase, options.weight(p), device))
                else:
                    group = phrase.tokens.shape[1], options.evidence
                    separate.setdefault(group, []).append((i, phrase, options.weight(p)))
        elif isinstance(source, Concept) and options is not None:
            neutral = source.baseline_key if options.baseline == "neutral" else ""
            steering.setdefault((repr(options), neutral), []).append((i, source))
    sets.separate = [weighted_set(separate[T, e], e == "share", device) for T, e in sorted(separate)]
    for alike in sorted(steering):
        options = specs[steering[alike][0][0]].options
        assert options is not None
        sets.steering.append(solved(options, steering[alike], device))
    return sets


def own_set(i: int, phrase: Phrase, weight: float, device: torch.device) -> TokenSet:
    """A phrase's own tokens alone: start, end and padding are in the prompt already."""
    own = phrase.tokens[:, list(phrase.own)].to(device)
    return TokenSet([i], own, own, torch.full((1, own.shape[1], 1, 1), weight, device=device))


def weighted_set(phrases: Sequence[tuple[int, Phrase, float]], evidence: bool, device: torch.device) -> TokenSet:
    """Erasure prompts of one length; only the values of a phrase's own tokens count, each with the phrase's weight."""
    tokens = torch.cat([phrase.tokens for _, phrase, _ in phrases]).to(device)
    w = torch.zeros(*tokens.shape[:2], 1, 1)
    for m, (_, phrase, weight) in enumerate(phrases):
        w[m, list(phrase.own)] = weight
    own = [phrase.own for _, phrase, _ in phrases] if evidence else []
    return TokenSet([i for i, _, _ in phrases], tokens, tokens, w.to(device), own)


def solved(options: CREOptions | EIUPOptions, concepts: Sequence[tuple[int, Concept]], device: torch.device) -> Solved:
    """Every phrase of the concepts, by length; the neutral encoding is the very first where it is the baseline."""
    own = isinstance(options, CREOptions) and options.tokens == "own"

    def chosen(phrase: Phrase) -> Tensor:
        return phrase.tokens[:, list(phrase.own)] if own else phrase.tokens

    def weight(p: int) -> float:
        return -options.weight(p) if isinstance(options, EIUPOptions) else 1.0

    prompts = [(i, chosen(each), weight(p)) for i, concept in concepts for p, each in enumerate(concept.phrases)]
    if options.baseline == "neutral":
        i, concept = concepts[0]
        assert concept.baseline is not None  # Backbone.admit has seen to it
        prompts.insert(0, (i, concept.baseline, 1.0))
    keep = [(i, chosen(phrase), 1.0) for i, concept in concepts for phrase in concept.keep]
    return Solved(options, by_length(prompts, device), by_length(keep, device))


def by_length(prompts: Sequence[tuple[int, Tensor, float]], device: torch.device) -> list[TokenSet]:
    """prompts: each one's edit, tokens and scale."""
    sets = []
    for T in dict.fromkeys(tokens.shape[1] for _, tokens, _ in prompts):
        owner, tokens, scale = zip(*(each for each in prompts if each[1].shape[1] == T), strict=True)
        stacked = torch.cat(tokens).to(device)
        sets.append(TokenSet(list(owner), stacked, stacked, scale=list(scale)))
    return sets
