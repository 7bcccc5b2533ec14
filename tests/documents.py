"""A preset's document to change and to apply, and the same with nodes."""

from __future__ import annotations

import copy
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
