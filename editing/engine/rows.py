"""Which rows of a batch belong to which prompt and image, as the host and known packs lay them out. Pure torch.

The host puts one part for each prompt of a call along the batch, each of them with all images. Packs make more of it:
tiles of the picture, outside of the model; regions of a prompt, inside of an attention. A layout that nobody declares
is an error: half of the rows would be edited, or another prompt's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

Window = tuple[int, ...] | None  # the images of a batch that a context window shows

# ComfyUI-TiledDiffusion's wrappers of a model call: every tile has all that the host had put into the batch.
TILES = ("MultiDiffusion", "MixtureOfDiffusers", "SpotDiffusion")
# Attention couples that say which part each row of their larger batch serves: ComfyUI-ppm's, comfyui-prompt-control's.
COUPLES = ("cond_or_uncond_couple", "cond_or_uncond_hook_couple")
# And one that does not (cgem156-ComfyUI), by the function that it patches attentions with.
UNSAID = "AttentionCouple.attention_couple_simple."
NEGATIVE = 1  # the part that all of them leave as it is, whatever the guider calls it
CHANGE = "take it out, or put the Attention Couple of ComfyUI-ppm or of comfyui-prompt-control in its place"


@dataclass
class Rows:
    """The R edited rows of a batch, and s: [edits, R], the strength of each edit times its gate there.

    image: [R], whose row each is, of the whole batch; on: for each edit, in how many of them it acts; parts: whose the
    rows are.
    """

    index: slice | Tensor
    s: Tensor
    image: Tensor
    on: tuple[int, ...]
    parts: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Layout:
    """Whose each row is: part, of those that the host called together, and image, of the batch's."""

    part: tuple[int, ...]
    image: tuple[int, ...]


def in_parts(times: Sequence[int], images: int, again: int = 1) -> Layout:
    """Part i with all images, times[i] times in a row; and all of that `again` and again."""
    part = tuple(i for i, n in enumerate(times) for _ in range(n * images))
    return Layout(part * again, tuple(range(images)) * sum(times) * again)


@dataclass(frozen=True)
class Served:
    """What a model call's batch is.

    parts: the host's index of the prompt that each serves; names: those prompts' names; edited: whether a conditional
    edit is for it; images: in each part; tiles: of which the whole is repeated; patched: who patches the attentions'
    batch, for people; unsaid: whether one of them is known to enlarge it without saying how.
    """

    parts: tuple[int, ...]
    names: tuple[str | None, ...]
    edited: tuple[bool, ...]
    images: int
    tiles: int = 1
    window: Window = None
    patched: str = ""
    unsaid: bool = False

    @property
    def shown(self) -> tuple[int, ...]:
        """The images of each part, of the whole batch."""
        seen = self.window if self.window is not None and len(self.window) == self.images else range(self.images)
        return tuple(seen)

    def reached(self, spec: Any) -> tuple[bool, ...]:
        """For each part, whether an edit is for it."""
        return (True,) * len(self.parts) if spec.rows == "all" else self.edited

    def conditional(self, batch: int, couple: tuple[int, ...] = ()) -> list[int]:
        """The rows of the positive prompts, all images of one part before the next."""
        return [row for row, part in enumerate(self.layout(batch, couple).part) if self.edited[part]]

    def of(self, parts: Sequence[int]) -> Served:
        """What a call of these parts alone is."""
        return replace(
            self,
            parts=tuple(self.parts[i] for i in parts),
            names=tuple(self.names[i] for i in parts),
            edited=tuple(self.edited[i] for i in parts),
        )

    @property
    def batch(self) -> int:
        return len(self.parts) * self.images * self.tiles

    def layout(self, batch: int, couple: tuple[int, ...] = ()) -> Layout:
        """Of an attention's batch; couple: what an attention couple says of it. Raises ValueError if unknown."""
        if batch == self.batch and not couple:
            return in_parts([1] * len(self.parts), self.images, self.tiles)
        regions = self._regions(batch, couple) if self.tiles == 1 and (couple or self.unsaid) else None
        if regions is None:
            who = f"{self.patched} makes" if self.patched else "a node between this one and the sampler makes"
            raise ValueError(
                f"cannot tell which of {batch} rows belong to which prompt: {who} them of {self.batch} inside an "
                f"attention and does not say how; {CHANGE}"
            )
        return in_parts([1 if part == NEGATIVE else regions for part in self.parts], self.images)

    def _regions(self, batch: int, couple: tuple[int, ...]) -> int | None:
        """Into how many regions every part but the negative one is split; None if the numbers do not fit."""
        alone = self.parts.count(NEGATIVE)
        total, rest = divmod(batch, self.images)
        regions, odd = divmod(total - alone, (len(self.parts) - alone) or 1)
        if rest or odd or regions < 0 or (couple and len(couple) != total):
            return None
        return regions


def couple_of(extra: Mapping[str, Any]) -> tuple[int, ...]:
    """What an attention couple says of a block's batch; nothing where there is none."""
    return next((tuple(extra[name]) for name in COUPLES if extra.get(name)), ())


def images_of(options: Mapping[str, Any], named: Any, batch: int, parts: int) -> int:
    """How many images a model call is for: as many as its batching was called with, or as there are noise levels."""
    if named is not None:
        return int(named.images)
    sigmas = options.get("sigmas")
    levels = len(sigmas) if isinstance(sigmas, Tensor) and sigmas.ndim == 1 else 1
    return levels if levels > 1 else max(1, batch // parts)


def tiles_of(batch: int, parts: int, images: int, wrapper: Any) -> int:
    """How often a model call's batch holds all parts and images. Raises ValueError where it does not, or where nobody
    known made it so; wrapper: the model's function wrapper."""
    tiles, rest = divmod(batch, parts * images)
    if rest or not tiles or (tiles > 1 and type(wrapper).__name__ not in TILES):
        who = f"{said(wrapper)} calls" if wrapper is not None else "a node between this one and the sampler calls"
        raise ValueError(
            f"cannot tell which of {batch} rows belong to which prompt: {who} the model with them instead of "
            f"{parts * images}, for {parts} prompt{'s' * (parts > 1)} and {images} image{'s' * (images > 1)}; take it "
            "out"
        )
    return tiles


def patches_of(options: Mapping[str, Any]) -> tuple[str, bool]:
    """Who patches the attentions' text and batch, for people, and whether one of them is known to enlarge it without
    saying how."""
    names = [said(patch) for patch in options.get("patches", {}).get("attn2_patch", ())]
    return ", ".join(dict.fromkeys(names)), any(UNSAID in name for name in names)


def said(patch: Callable[..., Any] | Any) -> str:
    """Where a function or object comes from, for people: the pack's folder and the name in its code."""
    inner = getattr(patch, "__func__", patch)
    inner = getattr(inner, "func", inner)  # of a partial
    owner = inner if hasattr(inner, "__qualname__") else type(inner)
    module = str(getattr(owner, "__module__", "") or "").replace("\\", "/").split("custom_nodes")[-1].strip("./")
    return f"{module}: {owner.__qualname__}" if module else owner.__qualname__


def put(x: Tensor, index: slice | Tensor, rows: Tensor) -> Tensor:
    """A copy of x, [B, ...], with some rows replaced. index: [R], or a slice; rows: [R, ...]."""
    rows = rows.to(x.dtype)
    if isinstance(index, slice) and len(rows) == len(x):
        return rows
    x = x.clone()
    x[index] = rows
    return x


def window_of(extra: Mapping[str, Any]) -> Window:
    """The images that a context window shows, the host's or AnimateDiff-Evolved's; None when all are shown."""
    window = extra.get("context_window")
    if window is not None and window.dim == 0:
        anchor = getattr(window, "causal_anchor_index", None)  # newer hosts put the picture before it in front
        return (*([anchor] if anchor is not None and anchor >= 0 else []), *window.index_list)
    shown = (extra.get("ad_params") or {}).get("sub_idxs")
    return tuple(shown) if shown else None
