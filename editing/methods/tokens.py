"""The token sets that edits bring into a cross-attention, gathered from the specs once for all of a model's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..edits.digest import digest
from ..edits.method import Method, methods
from ..edits.spec import Concept, EditSpec, Phrase


@dataclass
class TokenSet:
    """M token sets of one length. k, v: [M, T, W]; w: what the values are weighted with, [M, T, 1, 1], or None.

    owner: the edit that each belongs to; own: the positions of each set's own tokens, where they are evidence
    (eiup.py); scale: of each set, times its edit's strength, all 1 if empty; names: once asked for (engine/streams.py).
    beside: of each set, as its Concept has it, nothing for a text encoder that says no more; adapted: [M, L, W], once a
    model has made its own text of them.
    """

    owner: list[int]
    k: Tensor
    v: Tensor
    w: Tensor | None = None
    own: list[tuple[int, ...]] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    names: tuple[str, ...] | None = None
    beside: Sequence[tuple[Mapping[str, Tensor], ...]] = ()
    adapted: Tensor | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The same for prompts of the same encoding."""
        if self.names is None:
            self.names = tuple(digest((each,)) for each in self.k.detach().cpu())
        return self.names


@dataclass
class Solved:
    """Concepts that are solved together: their phrases, behind the baseline if there is one, their neighbours, and what
    is drawn instead.

    tested: the concepts of the edits that ask the prompt's own tokens (said.py); key: of the options and the baseline,
    the order in which groups are taken away.
    """

    method: Method
    options: Any
    phrases: list[TokenSet]
    keep: list[TokenSet]
    instead: list[TokenSet] = field(default_factory=list)
    tested: dict[int, Concept] = field(default_factory=dict)
    key: tuple[str, str] = ("", "")

    @property
    def compared(self) -> bool:
        """Whether the first of the phrases is the baseline."""
        return self.options.baseline == "neutral"


@dataclass
class TokenSets:
    """The edits of a cross-attention by what is done with them (engine/plan.py), not yet bound to one.

    then: those that are applied to what these leave.
    """

    joined: list[TokenSet] = field(default_factory=list)  # into the prompt's softmax
    separate: list[TokenSet] = field(default_factory=list)  # a softmax of their own
    solved: list[Solved] = field(default_factory=list)
    then: TokenSets | None = None

    @property
    def stages(self) -> Iterator[TokenSets]:
        yield self
        yield from () if self.then is None else self.then.stages

    @property
    def all(self) -> Iterator[TokenSet]:
        for stage in self.stages:
            yield from (*stage.joined, *stage.separate)
            for group in stage.solved:
                yield from (*group.phrases, *group.keep, *group.instead)


def gather(specs: Sequence[EditSpec], here: Sequence[int], device: torch.device) -> TokenSets:
    """The token sets of the edits specs[i], i in `here`, on the device."""
    others = [i for i in here if not specs[i].last]
    if 0 < len(others) < len(here):
        sets = gather(specs, others, device)
        sets.then = gather(specs, [i for i in here if specs[i].last], device)
        return sets
    sets = TokenSets()
    for method in methods():
        if mine := [(i, specs[i]) for i in here if specs[i].method == method.name]:
            more = method.token_sets(mine, device)
            sets.joined += more.joined
            sets.separate += more.separate
            sets.solved += more.solved
    sets.solved.sort(key=lambda group: group.key)
    if beside := {name: said for i in here for name, said in getattr(specs[i].source, "beside", {}).items()}:
        for tokens in sets.all:
            tokens.beside = [beside.get(name, ()) for name in tokens.named]
    return sets


def solved_together(
    method: Method,
    edits: Sequence[tuple[int, EditSpec]],
    device: torch.device,
    chosen: Callable[[Any, Phrase], Tensor] = lambda options, phrase: phrase.tokens,
    scale: Callable[[Any, int], float] = lambda options, p: 1.0,
    tested: Callable[[Any], bool] = lambda options: False,
) -> list[Solved]:
    """The edits of concepts in groups of the same options and baseline.

    chosen: the tokens [1, n, W] that stand for a phrase; scale: of the phrase of that number, times the strength;
    tested: whether the prompt's own tokens are asked.
    """
    groups: dict[tuple[str, str], list[tuple[int, EditSpec]]] = {}
    for i, spec in edits:
        neutral = spec.source.baseline_key if spec.options.baseline == "neutral" else ""
        groups.setdefault((repr(spec.options), neutral), []).append((i, spec))
    out = []
    for key, group in groups.items():
        options = group[0][1].options
        phrases = [
            (i, chosen(options, phrase), scale(options, p))
            for i, spec in group
            for p, phrase in enumerate(spec.source.phrases)
        ]
        keep = [(i, chosen(options, phrase), 1.0) for i, spec in group for phrase in spec.source.keep]
        if options.baseline == "neutral":  # `admit` has seen to it that there is one
            i, spec = group[0]
            phrases.insert(0, (i, spec.source.baseline, 1.0))
        instead = [(i, spec.source.instead, 1.0) for i, spec in group if spec.source.instead is not None]
        said, kept, drawn = (by_length(prompts, device) for prompts in (phrases, keep, instead))
        asked = {i: spec.source for i, spec in group} if tested(options) else {}
        out.append(Solved(method, options, said, kept, drawn, asked, key))
    return out


def by_length(prompts: Sequence[tuple[int, Tensor, float]], device: torch.device) -> list[TokenSet]:
    """A set for each length of prompts. prompts: each one's edit, tokens [1, T, W] and scale."""
    sets = []
    for T in dict.fromkeys(tokens.shape[1] for _, tokens, _ in prompts):
        owner, tokens, scale = zip(*(each for each in prompts if each[1].shape[1] == T), strict=True)
        stacked = torch.cat(tokens).to(device)
        sets.append(TokenSet(list(owner), stacked, stacked, scale=list(scale)))
    return sets
