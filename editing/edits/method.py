"""What an erasure method is to the rest of the pack: one object in one table, which everything else loops over.

A method's file in methods/ holds its formulas, its options, its part of a preset, and the object that is registered:
specs are checked, applied, saved, read and put into words by it, and by nothing that knows it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .spec import EditSpec

OnText = Callable[[Tensor, Tensor], Tensor]  # (context [R, L, W], s [R]) to the context that is read instead
OnValues = Callable[[Tensor, Tensor], Tensor]  # (context [R, L, W], s [edits, R]) to the one that values are made of


class Method:
    """What every method says of itself; what it leaves out, it does not do.

    name: in specs; label: for people, and in presets; order: of application, the least first, whatever the order of the
    nodes; source, options: the types of what a spec of it holds; document: its part of a preset, a presets.parts.Edit.
    """

    name: str
    label: str
    order: int
    source: type
    options: type = type(None)
    document: Any
    # What it changes: the attentions' "output", or the text that they read; the text that "values" alone are made of;
    # or the "guidance", what a positive prompt predicts beside another.
    stage: str = "output"

    # -- the spec --------------------------------------------------------------------------------------------------

    def complaint(self, spec: EditSpec) -> str | None:
        """What is wrong with a spec's own numbers, and the mend."""
        return None

    def idle(self, spec: EditSpec) -> bool:
        """Whether its options say that nothing happens."""
        return False

    def adds(self, spec: EditSpec) -> bool:
        """Whether its options say that it brings in what it names, by a sum that another edit's share can cancel."""
        return False

    def admit(self, spec: EditSpec, backbone: Any) -> None:
        """Raise `spec.error` if it cannot edit this model, for reasons beside the text's width and the blocks."""

    def window(self, spec: EditSpec) -> tuple[float, float]:
        """The percents of the timesteps between which it acts."""
        return spec.start_percent, spec.end_percent

    # -- the edit --------------------------------------------------------------------------------------------------

    def on_text(self, spec: EditSpec, device: torch.device) -> OnText | None:
        """What is done to the text that keys and values are made of."""
        return None

    def on_pooled(self, spec: EditSpec, device: torch.device) -> OnText | None:
        """What is done to the pooled text, of a model that is told one: from (p [R, P], s [R]) to [R, P]."""
        return None

    def on_values(
        self, edits: Sequence[tuple[int, EditSpec]], project: Callable[[Tensor], Tensor], device: torch.device
    ) -> tuple[OnValues | None, set[int]]:
        """Of stage "values": what edits, each with its number, do together in one attention, and which of them do
        nothing there. project: texts [.., W] to their values [.., H * d]."""
        raise NotImplementedError(f"{self.label} changes no values")

    def heard(self, spec: EditSpec, blocks: int, chosen: int) -> None:
        """Of stage "values": told in how many of its chosen attentions an edit acts, once they are known."""

    def momentum(self, spec: EditSpec) -> Any:
        """Of stage "guidance": what is kept from step to step of a run, with guided(e_p, e_0, e_S, step, options)."""
        raise NotImplementedError(f"{self.label} guides nothing")

    def token_sets(self, edits: Sequence[tuple[int, EditSpec]], device: torch.device) -> Any:
        """What the edits need of a cross-attention: methods.tokens.TokenSets, each set with its edit's number."""
        raise NotImplementedError(f"{self.label} works on the text alone")

    def taken(self, found: Any, s: Tensor, options: Any, note: Callable[[Tensor], None]) -> Tensor:
        """What a group of edits that is solved together takes away from A; fp32 [R, N, H, d].

        found: methods.found.Found; s: [K, R, 1], the strength of each phrase in each row; note: to be told where the
        method found what it looks for, 1 or 0 [K, R, N], if it looks where to act.
        """
        raise NotImplementedError(f"{self.label} solves nothing together")

    def peak(self, found: Any, options: Any) -> Tensor | None:
        """The most that is found of each phrase at any position, [K, R, 1, H or 1, 1], of a method that asks; found: of
        all positions, or of every n-th."""
        return None

    def first_look(self, spec: EditSpec) -> str | None:
        """The evidence (methods.eiup.EVIDENCE) whose maps of one call of the unedited model it must see before it can
        act; None: it needs no look."""
        return None

    def settled(self, spec: EditSpec, watch: Any, blocks: Iterable[Any], images: Sequence[int]) -> Sequence[EditSpec]:
        """The edits that it comes to after its first look, an engine.watch.Watch, at these images of the batch."""
        return (spec,)

    # -- presets ---------------------------------------------------------------------------------------------------

    def to_document(self, spec: EditSpec, saver: Any, common: dict[str, Any]) -> Any:
        """Its part of a preset. saver: presets.save.Saver; common: the fields that all edits have. Raises ValueError
        for what no preset can say."""
        raise ValueError(f"the edit of {spec.node} cannot be saved: presets do not hold {self.label}")

    def from_document(self, edit: Any, maker: Any) -> dict[str, Any]:
        """The fields of an EditSpec that are the method's own. maker: presets.apply.Maker."""
        raise NotImplementedError(f"presets do not hold {self.label}")

    def described(self, edit: Any) -> str:
        """What a preset's edit will do, in plain words: the start of a sentence."""
        raise NotImplementedError(f"presets do not hold {self.label}")


_methods: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method; refuses a twin."""
    for other in _methods.values():
        if method.name == other.name or method.label == other.label or method.order == other.order:
            raise ValueError(f"{method.label} ({method.name}, {method.order}) is like {other.label}, which is there")
    _methods[method.name] = method
    return method


def unregister(name: str) -> None:
    del _methods[name]


def methods() -> tuple[Method, ...]:
    """All of them, in the order of application."""
    return tuple(sorted(_methods.values(), key=lambda method: method.order))


def method(name: str) -> Method:
    if name not in _methods:
        raise ValueError(f"there is no method {name!r}; the methods are {', '.join(each.name for each in methods())}")
    return _methods[name]


def labelled(label: str) -> Method:
    return next(each for each in _methods.values() if each.label == label)
