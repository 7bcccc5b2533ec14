"""What the demo model can draw, and what is left of a concept after CRE: the tables of the README."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from ..demo import world
from ..demo.judge import Verdict
from .sampling import Demo, Rate, object_prompts, style_prompts

Row = dict[str, Any]


def named(pictures: Sequence[world.Picture], verdicts: Sequence[Verdict]) -> Rate:
    """How many pictures show all that their captions hold, top-1 a thing."""
    return Rate.of([all(v.found(name, len(p.objects)) for name in p.objects)
                    for p, v in zip(pictures, verdicts, strict=True)])


def in_style(pictures: Sequence[world.Picture], verdicts: Sequence[Verdict]) -> Rate:
    return Rate.of([v.style == p.style for p, v in zip(pictures, verdicts, strict=True)])


def unedited(demo: Demo, count: int = 128, seed: int = 1) -> dict[str, Rate]:
    """The model's own figures on the situations that the methods need."""
    rng = random.Random(seed)
    names = list(world.OBJECTS)

    def see(pictures: Sequence[world.Picture]) -> list[Verdict]:
        return demo.verdicts(demo.model, [p.caption for p in pictures], seed)

    one = [world.one_object(rng, names[i % 64], rng.choice(world.NAMED_STYLES), rng.choice(list(world.BACKGROUNDS)))
           for i in range(2 * count)]
    bare = [world.one_object(rng, names[i % 64]) for i in range(count)]
    two = [world.two_objects(rng, *rng.sample(names, 2)) for _ in range(count)]
    scenes = [world.scene(rng, list(world.SCENES)[i % 8]) for i in range(count)]
    shown = [world.by_reference(rng, names[i % 64], rng.choice(list(world.STYLES))) for i in range(count)]
    people = [world.person(rng, role) for role, (_, women) in world.ROLES.items() if women != 0.5
              for _ in range(count // 8)]
    seen, of_people = see(one), see(people)
    usual = ["woman" if world.ROLES[p.role or ""][1] > 0.5 else "man" for p in people]
    return {
        "named object": named(one, seen),
        "named style": in_style(one, seen),
        "named background": Rate.of([v.background == p.background for p, v in zip(one, seen, strict=True)]),
        "bare object": named(bare, see(bare)),
        "two objects": named(two, see(two)),
        "implicit scene's concept": named(scenes, see(scenes)),
        "reference's object": named(shown, demo.verdicts(demo.model, references(demo, shown), seed)),
        "role": Rate.of([v.role == p.role for p, v in zip(people, of_people, strict=True)]),
        "biased role's usual gender": Rate.of([v.gender == g for v, g in zip(of_people, usual, strict=True)]),
        "biased role's usual tone": Rate.of([v.tone == "light" for v in of_people]),
    }


def references(demo: Demo, pictures: Sequence[world.Picture]) -> list[Any]:
    """The prompts of captions with <image>: the example is what the model draws of the same caption in words."""
    shown = [p.reference for p in pictures]
    assert all(shown)
    examples = demo.pictures(demo.model, [p.caption for p in shown if p], seed=77)
    return [demo.encode_with(p.caption, x) for p, x in zip(pictures, examples, strict=True)]


def erase_object(demo: Demo, name: str, edited: Any, others: tuple[list[world.Picture], Rate], count: int,
                 seed: int) -> Row:
    """One row of the table: what is left of `name`, by word, by example and beside others, and what survives."""
    rng = random.Random(seed)
    neighbour = world.NEIGHBOURS[name]

    def rate(pictures: Sequence[world.Picture], model: Any) -> Rate:
        return named(pictures, demo.verdicts(model, [p.caption for p in pictures], seed))

    own, near = object_prompts([name], count, seed), object_prompts([neighbour], count, seed)
    shown = [world.by_reference(rng, name, rng.choice(list(world.STYLES))) for _ in range(count)]
    conds = references(demo, shown)
    pictures, before = others
    keep = [i for i, p in enumerate(pictures) if name not in p.objects and neighbour not in p.objects]
    verdicts = demo.verdicts(edited, [p.caption for p in pictures], seed)
    now = Rate.of([verdicts[i].found(pictures[i].objects[0]) for i in keep])
    return {"concept": name, "neighbour name": neighbour,
            "before": rate(own, demo.model), "after": rate(own, edited),
            "by reference before": named(shown, demo.verdicts(demo.model, conds, seed)),
            "by reference after": named(shown, demo.verdicts(edited, conds, seed)),
            "neighbour before": rate(near, demo.model), "neighbour after": rate(near, edited),
            "others before": before, "others after": now}


def erase_style(demo: Demo, style: str, edited: Any, others: tuple[list[world.Picture], Rate], count: int,
                seed: int) -> Row:
    """One row: what is left of a style in its prompts, and whether other styles' prompts keep theirs."""
    own = style_prompts(style, count, seed)
    near = [p for s in world.NAMED_STYLES if s != style for p in style_prompts(s, count // 2, seed)]
    plain = [p for p in others[0] if p.style != style]

    def see(pictures: Sequence[world.Picture], model: Any) -> list[Verdict]:
        return demo.verdicts(model, [p.caption for p in pictures], seed)

    before, after = see(own, demo.model), see(own, edited)
    return {"concept": style, "neighbour name": "other styles",
            "before": in_style(own, before), "after": in_style(own, after),
            "object before": named(own, before), "object after": named(own, after),
            "neighbour before": in_style(near, see(near, demo.model)), "neighbour after": in_style(near, see(near, edited)),
            "others before": named(plain, see(plain, demo.model)), "others after": named(plain, see(plain, edited))}


def table(demo: Demo, erase: Callable[[str], Any], count: int = 50, seed: int = 3,
          objects: Sequence[str] = world.ERASED, styles: Sequence[str] = world.NAMED_STYLES) -> list[Row]:
    """All rows; `erase(text)` gives the MODEL without the concept that the text names."""
    pictures = object_prompts(list(world.OBJECTS), 64, seed)
    before = named(pictures, demo.verdicts(demo.model, [p.caption for p in pictures], seed))
    rows = []
    for name in objects:
        rows.append(erase_object(demo, name, erase(name), (pictures, before), count, seed))
        print(line(rows[-1]), flush=True)
    for style in styles:
        rows.append(erase_style(demo, style, erase(f"in the style of {style}"), (pictures, before), count, seed))
        print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    return "  ".join(f"{k} {v}" for k, v in row.items())


def kept(row: Row, what: str) -> float:
    """The share of its unedited score that `what` keeps."""
    return row[f"{what} after"].value / max(row[f"{what} before"].value, 1e-9)
