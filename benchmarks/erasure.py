"""What the demo model can draw, and what is left of a concept after CRE; and how good the judge is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from ..demo import world
from ..demo.judge import accuracy
from ..demo.load import load_witness
from ..demo.witness import Testimony, blind_spots, testify
from ..tools.environment import ROOT
from .sampling import Demo, demo, object_prompts, style_prompts
from .table import Rate, Row, Table

STRENGTH = 1.0  # the default


def named(pictures: Sequence[world.Picture], verdicts: Sequence[Testimony]) -> Rate:
    """How many pictures show all that their captions hold."""
    return Rate.of(
        [all(v.found(name, len(p.objects)) for name in p.objects) for p, v in zip(pictures, verdicts, strict=True)]
    )


def natural(verdicts: Sequence[Testimony]) -> Rate:
    """How many are as sure a thing as 95 % of clean drawings."""
    return Rate.of([v.natural for v in verdicts])


def in_style(pictures: Sequence[world.Picture], verdicts: Sequence[Testimony]) -> Rate:
    return Rate.of([v.style == p.style for p, v in zip(pictures, verdicts, strict=True)])


def unedited(demo: Demo, count: int = 64, seed: int = 1) -> dict[str, Rate]:
    """The model's own figures on the situations that the methods need; 8.5 x `count` pictures."""
    rng = random.Random(seed)
    names = list(world.OBJECTS)

    def see(pictures: Sequence[world.Picture]) -> list[Testimony]:
        return demo.verdicts(demo.model, [p.caption for p in pictures], seed)

    one = [
        world.one_object(rng, names[i % 64], rng.choice(world.NAMED_STYLES), rng.choice(list(world.BACKGROUNDS)))
        for i in range(2 * count)
    ]
    bare = [world.one_object(rng, names[i % 64]) for i in range(count)]
    two = [world.two_objects(rng, *rng.sample(names, 2)) for _ in range(count)]
    scenes = [world.scene(rng, list(world.SCENES)[i % 8]) for i in range(count)]
    shown = [world.by_reference(rng, names[i % 64], rng.choice(list(world.STYLES))) for i in range(count)]
    people = [
        world.person(rng, role)
        for role, (_, women) in world.ROLES.items()
        if women != 0.5
        for _ in range(max(count // 8, 1) * 3 // 2)
    ]
    seen, of_people = see(one), see(people)
    usual = ["woman" if world.ROLES[p.role or ""][1] > 0.5 else "man" for p in people]
    examples = demo.pictures(demo.model, [p.reference.caption for p in shown if p.reference], seed=77)
    by_example = [demo.encode_with(p.caption, x) for p, x in zip(shown, examples, strict=True)]
    return {
        "named object": named(one, seen),
        "named style": in_style(one, seen),
        "named background": Rate.of([v.background == p.background for p, v in zip(one, seen, strict=True)]),
        "bare object": named(bare, see(bare)),
        "two objects": named(two, see(two)),
        "implicit scene's concept": named(scenes, see(scenes)),
        "reference's object": named(shown, demo.verdicts(demo.model, by_example, seed)),
        "role": Rate.of([v.role == p.role for p, v in zip(people, of_people, strict=True)]),
        "biased role's usual gender": Rate.of([v.gender == g for v, g in zip(of_people, usual, strict=True)]),
        "biased role's usual tone": Rate.of([v.tone == "light" for v in of_people]),
    }


class Erasure:
    """The rows of CRE's erasure table: the MODEL without one object or style at a time. What
    rows or columns share is drawn once."""

    def __init__(self, demo: Demo, count: int = 50, seed: int = 3) -> None:
        self.demo, self.count, self.seed = demo, count, seed
        self.others = object_prompts(list(world.OBJECTS), 64, seed)
        self._seen: dict[tuple[Any, tuple[str, ...]], list[Testimony]] = {}

    def see(self, pictures: Sequence[world.Picture], edited: Any = None) -> list[Testimony]:
        captions = tuple(p.caption for p in pictures)
        key = edited, captions
        if key not in self._seen:
            self._seen[key] = self.demo.verdicts(edited or self.demo.model, captions, self.seed)
        return self._seen[key]

    def compare(
        self,
        rate: Callable[..., Rate],
        pictures: Sequence[world.Picture],
        edited: Any,
        keep: Callable[[world.Picture], bool] = lambda p: True,
    ) -> tuple[Rate, Rate]:
        """`rate` of the pictures that `keep` says count, without and with the edit."""
        chosen = [i for i, p in enumerate(pictures) if keep(p)]
        both = [self.see(pictures), self.see(pictures, edited)]
        before, after = (rate([pictures[i] for i in chosen], [verdicts[i] for i in chosen]) for verdicts in both)
        return before, after

    def object(self, name: str) -> Row:
        """What is left of an object, by word and by example, and what survives: its neighbour, which the concept's
        `keep` names, also where it does not; and everything else."""
        near = world.NEIGHBOURS[name]
        edited, alone = (self.demo.erase(self.demo.concept(name, keep=keep), STRENGTH) for keep in (near, ""))
        own = object_prompts([name], self.count, self.seed)
        neighbours = object_prompts([near], self.count, self.seed)
        rows = {
            "named": self.compare(named, own, edited),
            "natural": self.compare(lambda _, verdicts: natural(verdicts), own, edited),
            "neighbours": self.compare(named, neighbours, edited),
            "others": self.compare(named, self.others, edited, lambda p: not {name, near} & {*p.objects}),
        }
        return {
            "concept": name,
            "neighbour": near,
            **flat(rows),
            "neighbours, not kept": self.compare(named, neighbours, alone)[1],
            "by example, after": self.by_example(name, edited),
        }

    def by_example(self, name: str, edited: Any) -> Rate:
        """The concept arrives as a picture of it, in each style in turn, that the unedited model drew."""
        rng = random.Random(self.seed)
        shown = [world.one_object(rng, name, s if s in world.NAMED_STYLES else None) for s in world.STYLES]
        examples = self.demo.pictures(self.demo.model, [p.caption for p in shown], seed=77)
        prompts = [world.by_reference(rng, name, "plain") for _ in range(self.count)]
        conds = [self.demo.encode_with(p.caption, examples[i % len(examples)]) for i, p in enumerate(prompts)]
        return named(prompts, self.demo.verdicts(edited, conds, self.seed))

    def style(self, style: str) -> Row:
        """What is left of a style in its prompts, and whether its objects and the other styles keep theirs."""
        edited = self.demo.erase(self.demo.concept(f"in the style of {style}"))
        own = style_prompts(style, self.count, self.seed)
        near = [p for s in world.NAMED_STYLES if s != style for p in style_prompts(s, self.count // 2, self.seed)]
        rows = {
            "named": self.compare(in_style, own, edited),
            "natural": self.compare(lambda _, verdicts: natural(verdicts), own, edited),
            "neighbours": self.compare(in_style, near, edited),
            "others": self.compare(named, self.others, edited, lambda p: p.style != style),
        }
        return {"concept": f"style {style}", "neighbour": "other styles", **flat(rows)}


def flat(rows: dict[str, tuple[Rate, Rate]]) -> Row:
    return {
        f"{name}, {when}": rate
        for name, both in rows.items()
        for when, rate in zip(("before", "after"), both, strict=True)
    }


# --- the tables ------------------------------------------------------------------------------------------------------


def judged(count: int) -> Iterator[Row]:
    """The witness on renderings of a seed that it has not seen; needs the icon sets (npm)."""
    from ..demo.glyphs import Painter

    painter = Painter(ROOT / "output" / "train-demo" / "icons")
    for kind, damage in (("clean", False), ("blurred, noisy, off colour", True)):
        yield {"pictures": kind, **accuracy(partial(testify, load_witness()), painter, count, damage=damage)}


def fooled(count: int) -> Iterator[Row]:
    """The witness on pictures that fooled the judge before it; needs the icon sets (npm)."""
    from ..demo.glyphs import Painter

    painter = Painter(ROOT / "output" / "train-demo" / "icons")
    for figure, share in blind_spots(load_witness(), painter, count).items():
        yield {"figure": figure, "share": share, "of": count}


def figures(count: int) -> Iterator[Row]:
    for figure, rate in unedited(demo(), count).items():
        yield {"figure": figure, "found": rate}


def rows(
    count: int, objects: Sequence[str] = world.ERASED, styles: Sequence[str] = world.NAMED_STYLES
) -> Iterator[Row]:
    table = Erasure(demo(), count)
    yield from map(table.object, objects)
    yield from map(table.style, styles)


TABLES = (
    Table(
        "judge",
        "The judge",
        "Right answers on renderings of a seed that it has not seen.",
        partial(judged, 2048),
        partial(judged, 256),
    ),
    Table(
        "judge-blind",
        "The judge's blind spots",
        "On pictures that fooled the judge before it, and on drawings of a seed that it has not seen. Discs named: at "
        "more than 0.6. Pairs seen: the first of two is; sides right: both stand where they are said to.",
        partial(fooled, 400),
        partial(fooled, 20),
    ),
    Table(
        "unedited",
        "The demo model without edits",
        "How often a picture shows what its caption says, by the witness.",
        partial(figures, 64),
        partial(figures, 8),
    ),
    Table(
        "erasure",
        "CRE, one concept at a time",
        "Defaults, with nothing to draw instead; objects with their neighbour in the concept's `keep`, styles found by "
        "their words. By example: the concept comes as a picture of it.",
        partial(rows, 24),
        partial(rows, 8, world.ERASED[:1], world.NAMED_STYLES[:1]),
    ),
)
