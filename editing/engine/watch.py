"""Where a concept is found: the attention of its own tokens, collected while the host calls the model.

The map of a phrase in one cross-attention is sum_{j own} A_e[:, j] (eiup.py), the share of each position's attention to
the concept's prompt that its own tokens get, averaged over the heads. With evidence "alike" it is E: 1 where the
prompt's output is like the concept's, and edits act.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.blocks import BlockKey
from ..edits.digest import Shared
from ..edits.spec import Concept, EditSpec
from ..methods import eiup
from ..methods.attention import logits, split_heads
from ..methods.tokens import TokenSet, TokenSets, gather
from .backbone import Backbone
from .binding import KV
from .plan import Steering


class Watch(Shared):
    """What the model calls of one sampling run show of a concept, in the attentions that `blocks` names.

    evidence: one of methods.eiup.EVIDENCE; node: who asks, and is named by every error.
    """

    def __init__(self, concept: Concept, node: str, blocks: str = "all", evidence: str = "none") -> None:
        # Phrase by phrase as an erasure would find it. A spec that is never applied, but that says what suits a model.
        options = eiup.EIUPOptions(evidence=evidence)
        self.edits = [
            EditSpec("erasure", phrase_of(concept, p), blocks=blocks, options=options, node=node)
            for p in range(len(concept.phrases))
        ]
        self.phrases, self.evidence, self.blocks, self.node = concept.phrases, evidence, blocks, node
        self.maps: dict[BlockKey, list[Tensor]] = {}  # of each model call, [P, images, h, w]

    def admitted(self, backbone: Backbone) -> Collection[BlockKey]:
        """The attentions that it looks at; raises if the concept does not suit the model."""
        for edit in self.edits:
            backbone.admit(edit)
        return backbone.chosen(self.blocks, self.node)

    @torch.no_grad()
    def see(
        self,
        backbone: Backbone,
        key: BlockKey,
        A: Tensor,
        q: Tensor,
        k: Tensor,
        rows: Sequence[int],
        images: int,
        shape: Sequence[int],
        bind: Callable[[TokenSet], KV] | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """One attention of one model call. A, q: [B, N, C]; k: [B, L, C]; shape: [.., h, w] with h * w = N.

        rows: the positive prompts' rows, all images of one before the next; the prompts count alike. bind: what the
        concept is there, if not what the attention's own weights make of it; bias: what a mask adds to the logits of
        k, of these rows, [R or 1, H or 1, N or 1, L].
        """
        bind = bind or (lambda tokens: backbone.keys_values(key, tokens, q.dtype))
        A, q, k = (split_heads(x[list(rows)], backbone.blocks[key].heads) for x in (A, q, k))
        found = torch.stack([self._found(bind, A, q, k, p, bias) for p in range(len(self.phrases))])  # [P, R, N]
        maps = found.unflatten(1, (-1, images)).mean(1)  # [P, images, N]
        self.maps.setdefault(key, []).append(maps.unflatten(-1, tuple(shape[-2:])))

    def sets(self, device: torch.device) -> list[TokenSets]:
        """What it needs of an attention, phrase by phrase."""
        if self.evidence == "alike":
            return [gather([edit], [0], device) for edit in self.edits]
        tokens = [phrase.tokens.to(device) for phrase in self.phrases]
        return [TokenSets(separate=[TokenSet([0], each, each)]) for each in tokens]

    def _found(
        self, bind: Callable[[TokenSet], KV], A: Tensor, q: Tensor, k: Tensor, p: int, bias: Tensor | None
    ) -> Tensor:
        """A, q: [R, N, H, d]; k: [R, L, H, d]; bias: [R or 1, H or 1, N or 1, L]; returns [R, N]."""
        sets = self.sets(q.device)[p]
        if self.evidence == "alike":
            (group,) = sets.solved
            there, _ = eiup.where_alike(Steering(replace(group, tested={}), bind).found(A, q))
            return there[0]
        own = list(self.phrases[p].own)
        K, _ = bind(sets.separate[0]).single  # [1 or R, T, H, d]
        A_e = logits(q, K).softmax(-1)[..., own].sum(-1).transpose(1, 2)  # [R, N, H]
        if self.evidence == "share":
            A_e = A_e * eiup.share(q, k, [K[:, own]], bias)[0, ..., 0]
        return A_e.mean(-1)

    def features(self, blocks: Iterable[BlockKey]) -> Tensor:
        """A_e of one own token, or E, averaged over heads and positions, in each of the blocks: [P, images, B] on the
        CPU."""
        means = [torch.stack(self.maps[key]).mean((0, 3, 4)) for key in blocks]  # B times [P, images]
        own = torch.tensor([1 if self.evidence == "alike" else len(phrase.own) for phrase in self.phrases])
        return torch.stack(means, -1).cpu() / own[:, None, None]

    def heat(self, height: int, width: int) -> Tensor:
        """The mean over blocks and model calls, of the phrase found most: [images, height, width] on the CPU."""
        if not self.maps:
            raise ValueError(
                f"{self.node}: the prompt plays no part at the noise levels looked at; look at others, or all"
            )
        mean = [
            F.interpolate(torch.stack(maps).mean(0), (height, width), mode="bilinear", align_corners=False)
            for maps in self.maps.values()
        ]
        return torch.stack(mean).mean(0).amax(0).cpu()

    def close(self) -> None:
        self.maps.clear()


def phrase_of(concept: Concept, p: int) -> Concept:
    """The concept with one of its phrases alone."""
    return replace(concept, phrases=concept.phrases[p : p + 1])
