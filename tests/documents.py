"""A preset's document to change and to apply, the same with nodes, and what counts the documents of a fuzz."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conceptguard.editing.engine.host import edits_of
from conceptguard.nodes.concept import ConceptGuardConcept
from conceptguard.nodes.cre import ConceptGuardCRE
from conceptguard.nodes.eiup import ConceptGuardEIUP

WORDS = {"name": "knife", "phrases": ["a knife", "blades"]}
DOCUMENT: dict[str, Any] = {
    "schema_version": 1,
    "kind": "concept-guard preset",
    "name": "No knives",
    "description": "For the\nkitchen.",
    "author": "me",
    "licence": "CC0-1.0",
    "base_models": ["SD1.x"],
    "edits": [
        {"method": "CRE", "concept": WORDS, "strength": 0.75, "start_percent": 0.1, "solve": "sum", "why": "It cuts."},
        {"method": "EIUP", "concept": WORDS, "weights": [-1, -0.5], "end_percent": 0.8, "blocks": "middle,output"},
    ],
}
HASH = "0" * 64
FILE = {"file": "x.safetensors", "sha256": HASH}


def changed(*path: Any, value: Any) -> dict[str, Any]:
    """DOCUMENT with one place changed."""
    document = copy.deepcopy(DOCUMENT)
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return document


def make(node: Any, *args: Any, **kwargs: Any) -> Any:
    return node.execute(*args, **kwargs).args[0]


def by_hand(model: Any, clip: Any) -> Any:
    """What DOCUMENT says, with nodes."""
    concept = make(ConceptGuardConcept, clip, "a knife\nblades", "knife")
    model = make(ConceptGuardEIUP, model, concept, end_percent=0.8, blocks="middle,output", weights="-1\n-0.5")
    return make(ConceptGuardCRE, model, concept, 0.75, 0.1, 1.0, solve="sum")


def keys(model: Any) -> list[tuple[Any, ...]]:
    return [spec.order for spec in sorted(edits_of(model), key=lambda spec: spec.order)]


WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
LEAVES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")


class Fuzz:
    """Counts the documents that were read, and notes what the reader wrote, ran or connected to meanwhile."""

    def __init__(self) -> None:
        self.read, self.done = 0, list[str]()

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.read += 1
        _watching.append(self)
        try:
            yield
        finally:
            _watching.remove(self)


_watching: list[Fuzz] = []


def _heard(event: str, args: tuple[Any, ...]) -> None:
    """What Python tells of everything that a program does to the system."""
    if _watching and (event in WRITES or event in LEAVES or (event == "open" and writes(*args[1:3]))):
        for fuzz in _watching:
            fuzz.done.append(f"{event} {args[:1]}")


def writes(mode: str | None, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


sys.addaudithook(_heard)
