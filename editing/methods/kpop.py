"""KPOP's learned prompt: tokens appended to the context, without touching the context (arXiv 2403.12326: concatenation
before W_k, W_v). training/kpop.py learns it.

One softmax over the prompt's tokens and the appended ones is a mean of both attentions, weighted by their partition
functions Z. Computing it so, after the prompt's own attention, leaves the rows that are not edited bit-identical, and
lets other packs' patches see the context they expect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..edits.blocks import parse_blocks
from ..edits.method import Method, register
from ..edits.spec import Direction, EditSpec, PromptTokens
from ..files.artefacts import Artefact
from ..presets.parts import LearnedEdit, LearnedFile
from .attention import logits, repetitions
from .tokens import TokenSet, TokenSets

MECHANISMS = ("concat", "additive")  # how a prompt was learned to enter


def append(
    A: Tensor, q: Tensor, k: Tensor, extra: list[tuple[Tensor, Tensor, Tensor]], bias: Tensor | None = None
) -> Tensor:
    """softmax(q [k; K_1; ..]^T / sqrt d) [v; V_1; ..] - A for A = softmax(q k^T / sqrt d) v: what appending changes.

    A, q: [R, N, H, d]; k: [R, L, H, d]; extra: K_i, V_i: [1, n_i, H, d] and how often to append them, s_i: [R];
    bias: what a mask adds to the prompt's logits, as `logits` has it; returns fp32 [R, N, H, d].

    Tokens are appended s_i times for every time that the prompt stands in the context (`repetitions`): beside a prompt
    that was repeated a single copy would count for less.
    """
    repeats = repetitions(k)
    log_Z = [logits(q, k, bias).logsumexp(-1)]  # [R, H, N]
    attentions = []
    for K, V, s in extra:
        e = logits(q, K)
        log_Z.append(e.logsumexp(-1) + (s * repeats).log()[:, None, None])
        attentions.append((e.softmax(-1) @ V.transpose(1, 2).float()).transpose(1, 2))  # [R, N, H, d]
    share = torch.stack(log_Z).softmax(0).transpose(2, 3)[..., None]  # [1 + len(extra), R, N, H, 1]
    A = A.float()
    return sum((w * (A_i - A) for w, A_i in zip(share[1:], attentions, strict=True)), torch.zeros_like(A))


def prompt_of(found: Artefact) -> PromptTokens:
    """The prompt that a file holds. Raises ValueError if no edit can use it."""
    if found.mechanism not in MECHANISMS:
        raise ValueError(
            f'"{found.name}" has the mechanism {found.mechanism[:40]!r}, which this ConceptGuard does not '
            f"know; it knows {' and '.join(MECHANISMS)}"
        )
    parse_blocks(found.blocks)
    k, v = found.tensors["k"][None], found.tensors["v"][None]
    if found.mechanism == "additive" and not torch.equal(k, v):
        raise ValueError(f'"{found.name}" is additive, but adds other things to keys than to values')
    return PromptTokens(found.name, k, v, found.mechanism, found.blocks, found)


def edit_of(prompt: PromptTokens) -> tuple[str, PromptTokens | Direction]:
    """The method and source for it: tokens that are appended, or a shift of the text encoding."""
    if prompt.mechanism == "concat":
        return "prompt", prompt
    return "direction", Direction(prompt.name, prompt.k[0], prompt.artefact)


class KPOPEdit(LearnedEdit):
    method: Literal["KPOP"]
    prompt: LearnedFile
    blocks: Literal["all"] = "all"  # a prompt knows those that it was learned in

    def learned(self) -> Iterator[tuple[LearnedFile, str]]:
        yield self.prompt, "prompt"
        yield from super().learned()


class KPOP(Method):
    name, label, order = "prompt", "KPOP", 20
    source, document = PromptTokens, KPOPEdit

    def complaint(self, spec: EditSpec) -> str | None:
        if spec.strength < 0:
            return f"strength is {spec.strength}, but tokens cannot be appended a negative number of times"
        return None

    def token_sets(self, edits: Sequence[tuple[int, EditSpec]], device: torch.device) -> TokenSets:
        prompts = [(i, spec.source) for i, spec in edits]
        return TokenSets(joined=[TokenSet([i], p.k.to(device), p.v.to(device)) for i, p in prompts])

    def to_document(self, spec: EditSpec, saver: Any, common: dict[str, Any]) -> KPOPEdit:
        return KPOPEdit(method="KPOP", prompt=saver.learned(spec), **common)

    def from_document(self, edit: KPOPEdit, maker: Any) -> dict[str, Any]:
        prompt = prompt_of(maker.artefact(edit.prompt, "prompt"))
        method, source = edit_of(prompt)
        return dict(method=method, source=source, blocks=prompt.blocks)

    def described(self, edit: KPOPEdit) -> str:
        return f"Puts the learned prompt {edit.prompt.file} back (KPOP, strength {edit.strength:g})"


METHOD = register(KPOP())
