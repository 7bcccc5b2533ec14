"""Where a concept is found: the attention of its own tokens, collected while the host calls the model.

The map of a phrase in one cross-attention is sum_{j own} A_e[:, j] (eiup.py), the share of each position's attention to
the concept's prompt that its own tokens get, averaged over the heads. With evidence "alike" it is E: 1 where the
prompt's output is like the concept's, and edits act.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.blocks import BlockKey
from ..edits.digest import Shared
from ..edits.spec import Concept, EditSpec, Phrase
from ..methods.attention import logits, split_heads
from ..methods.eiup import EIUPOptions, share
from .plan import Steering

SCALES = ("picture", "batch", "none")
# Black through purple and orange to pale yellow, as plots colour heat: readable in grey, and for the colour-blind.
COLOURS = ((0.0, 0.0, 0.0), (0.34, 0.06, 0.43), (0.73, 0.21, 0.33), (0.98, 0.55, 0.04), (0.99, 1.0, 0.64))


class Watch(Shared):
    """What the model calls of one sampling run show of the concept of `spec`, an erasure that is never applied."""

    def __init__(self, spec: EditSpec) -> None:
        assert isinstance(spec.source, Concept) and isinstance(spec.options, EIUPOptions)
        self.spec, self.concept = spec, spec.source
        self.phrases = spec.source.phrases
        self.evidence = spec.options.evidence
        self.maps: dict[BlockKey, list[Tensor]] = {}  # of each model call, [P, images, h, w]

    @torch.no_grad()
    def see(
        self, key: BlockKey, attn: Any, A: Tensor, q: Tensor, k: Tensor, chunks: Sequence[int], shape: Sequence[int]
    ) -> None:
        """One cross-attention of one model call. A, q: [B, N, C]; k: [B, L, C]; shape: [.., h, w] with h * w = N.

        chunks: which cond each equal part of the batch serves; the parts of the conditional one (0) count alike.
        """
        conds = [i for i, cond in enumerate(chunks) if cond == 0]
        rows = (x.unflatten(0, (len(chunks), -1))[conds].flatten(0, 1) for x in (A, q, k))
        A, q, k = (split_heads(x, attn.heads) for x in rows)
        found = torch.stack([self._found(attn, A, q, k, phrase) for phrase in self.phrases])  # [P, R, N]
        maps = found.unflatten(1, (len(conds), -1)).mean(1)  # [P, images, N]
        self.maps.setdefault(key, []).append(maps.unflatten(-1, tuple(shape[-2:])))

    def _found(self, attn: Any, A: Tensor, q: Tensor, k: Tensor, phrase: Phrase) -> Tensor:
        """A, q: [R, N, H, d]; k: [R, L, H, d]; returns [R, N]."""
        if self.evidence == "alike":
            alone = replace(self.spec, source=replace(self.concept, phrases=(phrase,)))
            return Steering.of(alone, attn, q.device, q.dtype).alike(A, q)
        own = list(phrase.own)
        K = split_heads(attn.to_k(phrase.tokens.to(q)), attn.heads)  # [1, T, H, d]
        A_e = logits(q, K).softmax(-1)[..., own].sum(-1).transpose(1, 2)  # [R, N, H]
        if self.evidence == "share":
            A_e = A_e * share(q, k, [K[:, own]])[0, ..., 0]
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
            raise self.spec.error("the prompt plays no part at the noise levels looked at; look at others, or all")
        mean = [
            F.interpolate(torch.stack(maps).mean(0), (height, width), mode="bilinear", align_corners=False)
            for maps in self.maps.values()
        ]
        return torch.stack(mean).mean(0).amax(0).cpu()

    def close(self) -> None:
        self.maps.clear()


def scaled(heat: Tensor, scale: str) -> Tensor:
    """[images, h, w] from 0 to 1: each "picture" from its least to its greatest, all of the "batch" alike, or as is."""
    if scale != "none":
        over = (1, 2) if scale == "picture" else (0, 1, 2)
        low, high = heat.amin(over, keepdim=True), heat.amax(over, keepdim=True)
        heat = (heat - low) / (high - low).clamp_min(1e-12)
    return heat.clamp(0, 1)


def painted(heat: Tensor, picture: Tensor | None = None) -> Tensor:
    """The heat as colours, over the picture if there is one. heat: [B, h, w] from 0 to 1; picture: [B, h, w, 3]."""
    colours = torch.tensor(COLOURS)
    place = heat.clamp(0, 1) * (len(colours) - 1)
    below = place.floor().long().clamp_max(len(colours) - 2)
    hot = torch.lerp(colours[below], colours[below + 1], (place - below)[..., None])
    if picture is None:
        return hot
    cover = 0.25 + 0.6 * heat[..., None]  # the picture stays visible, most of it where nothing was found
    return torch.lerp(picture[..., :3].float(), hot, cover)
