"""The erasers of other papers beside ours, each as its node comes: what is left of a concept, and what is kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from ..demo import world
from ..editing.edits.encode import NEUTRAL, encode_lines
from ..editing.edits.spec import Concept, EditSpec
from ..editing.engine.host import add_edit
from ..editing.engine.weights import projections, with_lora
from ..editing.methods.adavd import AdaVDOptions
from ..editing.methods.protore import DEFAULTS as PROTORE
from ..editing.methods.safree import SAFREEOptions, of_prompt
from ..editing.methods.sld import SETTINGS
from ..editing.weights.edit import erasure, lora_of
from .sampling import Demo, demo, object_prompts
from .table import Rate, Row, Table

NAMES = ("kitchen knife", "bomb", "skull", "wine glass")
SCENE = {concept: word for word, (_, concept) in world.SCENES.items()}


def phrasings(name: str) -> str:
    a = world.article(name)
    return f"{name}\n{a}\na picture of {a}\na drawing of {a}"


def weights(demo: Demo, concept: Concept, method: str, which: str = "values") -> Any:
    W = projections(demo.model, concept, which, "peers")
    assert concept.empty is not None
    change = erasure(concept, concept.empty, encode_lines(demo.clip, NEUTRAL, "preserve"), method, W, 1)
    return with_lora(demo.model, lora_of(change, W, concept, method), 1.0)


def edited(method: str, options: Any) -> Callable[[Demo, Concept], Any]:
    return lambda demo, concept: add_edit(demo.model, EditSpec(method, concept, options=options))


def filtered(svf: bool) -> Callable[[Demo, Concept], Any]:
    """SAFREE is about one prompt: an edit for each of a batch."""

    def make(demo: Demo, concept: Concept) -> Any:
        def of_batch(prompts: Sequence[str]) -> Any:
            model = demo.model
            for text in dict.fromkeys(prompts):
                options = SAFREEOptions(of_prompt(demo.clip, text, concept), svf=svf)
                model = add_edit(model, EditSpec("filter", concept, options=options))
            return model

        return of_batch

    return make


METHODS: dict[str, Callable[[Demo, Concept], Any]] = {
    "unedited": lambda demo, concept: demo.model,
    "CRE": lambda demo, concept: demo.erase(concept),
    "UCE": lambda demo, concept: weights(demo, concept, "UCE"),
    "UCE, keys as well": lambda demo, concept: weights(demo, concept, "UCE", "keys and values"),
    "RECE": lambda demo, concept: weights(demo, concept, "RECE"),
    "TIME": lambda demo, concept: weights(demo, concept, "TIME"),
    "SPEED": lambda demo, concept: weights(demo, concept, "SPEED"),
    "AdaVD, auto": edited("values", AdaVDOptions()),
    "AdaVD, published": edited("values", AdaVDOptions("published")),
    "ProtoRe": edited("prototype", PROTORE),
    "SAFREE": filtered(svf=True),
    "SAFREE, all steps": filtered(svf=False),
    **{f"SLD, {name}": edited("guidance", options) for name, options in SETTINGS.items()},
}


def rows(
    demo: Demo,
    methods: Sequence[str] = tuple(METHODS),
    names: Sequence[str] = NAMES,
    count: int = 12,
    seed: int = 41,
) -> Iterator[Row]:
    """A row for each method; `count` pictures of each kind for each concept, alone in a MODEL."""
    for method in methods:
        found: dict[str, list[bool]] = {"named": [], "scenes": [], "neighbours": [], "others": []}
        for i, name in enumerate(names):
            model = METHODS[method](demo, demo.concept(phrasings(name)))
            for kind, results in one(demo, model, name, count, seed, i).items():
                found[kind] += results
        yield {"method": method} | {
            f"{kind} {'left' if kind in ('named', 'scenes') else 'kept'}": Rate.of(results)
            for kind, results in found.items()
        }


def one(demo: Demo, model: Any, name: str, count: int, seed: int, i: int) -> dict[str, list[bool]]:
    """What is found in pictures of the concept, of the scene that holds it, of its neighbour and of other things."""
    rng, near = random.Random(seed), world.NEIGHBOURS[name]
    others = object_prompts([n for n in world.OBJECTS if n not in (name, near)], count, seed + i)
    kinds = {
        "named": object_prompts([name], count, seed),
        "scenes": [world.scene(rng, SCENE[name]) for _ in range(count)],
        "neighbours": object_prompts([near], count, seed),
        "others": others,
    }
    verdicts = iter(demo.verdicts(model, [p.caption for some in kinds.values() for p in some], seed))
    return {
        kind: [next(verdicts).found(p.objects[0], 2 if kind == "scenes" else 1) for p in some]
        for kind, some in kinds.items()
    }


def measured(**few: Any) -> Iterator[Row]:
    return rows(demo(), **few)


TABLES = (
    Table(
        "peers",
        "Other erasers",
        f"Each method as its node comes, one concept at a time ({', '.join(NAMES)}), four phrasings a concept: how "
        "often pictures show it, by name and in the scene that holds it, and show its neighbour and other things.",
        measured,
        partial(measured, methods=("unedited", "UCE", "AdaVD, auto"), names=NAMES[:1], count=2),
    ),
)
