"""The edits that are active together as tensors: what they do to each cross-attention, and to which rows of a batch.

Made at the first model call that needs it, when the weights are loaded and patched, and kept for the calls that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..edits.blocks import BlockKey, select_blocks
from ..edits.spec import Direction, EditSpec
from ..methods.append import append
from ..methods.attention import attend, logits, split_heads
from ..methods.cre import CREOptions, Kept, projection
from ..methods.eiup import EIUPOptions, reweighted, share, steered, where_alike
from ..methods.safe_region import shift
from .tokens import KV, Solved, TokenSets, gather

Observer = Callable[..., None]
Window = tuple[int, ...] | None  # the images of a batch that a context window shows

# Numbers that the outputs found for all of a block's prompts may hold at once. A CPU is several times faster on what
# fits its caches; elsewhere this only bounds the memory of large pictures with many concepts.
PIECE = {"cpu": 2**21, "other": 2**26}


@dataclass
class Rows:
    """The R edited rows of a batch, and s: [edits, R], the strength of each edit times its gate there."""

    index: slice | Tensor
    s: Tensor


@dataclass
class Steering:
    """Concepts that are solved together, their prompts by length; the baseline, if any, is the very first.

    keep: the prompts of their neighbours, and whose each is, [K, M].
    """

    options: CREOptions | EIUPOptions
    prompts: list[KV]
    keep: list[KV]

    def __post_init__(self) -> None:
        self.owner = torch.cat([kv.owner for kv in self.prompts])
        self.scale = torch.cat([kv.scale for kv in self.prompts])
        if self.keep:
            concepts = self.owner[1:] if self.options.baseline == "neutral" else self.owner
            self.kept_for = concepts[:, None] == torch.cat([kv.owner for kv in self.keep])

    @classmethod
    def bound(cls, sets: Solved, attn: Any, dtype: torch.dtype) -> Steering:
        prompts, keep = ([part.bind(attn, dtype) for part in parts] for parts in (sets.phrases, sets.keep))
        return cls(sets.options, prompts, keep)

    @classmethod
    def of(cls, spec: EditSpec, attn: Any, device: torch.device, dtype: torch.dtype) -> Steering:
        """One edit alone."""
        (sets,) = gather([spec], [0], device).steering
        return cls.bound(sets, attn, dtype)

    def alike(self, A: Tensor, q: Tensor) -> Tensor:
        """E of an erasure's one phrase (eiup.py): [R, N]."""
        found = found_in(self.prompts, q)
        kept = Kept(found_in(self.keep, q), self.kept_for) if self.keep else None
        return where_alike(A, found[1:], found[0], kept)[0][0]

    def projection(self, A: Tensor, q: Tensor, s: Tensor, observe: Observer | None) -> Tensor:
        """What they take away. A, q: [R, N, H, d]; s: [edits, R]; returns fp32 [R, N, H, d]."""
        s = (s[self.owner] * self.scale[:, None])[:, :, None]
        sets = len(s) + sum(len(kv.owner) for kv in self.keep)
        step = max(1, PIECE.get(A.device.type, PIECE["other"]) // (sets * A[:, 0].numel()))
        pieces = [self._project(*piece, s, observe) for piece in zip(A.split(step, 1), q.split(step, 1), strict=True)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def _project(self, A: Tensor, q: Tensor, s: Tensor, observe: Observer | None) -> Tensor:
        """The same for some positions; s: [K, R, 1], the baseline's in front."""
        At, A0 = found_in(self.prompts, q), None
        if self.options.baseline == "neutral":
            A0, At, s = At[0], At[1:], s[1:]
        if observe is not None:
            observe(A=A, At=At, A0=A0, s=s, options=self.options)
        kept = Kept(found_in(self.keep, q), self.kept_for) if self.keep else None
        if isinstance(self.options, CREOptions):
            return projection(A, At, s, self.options, A0, kept)
        assert A0 is not None
        return steered(A, At, s, A0, kept)


def found_in(prompts: Sequence[KV], q: Tensor) -> Tensor:
    """What the queries [R, N, H, d] find in each prompt: [M, R, N, H, d]."""
    found = [attend(q, kv.K, kv.V) for kv in prompts]
    return found[0] if len(found) == 1 else torch.cat(found)


class BlockEdits:
    """What happens to one cross-attention's output."""

    def __init__(self, sets: TokenSets, attn: Any, dtype: torch.dtype) -> None:
        self.heads: int = attn.heads
        self.joined = [each.bind(attn, dtype) for each in sets.joined]
        self.separate = [each.bind(attn, dtype) for each in sets.separate]
        self.steering = [Steering.bound(each, attn, dtype) for each in sets.steering]

    def apply(
        self, A: Tensor, q: Tensor, k: Tensor, v: Tensor, s: Tensor, foreign: bool, observe: Observer | None
    ) -> Tensor:
        """The edited A. A, q: [R, N, C]; k, v: [R, L, C]; s: [edits, R]; returns fp32 or A's dtype [R, N, C].

        `foreign` says that another pack's patch made A: then it is not the attention to k and v alone.
        """
        A, q, k, v = (split_heads(x, self.heads) for x in (A, q, k, v))
        if self.joined:
            base = (logits(q, k).softmax(-1) @ v.transpose(1, 2).float()).transpose(1, 2) if foreign else A
            A = A + append(base, q, k, [(kv.K, kv.V, s[kv.owner][0]) for kv in self.joined])
        for kv in self.separate:
            A = A + reweighted(q, kv.K, kv.V, s[kv.owner], share(q, k, kv.own) if kv.own else None)
        taken = [steering.projection(A, q, s, observe) for steering in self.steering]  # all of them from the same A
        for part in taken:
            A = A.float() - part
        return A.flatten(-2)


class Plan:
    """The edits of one or more model calls; `blocks` has every cross-attention whose output they change."""

    def __init__(
        self, specs: Sequence[EditSpec], blocks: Mapping[BlockKey, Any], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.specs = specs
        self.device = device
        self.chosen = [select_blocks(spec.blocks, blocks) for spec in specs]
        self.directions = {i: s.source.d.to(device) for i, s in enumerate(specs) if isinstance(s.source, Direction)}
        self.blocks: dict[BlockKey, BlockEdits] = {}
        self._rows: dict[tuple[object, ...], Rows | None] = {}
        gathered: dict[tuple[int, ...], TokenSets] = {}  # most blocks get the same edits
        for key, block in blocks.items():
            here = tuple(i for i in range(len(specs)) if key in self.chosen[i] and i not in self.directions)
            if here:
                if here not in gathered:
                    gathered[here] = gather(specs, here, device)
                self.blocks[key] = BlockEdits(gathered[here], block.attn2, dtype)

    def rows(self, chunks: Sequence[int], batch: int, window: Window = None) -> Rows | None:
        """The rows to edit, None if there are none.

        `chunks` says for each equal part of the batch, every part holding all images, which of the host's conds it
        serves: 0 is the conditional one, and the only one that is edited. `window` names the images if a context
        window shows only some of them.
        """
        key = (tuple(chunks), batch, window)
        if key not in self._rows:
            self._rows[key] = self._find_rows(chunks, batch, window)
        return self._rows[key]

    def _find_rows(self, chunks: Sequence[int], batch: int, window: Window) -> Rows | None:
        images, left = divmod(batch, len(chunks))
        if left:
            raise self.specs[0].error(
                f"cannot tell which of {batch} rows are conditional: they do not divide into the host's {len(chunks)} "
                "parts. A node between this one and the sampler changes the batch inside the model; take it out"
            )
        gates = [self._strengths(spec, images, window) for spec in self.specs]
        opened = [image for image in range(images) if any(gate[image] for gate in gates)]
        index = [c * images + image for c, cond in enumerate(chunks) if cond == 0 for image in opened]
        if not index:
            return None
        s = torch.tensor([[gate[row % images] for row in index] for gate in gates], device=self.device)
        if index == list(range(index[0], index[-1] + 1)):
            return Rows(slice(index[0], index[-1] + 1), s)
        return Rows(torch.tensor(index, device=self.device), s)

    def _strengths(self, spec: EditSpec, images: int, window: Window) -> list[float]:
        try:
            return [spec.strength * value for value in spec.gate.per_image(images, window)]
        except ValueError as error:
            raise spec.error(str(error)) from None

    def shift(self, context: Tensor, key: BlockKey, rows: Rows) -> Tensor:
        """`context` [B, L, W] with the directions that reach this block added to the edited rows."""
        here = [i for i in self.directions if key in self.chosen[i]]
        if not here:
            return context
        c = context[rows.index]
        for i in here:
            c = shift(c, self.directions[i], rows.s[i])
        return put(context, rows.index, c)


def put(x: Tensor, index: slice | Tensor, rows: Tensor) -> Tensor:
    """A copy of x with some rows replaced."""
    rows = rows.to(x.dtype)
    if isinstance(index, slice) and len(rows) == len(x):
        return rows
    x = x.clone()
    x[index] = rows
    return x
