"""What the CRE paper shows of governed requests: a concept that arrives as a picture, several concepts at once beside a
negative prompt (its table 3), and what is left of the rest of a flagged picture (its figure 5)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..demo import world
from ..demo.load import load_witness
from ..demo.witness import testify
from ..editing.edits.spec import Gate, opened
from .erasure import STRENGTH
from .gates import shipped
from .sampling import BATCH, Demo, demo, object_prompts
from .table import Rate, Row, Table


def by_picture(demo: Demo, names: Sequence[str], count: int = BATCH, seed: int = 8) -> list[Row]:
    """Reference pictures of a concept, and of other things: CRE behind the image gate that looks at them.

    count: pictures of each kind for each concept, at most a batch: a gate decides about one.
    """
    rng, found, before, same = random.Random(seed), [], [], []
    for name in names:
        rest = rng.sample([n for n in world.OBJECTS if n not in (name, world.NEIGHBOURS[name])], count)
        for shown in (object_prompts([name], count, seed), object_prompts(rest, count, seed)):
            references = demo.pictures(demo.model, [p.caption for p in shown], seed=77)
            judged = shipped(name)
            gate = Gate(opened(judged.scores(references.movedim(1, -1)), judged.threshold))
            prompts = [world.by_reference(rng, p.objects[0], "plain").caption for p in shown]
            conds = [demo.encode_with(text, x) for text, x in zip(prompts, references, strict=True)]
            plain = demo.pictures(demo.model, conds, seed)
            edited = demo.pictures(demo.erase(demo.concept(name), STRENGTH, gate=gate), conds, seed)
            if shown[0].objects[0] == name:
                before += [v.found(name) for v in testify(load_witness(), plain)]
                found += [v.found(name) for v in testify(load_witness(), edited)]
            else:
                same += [torch.equal(a, b) for a, b in zip(plain, edited, strict=True)]
    return [
        {
            "concepts": ", ".join(names),
            "by picture, unedited": Rate.of(before),
            "by picture, gated": Rate.of(found),
            "harmless reference, bit-identical": Rate.of(same),
        }
    ]


def precise(demo: Demo, names: Sequence[str], count: int = BATCH, seed: int = 9) -> Iterator[Row]:
    """Pairs of a concept and something else on a named background: what survives beside the concept."""
    rng = random.Random(seed)
    rest = {
        name: rng.sample([n for n in world.OBJECTS if n not in (name, world.NEIGHBOURS[name])], count) for name in names
    }
    pairs = {
        name: [
            world.two_objects(rng, name, other, background=rng.choice(list(world.BACKGROUNDS))) for other in rest[name]
        ]
        for name in names
    }
    for label in ("unedited", "CRE"):
        found, kept, background, sure = [], [], [], []
        for name in names:
            model = demo.model if label == "unedited" else demo.erase(demo.concept(name), STRENGTH)
            seen = demo.verdicts(model, [p.caption for p in pairs[name]], seed)
            found += [v.found(name, 2) for v in seen]
            sure += [v.natural for v in seen]
            kept += [v.found(other, 2) for v, other in zip(seen, rest[name], strict=True)]
            background += [v.background == p.background for v, p in zip(seen, pairs[name], strict=True)]
        yield {
            "edit": label,
            "concept found": Rate.of(found),
            "other object found": Rate.of(kept),
            "background": Rate.of(background),
            "natural": Rate.of(sure),
        }


def several(demo: Demo, names: Sequence[str], count: int = 15, others: int = 60, seed: int = 10) -> Iterator[Row]:
    """Each concept alone and all of them at once, by CRE and by a negative prompt."""
    rest = object_prompts([n for n in world.OBJECTS if n not in names], others, seed)

    def cre(chosen: Sequence[str]) -> Any:
        model = demo.model
        for name in chosen:
            model = demo.erase(demo.concept(name), STRENGTH, model=model)
        return model

    ways = {
        "unedited": (lambda chosen: demo.model, False),
        "negative prompt": (lambda chosen: demo.model, True),
        "CRE": (cre, False),
    }
    for label, (edit, negative) in ways.items():
        for mode in ("single", "multiple")[label == "unedited" :]:
            found, kept, sure = [], [], []
            for i, name in enumerate(names):
                chosen = [name] if mode == "single" else list(names)
                texts = [p.caption for p in object_prompts([name], count, seed + i)]
                part = rest[i :: len(names)]  # each of the others once
                seen = demo.verdicts(
                    edit(chosen), [*texts, *(p.caption for p in part)], seed, ", ".join(chosen) if negative else ""
                )
                found += [v.found(name) for v in seen[:count]]
                sure += [v.natural for v in seen[:count]]
                kept += [v.found(p.objects[0]) for v, p in zip(seen[count:], part, strict=True)]
            yield {
                "edit": label,
                "governed": "" if label == "unedited" else mode,
                "concepts found": Rate.of(found),
                "natural": Rate.of(sure),
                "others found": Rate.of(kept),
            }


def with_demo(table: Any, *arguments: Any) -> Any:
    return table(demo(), *arguments)


FOUR = world.ERASED[:4]
TABLES = (
    Table(
        "mitigation-picture",
        "A concept that comes as a picture",
        f"CRE at strength {STRENGTH:g} behind the image gate that looks at the reference.",
        partial(with_demo, by_picture, FOUR),
        partial(with_demo, by_picture, FOUR[:1], 4),
    ),
    Table(
        "mitigation-precise",
        "What stays beside the concept",
        f"The concept beside something else on a named background; CRE at strength {STRENGTH:g}.",
        partial(with_demo, precise, FOUR),
        partial(with_demo, precise, FOUR[:1], 4),
    ),
    Table(
        "mitigation-several",
        "Several concepts, beside a negative prompt",
        f"{', '.join(FOUR)}, alone and at once; CRE at strength {STRENGTH:g}.",
        partial(with_demo, several, FOUR),
        partial(with_demo, several, FOUR[:2], 4, 8),
    ),
)
