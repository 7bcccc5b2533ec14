"""Versions of learned files: a newer reader takes every older file, and an older one says what it lacks.

A file is of the least version that holds what it uses, so that a new version of a kind locks nobody out of files that
do without it. To let a kind hold more, give its row a Feature: files that use it name it under "needs". To change what
it holds already, move the row to `older`, with the step that brings such a file up.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from .header import json_of
from .kinds import KINDS, Kind, Shape

if TYPE_CHECKING:
    from .artefacts import Artefact

SHOWN = 5  # features that an error names


def newest(kind: Kind) -> int:
    """The version up to which files of this kind are read."""
    return max([len(kind.older) + 1, *(feature.version for feature in kind.features.values())])


def stamp(artefact: Artefact) -> dict[str, str]:
    """What a file's metadata say about its version: the least that holds the artefact, and the features it uses."""
    kind = KINDS[artefact.kind]
    needs = sorted(name for name, feature in kind.features.items() if feature.used(artefact))
    version = max([len(kind.older) + 1, *(kind.features[name].version for name in needs)])
    return {"schema": str(version), **({"needs": json.dumps(needs)} if needs else {})}


def stamped(metadata: Mapping[str, str]) -> tuple[int, tuple[str, ...]]:
    """A file's version and the features that it uses."""
    text = metadata.get("schema", "")
    try:
        version, needs = int(text) if text.isascii() and len(text) < 9 else 0, json_of(metadata.get("needs", "[]"))
    except (ValueError, RecursionError):
        version, needs = 0, []
    if version < 1 or not isinstance(needs, list) or not all(isinstance(name, str) for name in needs):
        raise ValueError("its metadata is damaged (schema or needs)")
    return version, tuple(needs)


def compare(version: int, needs: Collection[str], known: Collection[str], most: int) -> None:
    """Raises ValueError for a file that a newer ConceptGuard wrote, with what this one lacks if the file names it."""
    if lacking := [name[:40] for name in needs if name not in known]:
        what = ", ".join(repr(name) for name in lacking[:SHOWN]) + (", .." if len(lacking) > SHOWN else "")
        raise ValueError(f"it uses {what}, which this ConceptGuard does not know; update ConceptGuard")
    if version > most:
        raise ValueError(
            f"it has version {version} of its format, and this ConceptGuard reads up to version {most}; "
            "update ConceptGuard"
        )


def row_of(kind: Kind, version: int, needs: Collection[str]) -> dict[str, Shape]:
    """What a file of that version may hold, with these features."""
    row = dict(kind.older[version - 1].tensors if version <= len(kind.older) else kind.tensors)
    for name in needs:
        row |= kind.features[name].tensors
    return row


def brought_up(artefact: Artefact, version: int) -> Artefact:
    """What a file of that version holds, as the newest one would."""
    for step in KINDS[artefact.kind].older[version - 1 :]:
        artefact = step.up(artefact)
    return artefact
