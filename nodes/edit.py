"""What nodes that put an edit on a MODEL have in common beside their inputs: how these are checked and made an edit."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..editing.edits.spec import Concept, Direction, EditSpec, PromptTokens
from ..editing.engine.host import add_edit
from .bounds import schema_of
from .inputs import UNLINKED, Where, check, expect, named, where
from .show import telling


class EditNode(io.ComfyNode):
    """A node that edits a MODEL with METHOD by a SOURCE, in the input of that kind; `options` makes the rest.

    What is not given to `execute` is what the schema has for it.
    """

    METHOD: str
    SOURCE: type[Concept | PromptTokens | Direction] = Concept

    @classmethod
    def validate_inputs(
        cls,
        strength: float | None = None,
        start_percent: float | None = None,
        end_percent: float | None = None,
        blocks: str | None = None,
        range: Any = UNLINKED,
    ) -> bool | str:
        return check(cls, strength, start_percent, end_percent, blocks, range)

    @classmethod
    def options(cls, *source: Any, **inputs: Any) -> Any:
        """The method's options, of the source and of the inputs that are this node's own. Raises ValueError."""
        return None

    @classmethod
    def execute(cls, model: Any, **inputs: Any) -> io.NodeOutput:
        with named(node := schema_of(cls).node_id):
            given = {**defaults(cls), **inputs}
            source: Any = expect(given.pop(cls.SOURCE.socket), cls.SOURCE, cls.SOURCE.socket)
            place, strength = place_of(given), given.pop("strength", 1.0)
            options = cls.options(source, **given)
        spec = EditSpec(cls.METHOD, source, strength, **place, options=options, node=node, report=telling(cls))
        return io.NodeOutput(add_edit(model, spec))


def defaults(node: type[io.ComfyNode]) -> dict[str, Any]:
    """What the inputs of a node hold that nobody touched."""
    held = {each.id: getattr(each, "default", None) for each in schema_of(node).inputs}
    return {id: value for id, value in held.items() if value is not None}


def place_of(inputs: dict[str, Any]) -> Where:
    """When, where, whether and for whom, taken out of a node's inputs."""
    names = ("start_percent", "end_percent", "blocks", "range", "gate", "rows")
    return where(**{name: inputs.pop(name) for name in names if name in inputs})
