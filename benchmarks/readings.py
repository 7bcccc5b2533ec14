"""Which reading of CRE's equation 4 works best, and how alike A and A-tilde are: what CREOptions' defaults rest on."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ..demo import world
from ..editing.edits.concept import NEUTRAL
from ..editing.engine.run import OBSERVER
from ..editing.methods.cre import DEFAULTS, CREOptions
from .sampling import Demo, demo, object_prompts, style_prompts
from .table import Rate, Row, Table

PRINTED = CREOptions(width="full", tokens="all", baseline="none", negative="keep", solve="sum")  # eq. 4 as it stands
EMPTY = replace(PRINTED, baseline="neutral", negative="clip")
ORDINARY = replace(DEFAULTS, floor=0.0)


class Reading(NamedTuple):
    """How CRE is asked: options, strength, the prompts that the concept is compared with ("" is the empty prompt), and
    whether its neighbour is kept."""

    options: CREOptions | None
    strength: float = 1.0
    neutral: str = NEUTRAL
    keep: bool = False


READINGS = {
    "unedited": Reading(None),
    "as printed": Reading(PRINTED),
    "as printed, strength 0.7": Reading(PRINTED, 0.7),
    "as printed, per head": Reading(replace(PRINTED, width="head")),
    "as printed, own tokens": Reading(replace(PRINTED, tokens="own")),
    "empty prompt subtracted": Reading(replace(EMPTY, negative="keep"), neutral=""),
    "empty, clipped": Reading(EMPTY, neutral=""),
    "ordinary prompts, clipped": Reading(ORDINARY),
    "ordinary, clipped, floor 0.4": Reading(replace(DEFAULTS, floor=0.4)),
    "ordinary, clipped, floor 0.5": Reading(DEFAULTS),
    "ordinary, clipped, floor 0.6": Reading(replace(DEFAULTS, floor=0.6)),
    "floor 0.5, per head": Reading(replace(DEFAULTS, width="head")),
    "floor 0.5, own tokens": Reading(replace(DEFAULTS, tokens="own")),
    "floor 0.5, neighbour kept": Reading(DEFAULTS, keep=True),
    "floor 0.5, neighbour kept, strength 1.25": Reading(DEFAULTS, 1.25, keep=True),
}


def compare(
    demo: Demo, concepts: Sequence[str] = ("bomb", "kitchen knife"), style: str = "noto", count: int = 8, seed: int = 5
) -> Iterator[Row]:
    """For each reading: what is left of three objects, named and implied by a scene, and of a style, and what is left
    of the objects' neighbours and of everything else."""
    rng = random.Random(seed)
    others = object_prompts([n for n in world.OBJECTS if n not in concepts], 16, seed)
    scenes = {held: word for word, (_, held) in world.SCENES.items()}
    sets = {
        name: {
            "object left": (object_prompts([name], count, seed), name),
            "implied left": ([world.scene(rng, scenes[name]) for _ in range(count // 2)], name),
            "neighbour found": (object_prompts([world.NEIGHBOURS[name]], count, seed), world.NEIGHBOURS[name]),
            "others found": (others, None),
        }
        for name in concepts
    }
    own = style_prompts(style, count, seed)
    for label, reading in READINGS.items():

        def erase(text: str, r: Reading = reading) -> Any:
            keep = world.NEIGHBOURS.get(text, "") if r.keep else ""
            return demo.erase(demo.concept(text, r.neutral, keep), r.strength, r.options) if r.options else demo.model

        found: dict[str, list[bool]] = defaultdict(list)
        for name, parts in sets.items():
            verdicts = iter(demo.verdicts(erase(name), [p.caption for ps, _ in parts.values() for p in ps], seed))
            for column, (pictures, sought) in parts.items():
                found[column] += [next(verdicts).found(sought or p.objects[0]) for p in pictures]
        seen = demo.verdicts(erase(f"in the style of {style}"), [p.caption for p in own], seed)
        rates = {column: Rate.of(hits) for column, hits in found.items()}
        yield {"reading": label, **rates, "style left": Rate.of([v.style == style for v in seen])}


def cosines(demo: Demo, concept: str, count: int = 8, seed: int = 6) -> dict[str, dict[str, float]]:
    """Mean cosine between A and A-tilde per block, over positions and steps: on prompts that name the concept, on
    others, as they are and after the neutral prompts' attention is subtracted from both."""
    prompts = {
        "named": object_prompts([concept], count, seed),
        "others": object_prompts([n for n in world.OBJECTS if n != concept], count, seed),
    }
    out: dict[str, dict[str, float]] = defaultdict(dict)
    for label, pictures in prompts.items():
        for baseline in ("none", "neutral"):
            sums: dict[str, list[float]] = defaultdict(list)

            def observe(A: Any, At: Any, A0: Any, block: Any, sums: Any = sums, **_: Any) -> None:
                a, x = A.flatten(-2).float(), At[0].flatten(-2).float()
                if A0 is not None:
                    a, x = a - A0.flatten(-2), x - A0.flatten(-2)
                sums[".".join(map(str, block))].append(torch.cosine_similarity(a, x, -1).mean().item())

            edited = demo.erase(demo.concept(concept), 1e-6, replace(DEFAULTS, baseline=baseline))
            edited.model_options["transformer_options"][OBSERVER] = observe
            demo.pictures(edited, [p.caption for p in pictures], seed)
            for block, values in sums.items():
                out[block][f"{label}, {baseline}"] = sum(values) / len(values)
    return dict(out)


def compared(count: int) -> Iterator[Row]:
    return compare(demo(), count=count)


def by_block(count: int) -> Iterator[Row]:
    for block, values in cosines(demo(), "beer mug", count).items():
        yield {"block": block, **values}


TABLES = (
    Table(
        "readings",
        "Readings of CRE's equation 4",
        "Bomb and kitchen knife; style: noto. What the defaults rest on.",
        partial(compared, 8),
        partial(compared, 4),
    ),
    Table(
        "cosines",
        "How alike A and A-tilde are",
        "Mean cosine ('beer mug') over positions and steps, as they are and after what the neutral prompts find.",
        partial(by_block, 8),
        partial(by_block, 2),
    ),
)
