"""Versions of presets: a newer reader takes every older document, and an older one says what it lacks.

A document is of the least version that holds what it uses. To give it a new field, mark that with the version and a
name for people: `instead: Annotated[tuple[Phrase, ...], since(2, "what to draw instead")] = ()`; documents that use it
name it under "needs". To change what a document holds already, add the step from that version to the next to UPS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ..files.migrate import compare

UPS: list[Callable[[dict[str, Any]], dict[str, Any]]] = []  # from version 1 to 2, from 2 to 3, ..
FEATURES: dict[str, int] = {}  # that this reader knows: name -> since which version


@dataclass(frozen=True)
class Since:
    """The mark of a field that the first version had not."""

    version: int
    feature: str


def since(version: int, feature: str) -> Since:
    FEATURES[feature] = version
    return Since(version, feature)


def newest() -> int:
    """The version up to which documents are read."""
    return max([len(UPS) + 1, *FEATURES.values()])


def stamp(preset: BaseModel) -> dict[str, Any]:
    """The version of a document of it, and the features that it needs."""
    marks = set(used(preset))
    needs = sorted(mark.feature for mark in marks)
    version = max([len(UPS) + 1, *(mark.version for mark in marks)])
    return {"schema_version": version, **({"needs": needs} if needs else {})}


def used(value: Any) -> Iterator[Since]:
    """The marks of all fields, at any depth, that are not as they are by default, and of what a part says besides."""
    if isinstance(value, tuple):
        for each in value:
            yield from used(each)
    if isinstance(value, BaseModel):
        yield from getattr(value, "further", ())
        for name, field in type(value).model_fields.items():
            each = getattr(value, name)
            if each != field.default:
                yield from (mark for mark in field.metadata if isinstance(mark, Since))
                yield from used(each)


def admit(version: int, needs: tuple[str, ...]) -> None:
    """Raises ValueError, which names what this reader lacks, for a document that is too new."""
    compare(version, needs, FEATURES, newest())


def brought_up(document: dict[str, Any], version: int) -> dict[str, Any]:
    """A document of that version as the newest one would be."""
    for up in UPS[version - 1 :]:
        document = up(document)
    return document
