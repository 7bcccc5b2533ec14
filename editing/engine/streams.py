"""Prompts that stand beside the picture in model calls of their own, and what each block makes of them.

In a joint attention the text's keys and values depend on the picture and on all blocks before, so those of a concept
cannot be had from weights alone. The concept takes the prompt's place in a copy of the rows that it edits: the same
noisy picture, time and guidance. What the blocks make of its tokens is kept until the rows themselves have been called.

A call of its own, and not further rows of the host's: a concept is as long as it is, and where the picture's positions
begin behind the text (Lumina, Z-Image), or no mask reaches the attention, padding would change the prompt's own rows.

x: [B, C, h, w], noisy latents; t: [B], their noise levels in units of the clean latent (of a model of flows, from 0 to
1); index: [R], rows of x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..edits.blocks import BlockKey
from ..edits.digest import Shared
from ..methods.tokens import TokenSet, TokenSets
from .binding import KV

NAMES = ("c_concat", "c_crossattn", "control", "transformer_options")  # by position, behind x and t


@dataclass
class ModelCall:
    """The arguments of the host's apply_model(x, t, c_concat, c_crossattn, control, transformer_options, **extras).

    given: how many of them by position, behind x and t."""

    x: Tensor
    t: Tensor
    more: dict[str, Any]
    given: int = 0

    @classmethod
    def of(cls, x: Tensor, t: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ModelCall:
        return cls(x, t, {**dict(zip(NAMES, args, strict=False)), **kwargs}, len(args))

    def through(self, executor: Callable[..., Tensor]) -> Tensor:
        by_name = {name: value for name, value in self.more.items() if name not in NAMES[: self.given]}
        return executor(self.x, self.t, *(self.more[name] for name in NAMES[: self.given]), **by_name)

    @property
    def context(self) -> Tensor:
        return self.more["c_crossattn"]

    def rows(self, index: Tensor, times: int) -> ModelCall:
        """The same for some rows of the batch, all of them again and again."""
        index, batch = index.repeat(times), len(self.x)

        def part(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[index.to(value.device)] if value.ndim and len(value) == batch else value
            if isinstance(value, list):
                return [part(each) for each in value]
            return {name: part(each) for name, each in value.items()} if isinstance(value, dict) else value

        more = {name: value if name == "transformer_options" else part(value) for name, value in self.more.items()}
        return ModelCall(part(self.x), part(self.t), more, self.given)

    def reading(self, context: Tensor) -> ModelCall:
        """The same with another text, all of whose tokens count. context: [B, T, W]."""
        more = {name: value for name, value in self.more.items() if name != "attention_mask"}
        lengths = {"num_tokens": context.shape[1]} if "num_tokens" in more else {}
        return replace(self, more={**more, **lengths, "c_crossattn": context.to(self.context)})

    def with_options(self, options: dict[str, Any]) -> ModelCall:
        return replace(self, more={**self.more, "transformer_options": options})


@dataclass
class Streams(Shared):
    """Of one model call. found: keys and values [R, T, H, d] of each prompt in each block; R: the edited rows."""

    found: dict[tuple[BlockKey, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def keys_values(self, key: BlockKey, tokens: TokenSet) -> KV:
        found = [self.found[key, name] for name in tokens.named]
        K, V = (torch.stack(each) for each in zip(*found, strict=True))
        return KV.of(tokens, K, V)


Prompts = tuple[list[str], Tensor, dict[str, Tensor]]


def prompts_of(sets: Iterable[TokenSets]) -> Iterator[Prompts]:
    """All prompts that are needed, each once, by length: their names, encodings [M, T, W], and what stands beside them,
    [M, ..] each."""
    by_length: dict[int, dict[str, tuple[Tensor, Mapping[str, Tensor]]]] = {}
    for tokens in (tokens for each in sets for tokens in each.all):
        beside = tokens.beside or [()] * len(tokens.k)
        for name, row, said in zip(tokens.named, tokens.k, beside, strict=True):
            by_length.setdefault(len(row), {})[name] = row, said[0] if said else {}
    for rows in by_length.values():
        encodings, beside = zip(*rows.values(), strict=True)
        yield list(rows), torch.stack(encodings), {name: torch.cat([x[name] for x in beside]) for name in beside[0]}
