"""Whose prompt each part of a batch is: told by the names that a guider gives its prompts, never by their order.

The host's own guiders do not agree in the order: CFGGuider passes [positive, negative], DualCFGGuider [negative,
middle, positive], others pass one prompt alone. Pure torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..edits.digest import Shared

CONDS = "concept_guard_conds"  # in transformer_options, below one call of the host's batching: a Named
ORDER = ("positive", "negative")  # of the prompts of the host's CFGGuider
# What an entry of a prompt brings past the text that edits change, and what is said of it.
BROUGHT = {
    "unclip_conditioning": "a concept that a prompt's picture shows (unCLIP) stays",
    "gligen": "what GLIGEN's boxes say is read as it is",
    "control": "a ControlNet reads the prompt as it is",
}
NOT_POSITIVE = ("neg", "uncond", "empty", "null")  # within the names of all other prompts


def positive(name: str | None) -> bool:
    """Whether a guider's prompt of this name is one that the picture is to follow."""
    return name is not None and not any(part in name.lower() for part in NOT_POSITIVE)


@dataclass(frozen=True)
class Named(Shared):
    """One call of the host's batching. names: of its lists of prompts by their index, None for one that no guider
    knows; images: in its batch."""

    names: tuple[str | None, ...]
    images: int


class Guiders:
    """The guiders of one sampling run, the outermost first.

    They name lists of prompts, each a dict with a `uuid`. A uuid alone does not tell the list: the host gives a prompt
    for a part of the picture a partner in the other lists, and that copy keeps the uuid; it comes behind their own.
    """

    def __init__(self) -> None:
        self.guiders: list[Any] = []
        self.owners: dict[Any, str] = {}  # the name of the list that each uuid comes from
        self.brought: dict[str, None] = {}  # what positive prompts bring past their texts, for people
        self.ordered = True  # whether all of them pass their prompts on as the host's CFGGuider does

    def add(self, guider: Any, ordered: bool) -> None:
        self.guiders.append(guider)
        lists = conds_of(guider)
        self.ordered &= ordered and set(lists) <= set(ORDER)
        for name, conds in lists.items():
            for cond in conds:
                self.owners.setdefault(cond.get("uuid"), name)
                self.brought.update(dict.fromkeys(brought(cond) if positive(name) else ()))

    def named(self, lists: Sequence[Any], images: int) -> Named:
        return Named(tuple(self.name(conds) for conds in lists), images)

    def name(self, conds: Any) -> str | None:
        for guider in self.guiders:
            for name, known in conds_of(guider).items():
                if known is conds:
                    return name
        owners = (self.owners.get(cond.get("uuid")) for cond in conds or ())
        return next((owner for owner in owners if owner is not None), None)

    def of_parts(self, parts: Sequence[int], options: Mapping[str, Any]) -> tuple[str | None, ...]:
        """The names of the prompts that the parts of a model call's batch serve; parts: their indices, as the host
        numbers them. Raises ValueError where nobody can tell."""
        named, uuids = options.get(CONDS), options.get("uuids") or ()
        if named is not None and max(parts) < len(named.names):
            return tuple(named.names[part] for part in parts)
        if len(uuids) == len(parts) and any(uuid in self.owners for uuid in uuids):
            return tuple(self.owners.get(uuid) for uuid in uuids)
        if self.ordered and max(parts) < len(ORDER):
            return tuple(ORDER[part] for part in parts)
        raise ValueError(
            "cannot tell which prompts are the positive ones: "
            f"{' within '.join(type(guider).__name__ for guider in reversed(self.guiders))} calls the model with "
            f"{len(parts)} prompts that it does not name, in an order of its own. Use another guider, or set the "
            "edit's rows to all"
        )

    @property
    def options(self) -> Mapping[str, Any]:
        """The model options of the outermost."""
        return getattr(self.guiders[0], "model_options", {}) if self.guiders else {}


def brought(cond: Mapping[str, Any]) -> list[str]:
    """What an entry of a prompt brings past its text."""
    return [said for name, said in BROUGHT.items() if cond.get(name) and (name != "control" or reads(cond[name]))]


def reads(control: Any) -> bool:
    """Whether one of a chain of ControlNets and adapters is called with the text, as the latter are not."""
    previous = getattr(control, "previous_controlnet", None)
    return hasattr(control, "control_model") or (previous is not None and reads(previous))


def conds_of(guider: Any) -> Mapping[str, Collection[Any]]:
    """A guider's prompts by name, as they are now: the host makes new lists when the run begins."""
    conds = getattr(guider, "conds", None)
    return conds if isinstance(conds, Mapping) else {}
