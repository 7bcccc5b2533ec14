"""A concept learned from pictures: a style and an object that no word was given for, erased by CRE and by EIUP.

The pictures are the demo model's own, of captions that name the style or object, those in which the judge finds it; the
learning never sees that word: for a style, its captions name the objects alone. What is erased is then asked for by
word, which nothing of the learning knew either.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ..demo import world
from ..demo.judge import Verdict
from ..demo.load import load_witness
from ..demo.witness import testify
from ..editing.edits.learned import concept_of
from ..editing.edits.spec import Concept, EditSpec
from ..editing.engine.host import add_edit
from ..editing.methods.cre import DEFAULTS
from ..editing.methods.eiup import EIUPOptions
from ..editing.training.textual_inversion import ConceptOptions
from ..jobs.learn_concept import learn_concept
from ..jobs.train import Course
from .erasure import natural
from .sampling import Demo, demo, object_prompts, style_prompts
from .table import Rate, Row, Table

OPTIONS, STEPS = ConceptOptions(tokens=12, lr=5e-2, batch=8), 300
# What is learned is found less surely than a word, and is less like it: a lower floor, and strengths beyond 1.
STRENGTHS, FLOOR = (1.5, 2.0), 0.25


def examples(
    demo: Demo, pictures: Sequence[world.Picture], right: Callable[[world.Picture, Verdict], bool], count: int
) -> tuple[Tensor, list[world.Picture]]:
    """Up to `count` pictures [n, 3, h, w] that show what they should, and their captions."""
    drawn = demo.pictures(demo.model, [p.caption for p in pictures], seed=77)
    good = [i for i, v in enumerate(testify(load_witness(), drawn)) if right(pictures[i], v)][:count]
    if not good:
        raise ValueError("the demo model drew no example of what is to be learned; train it further")
    return drawn[good], [pictures[i] for i in good]


def learned(demo: Demo, pictures: Tensor, captions: Sequence[str], name: str, steps: int = STEPS) -> Concept:
    images, course = pictures.movedim(1, -1), Course(steps, "fp32")
    text = "\n".join(captions)
    return concept_of(learn_concept(demo.model, demo.clip, demo.vae, images, name, OPTIONS, course, text)[0])


def edits(demo: Demo, concept: Concept) -> dict[str, Any]:
    options, most = replace(DEFAULTS, floor=FLOOR), max(STRENGTHS)
    erasure = EditSpec("erasure", concept, options=EIUPOptions(weights=(-most,), evidence="alike"))
    return {
        **{f"CRE, strength {s:g}, floor {FLOOR:g}": demo.erase(concept, s, options) for s in STRENGTHS},
        f"EIUP alike, weight -{most:g}": add_edit(demo.model, erasure),
    }


def compare(
    demo: Demo,
    what: str,
    concept: Concept,
    own: Sequence[world.Picture],
    others: Sequence[world.Picture],
    shown: Callable[[world.Picture, Verdict], bool],
    seed: int,
) -> Iterator[Row]:
    """The concept's own prompts and others', unedited and edited."""
    for name, model in {"unedited": demo.model, **edits(demo, concept)}.items():
        verdicts = demo.verdicts(model, [p.caption for p in (*own, *others)], seed)
        found = Rate.of([shown(p, v) for p, v in zip(own, verdicts, strict=False)])
        objects = Rate.of([v.found(p.objects[0]) for p, v in zip(own, verdicts, strict=False)])
        kept = Rate.of([v.found(p.objects[0]) for p, v in zip(others, verdicts[len(own) :], strict=True)])
        yield {
            "concept": what,
            "edit": name,
            "its own prompts": found,
            "their objects": objects,
            "natural": natural(verdicts[: len(own)]),
            "other prompts' objects": kept,
        }


def rows(
    demo: Demo,
    style: str = "noto",
    thing: str = "beer mug",
    count: int = 30,
    pictures: int = 8,
    seed: int = 13,
    steps: int = STEPS,
) -> Iterator[Row]:
    rng = random.Random(seed)
    names = rng.sample([n for n in world.OBJECTS if n != thing], 24)

    def in_style(p: world.Picture, v: Verdict) -> bool:
        return v.style == style

    def is_thing(p: world.Picture, v: Verdict) -> bool:
        return v.found(thing)

    styled = [world.one_object(rng, name, style) for name in names]
    shown, of = examples(demo, styled, lambda p, v: in_style(p, v) and v.found(p.objects[0]), pictures)
    concept = learned(demo, shown, [world.article(p.objects[0]) for p in of], "a style", steps)
    plain = object_prompts(names, count * 6 // 5, seed)
    yield from compare(
        demo,
        f"a style ({style}: {len(shown)} pictures)",
        concept,
        style_prompts(style, count, seed),
        [p for p in plain if p.style != style],
        in_style,
        seed,
    )
    shown, of = examples(demo, object_prompts([thing], 2 * pictures, seed), is_thing, pictures)
    around = [p.caption.partition(world.article(thing))[2] or "a picture" for p in of]  # style and background alone
    concept = learned(demo, shown, around, "an object", steps)
    yield from compare(
        demo,
        f"an object ({thing}: {len(shown)} pictures)",
        concept,
        object_prompts([thing], count, seed),
        plain,
        is_thing,
        seed,
    )


def measured(**few: Any) -> Iterator[Row]:
    return rows(demo(), **few)


TABLES = (
    Table(
        "learned-concept",
        "A concept learned from eight pictures",
        f"{STEPS} steps; the captions never name it. Then it is asked for by word.",
        measured,
        partial(measured, count=4, pictures=2, steps=4),
    ),
)
