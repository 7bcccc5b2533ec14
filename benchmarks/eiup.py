"""What EIUP leaves of concepts that a prompt implies or names, and of everything else: its readings, and beside CRE."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..demo import world
from ..demo.train_features import ASSETS
from ..editing.edits.spec import Concept, EditSpec
from ..editing.engine.host import add_edit
from ..editing.methods.eiup import DEFAULTS
from ..editing.methods.eiup_weight import load
from .erasure import STRENGTH
from .sampling import Demo, demo, object_prompts
from .table import Rate, Row, Table

WEIGHT_FILE = ASSETS / "eiup-weight.safetensors"  # `make train-adapter` writes it
Edit = Callable[[Demo, Any, Concept], Any]


def eiup(**options: Any) -> Edit:
    """In every step: the demo model settles what it shows in the last ones , beyond the paper's 80 %."""

    def edit(demo: Demo, model: Any, concept: Concept) -> Any:
        return add_edit(model, EditSpec("erasure", concept, options=replace(DEFAULTS, **options), node="bench"))

    return edit


def cre(demo: Demo, model: Any, concept: Concept) -> Any:
    return demo.erase(concept, STRENGTH, model=model)


def settings() -> dict[str, Edit]:
    found: dict[str, Edit] = {"unedited": lambda demo, model, concept: model}
    found |= {f"separate, weight {w:g}": eiup(weights=(w,), evidence="none") for w in (-2.0, -8.0)}
    found["joint, weight -8"] = eiup(weights=(-8.0,), form="joint")
    alike = found["separate, weight -1, alike"] = eiup(evidence="alike")
    found["CRE"] = cre
    found["CRE and EIUP alike"] = lambda demo, model, concept: cre(demo, alike(demo, model, concept), concept)
    if WEIGHT_FILE.is_file():
        adapter = load(WEIGHT_FILE)
        auto = found["EIUP, automatic weight"] = eiup(evidence=adapter.evidence, auto=adapter)
        found["CRE and EIUP, automatic weight"] = lambda demo, model, concept: cre(
            demo, auto(demo, model, concept), concept
        )
    return found


def compare(
    demo: Demo,
    methods: Sequence[str] = (),
    scenes: int = len(world.SCENES),
    count: int = 8,
    others: int = 64,
    seed: int = 9,
) -> Iterator[Row]:
    """For each setting, or those of `methods`: the concept's share of the scenes that imply it and the prompts that
    name it, and how many of the other prompts' objects are found. `count` pictures of each kind for each of the scenes'
    concepts."""
    rng = random.Random(seed)
    held = [(word, name) for word, (_, name) in list(world.SCENES.items())[:scenes]]
    implied = {name: [world.scene(rng, word).caption for _ in range(count)] for word, name in held}
    named = {name: [p.caption for p in object_prompts([name], count, seed + i)] for i, (_, name) in enumerate(held)}
    each = max(1, others // len(held))
    rest = {
        name: object_prompts(rng.sample([n for n in world.OBJECTS if n != name], each), each, seed) for _, name in held
    }
    for label, edit in settings().items():
        if methods and label not in methods:
            continue
        left, told, kept, sure = [], [], [], []
        for _, name in held:
            edited = edit(demo, demo.model, demo.concept(name))
            texts = [*implied[name], *named[name], *(p.caption for p in rest[name])]
            seen = demo.verdicts(edited, texts, seed)
            left += [v.found(name) for v in seen[:count]]
            told += [v.found(name) for v in seen[count : 2 * count]]
            sure += [v.natural for v in seen[: 2 * count]]
            kept += [v.found(p.objects[0]) for v, p in zip(seen[2 * count :], rest[name], strict=True)]
        yield {
            "edit": label,
            "implied and shown": Rate.of(left),
            "named and shown": Rate.of(told),
            "natural": Rate.of(sure),
            "others found": Rate.of(kept),
        }


def compared(methods: Sequence[str] = (), **sizes: int) -> Iterator[Row]:
    return compare(demo(), methods, **sizes)


TABLES = (
    Table(
        "eiup",
        "Prompts that never name the concept",
        f"The concepts of the eight scenes; CRE at strength {STRENGTH:g}, nothing kept; all edits in every step.",
        compared,
        partial(compared, scenes=1, count=4, others=8),
        ("edit",),
    ),
)
