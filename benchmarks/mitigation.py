"""What the CRE paper shows of governed requests: a concept that arrives as a picture, also a spoiled one, what is left
of the rest of a flagged one (its figure 5), and several concepts at once beside a negative prompt (its table 3)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..demo import world
from ..demo.load import load_witness
from ..demo.witness import testify
from ..editing.edits.spec import Gate, opened
from ..editing.gates import augment
from .erasure import STRENGTH
from .gates import shipped
from .sampling import BATCH, Demo, demo, object_prompts
from .table import Rate, Row, Table

SPOILED: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "as drawn": lambda x, rng: x,
    "blurred": augment.blur,
    "turned, cropped, from the side": augment.crop,
    "light and saturation": augment.light,
    "grain": augment.grain,
    "all of these": augment.perturbed,
}


def by_picture(demo: Demo, names: Sequence[str], count: int = 8, seed: int = 8) -> Iterator[Row]:
    """Reference pictures of a concept, and of other things, as drawn and spoiled: CRE behind the image gate that looks
    at them.

    count: pictures of each kind for each concept, at most a batch: a gate decides about one.
    """
    rng = random.Random(seed)
    things = [n for n in world.OBJECTS if n not in names and n not in map(world.NEIGHBOURS.get, names)]
    shown = {
        name: (object_prompts([name], count, seed), object_prompts(rng.sample(things, count), count, seed))
        for name in names
    }
    drawn = {
        name: [demo.pictures(demo.model, [p.caption for p in some], seed=77) for some in both]
        for name, both in shown.items()
    }
    for way, spoil in SPOILED.items():
        found, before, same = [], [], []
        for name in names:
            for pictures, clean in zip(shown[name], drawn[name], strict=True):
                references = spoil(clean, torch.Generator().manual_seed(seed))
                plain, edited = both_ways(demo, name, pictures, references, seed)
                if pictures[0].objects[0] == name:
                    before += [v.found(name) for v in testify(load_witness(), plain)]
                    found += [v.found(name) for v in testify(load_witness(), edited)]
                else:
                    same += [torch.equal(a, b) for a, b in zip(plain, edited, strict=True)]
        yield {
            "reference": way,
            "by picture, unedited": Rate.of(before),
            "by picture, gated": Rate.of(found),
            "harmless reference, bit-identical": Rate.of(same),
        }


def both_ways(
    demo: Demo, name: str, shown: Sequence[world.Picture], references: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Pictures [n, 3, h, w] of what references show, unedited, and by CRE behind the gate that looks at them."""
    judged = shipped(name)
    gate = Gate(opened(judged.scores(references.movedim(1, -1)), judged.threshold))
    prompts = [world.by_reference(random.Random(i), p.objects[0], "plain").caption for i, p in enumerate(shown)]
    conds = [demo.encode_with(text, x) for text, x in zip(prompts, references, strict=True)]
    edited = demo.erase(demo.concept(name), STRENGTH, gate=gate)
    return demo.pictures(demo.model, conds, seed), demo.pictures(edited, conds, seed)


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
        f"{', '.join(FOUR)}; CRE at strength {STRENGTH:g} behind the image gate that looks at the reference, as the "
        "model drew it and spoiled in the ways of the paper's figure 5.",
        partial(with_demo, by_picture, FOUR),
        partial(with_demo, by_picture, FOUR[:1], 2),
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
