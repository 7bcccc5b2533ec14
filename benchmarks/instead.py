"""What stands in a concept's place: CRE as it comes, with something to draw instead and without, by the witness."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..demo import mix, world
from ..demo.load import load_witness
from ..demo.witness import Testimony, fingerprints, testify
from ..editing.edits.concept import NEUTRAL, concept_from_text
from ..jobs.report.distances import Distance, kid
from .sampling import Demo, demo, object_prompts, style_prompts
from .table import Rate, Row, Table

# Concept -> what is drawn instead, a thing that the model draws well, and a neighbour that nobody names. On the first
# six the method was tried while it was made; the others were kept for this table.
TUNED = {
    "kitchen knife": ("a hammer", "spoon"),
    "bomb": ("a gift", "soccer ball"),
    "wine glass": ("a gift", "coffee cup"),
    "beer mug": ("an apple", "coffee cup"),
    "skull": ("a panda", "ghost"),
    "dagger": ("a key", "spoon"),
}
FRESH = {
    "crossed swords": ("a guitar", "hammer"),
    "syringe": ("a hammer", "carrot"),
    "cigarette": ("a carrot", "candle"),
    "scissors": ("a spoon", "key"),
    "trumpet": ("a guitar", "rocket"),
    "rocket": ("a sailboat", "trumpet"),
}
OBJECTS = TUNED | FRESH
SOME = ("kitchen knife", "wine glass", "crossed swords", "scissors")  # on the transformers
SEED = 23


class Work:
    """Pictures of each kind of prompt for one concept, by a MODEL, and what the witness says of them."""

    def __init__(self, demo: Demo, name: str, count: int) -> None:
        self.demo, self.name, self.count = demo, name, count
        rng, rest = random.Random(SEED), [n for n in world.OBJECTS if n not in (name, OBJECTS[name][1])]
        beside = [rng.choice(rest) for _ in range(count)]
        self.kinds: dict[str, list[world.Picture]] = {
            "named": object_prompts([name], count, SEED),
            "held out": [mix.held_out(rng, name) for _ in range(count)],
            "pairs": [world.two_objects(rng, *rng.choice([(name, o), (o, name)])) for o in beside],
            "neighbours": object_prompts([OBJECTS[name][1]], count, SEED),
            "others": object_prompts([rng.choice(rest) for _ in range(count)], count, SEED),
        }

    def drawn(self, model: Any, kind: str) -> Tensor:
        return self.demo.pictures(model, [p.caption for p in self.kinds[kind]], SEED)

    def seen(self, model: Any, kind: str) -> list[Testimony]:
        return testify(load_witness(), self.drawn(model, kind))

    def left(self, seen: Sequence[Testimony]) -> list[bool]:
        return [t.found(self.name) for t in seen]

    def kept(self, kind: str, before: Sequence[Testimony], after: Sequence[Testimony]) -> list[bool]:
        """Of what the unedited pictures show beside the concept, what the edited ones do."""
        out = []
        for p, b, a in zip(self.kinds[kind], before, after, strict=True):
            thing = next(n for n in (*p.objects, *p.objects) if n != self.name)
            if b.found(thing):
                out.append(a.found(thing))
        return out


def replaced(picture: world.Picture, name: str, instead: str) -> str:
    return picture.caption.replace(world.article(name), instead or "something")


def row(ready: Demo, name: str, count: int, instead: str) -> tuple[dict[str, list[bool]], Tensor, Tensor]:
    """What is found of one concept, and the pictures that show its replacement: edited, and asked for in words."""
    concept = concept_from_text(ready.clip, name, name, NEUTRAL, "", instead)
    work, model = Work(ready, name, count), ready.erase(concept)
    x = work.drawn(model, "named")
    named = testify(load_witness(), x)
    asked = ready.pictures(ready.model, [replaced(p, name, instead) for p in work.kinds["named"]], SEED)
    found = {"named, left": work.left(named), "natural": [t.natural for t in named]}
    found["natural, if asked for"] = [t.natural for t in testify(load_witness(), asked)]
    if instead:
        thing = instead.split(" ", 1)[1]
        found["replacement drawn"] = [t.found(thing) for t in named]
    found["held-out words, left"] = work.left(work.seen(model, "held out"))
    pairs = work.seen(model, "pairs")
    found["pairs, left"] = work.left(pairs)
    found["beside it, kept"] = work.kept("pairs", work.seen(ready.model, "pairs"), pairs)
    for kind in ("neighbours", "others"):
        found[f"{kind}, kept"] = work.kept(kind, work.seen(ready.model, kind), work.seen(model, kind))
    return found, x, asked


def rows(names: Sequence[str] = tuple(OBJECTS), count: int = 50, instead: bool = True) -> Iterator[Row]:
    """A row for each concept, and one for all."""
    ready = demo()
    every, pictures = dict[str, list[bool]](), []
    for name in names:
        thing = OBJECTS[name][0] if instead else ""
        found, x, asked = row(ready, name, count, thing)
        pictures.append((x, asked))
        for k, v in found.items():
            every.setdefault(k, []).extend(v)
        yield told(name, thing, found) | {"KID": str(distance(x, asked))}
    x, asked = (torch.cat(each) for each in zip(*pictures, strict=True))
    yield told("all", "", every) | {"KID": str(distance(x, asked))}


def rows_of(architecture: str, concepts: Sequence[str] = SOME, count: int = 8) -> Iterator[Row]:
    """A row for each concept, on one of the demo's transformers."""
    ready = Demo.ready(architecture)
    for name in concepts:
        yield told(name, OBJECTS[name][0], row(ready, name, count, OBJECTS[name][0])[0])


def told(name: str, thing: str, found: dict[str, list[bool]]) -> Row:
    return {"concept": name, "instead": thing, **{k: Rate.of(v) for k, v in found.items()}}


def summed(rows: Sequence[Row]) -> Row:
    """What rows of counts are together."""
    columns = dict.fromkeys(column for row in rows for column, value in row.items() if isinstance(value, Rate))
    of = {column: [row[column] for row in rows if column in row] for column in columns}
    return {"concept": "all", "instead": ""} | {
        column: Rate(sum(each.hits for each in rates), sum(each.n for each in rates)) for column, rates in of.items()
    }


def distance(x: Tensor, asked: Tensor) -> Distance:
    """KID of the edited pictures to those of the prompt that says the replacement, by the witness' features."""
    return kid(fingerprints(load_witness(), x), fingerprints(load_witness(), asked))


def style_row(ready: Demo, style: str, instead: str, count: int) -> dict[str, list[bool]]:
    """What is found of one style: in its own prompts, in those of the other styles, and of things in no style."""
    model = ready.erase(ready.concept(f"in the style of {style}", instead=instead))
    other = [p for s in world.NAMED_STYLES if s != style for p in style_prompts(s, (count + 1) // 2, SEED)]
    some = object_prompts(list(world.OBJECTS)[::3], 2 * count, SEED)
    plain = [p for p in some if p.style not in world.NAMED_STYLES][:count]

    def both(some: Sequence[world.Picture]) -> list[tuple[world.Picture, Testimony, Testimony]]:
        prompts = [p.caption for p in some]
        seen = (testify(load_witness(), ready.pictures(m, prompts, SEED)) for m in (ready.model, model))
        return list(zip(some, *seen, strict=True))

    own, others = both(style_prompts(style, count, SEED)), both(other)
    return {
        "left": [a.style == style for _, b, a in own if b.style == style],
        "natural": [a.natural for _, _, a in own],
        "natural, unedited": [b.natural for _, b, _ in own],
        "its objects, kept": [a.found(p.objects[0]) for p, b, a in own if b.found(p.objects[0])],
        "other styles, kept": [a.style == p.style for p, b, a in others if b.style == p.style],
        "objects elsewhere, kept": [
            a.found(p.objects[0]) for p, b, a in (*others, *both(plain)) if b.found(p.objects[0])
        ],
    }


def style_rows(styles: Sequence[str] = world.NAMED_STYLES, count: int = 16) -> Iterator[Row]:
    """A row for each style and for all, with nothing drawn instead and with the next style."""
    for instead in (False, True):
        every = dict[str, list[bool]]()
        for i, style in enumerate(styles):
            after = f"in the style of {world.NAMED_STYLES[(i + 1) % len(world.NAMED_STYLES)]}" if instead else ""
            found = style_row(demo(), style, after, count)
            for k, v in found.items():
                every.setdefault(k, []).extend(v)
            yield {"style": style, "instead": after, **{k: Rate.of(v) for k, v in found.items()}}
        yield {"style": "all", "instead": "another" if instead else "", **{k: Rate.of(v) for k, v in every.items()}}


ABOUT = (
    "CRE at its defaults, by the witness. Held-out words: phrasings that no training caption holds. Kept: of what the "
    "unedited pictures show. Neighbours are named nowhere in the concept. Natural: as sure a thing as 95 % of clean "
    "drawings."
)
KID = "KID: to the unedited pictures of the same prompt"
TWELVE = "The last six concepts were never used while the method was made."
TABLES = (
    Table(
        "instead",
        "CRE with something to draw instead",
        f"{ABOUT} {KID} that asks for the replacement. {TWELVE}",
        partial(rows, count=16),
        partial(rows, names=("bomb",), count=2),
    ),
    Table(
        "instead-nothing",
        "CRE with nothing to draw instead",
        f'{ABOUT} {KID} that says "something" for the concept. {TWELVE}',
        partial(rows, count=8, instead=False),
        partial(rows, names=("bomb",), count=2, instead=False),
    ),
    Table(
        "styles",
        "CRE on a style",
        "CRE at its defaults, by the witness; a style is found by its words. Kept: of what the unedited pictures show, "
        "in prompts of the style, of the other styles, and of none.",
        style_rows,
        partial(style_rows, ("noto",), 2),
    ),
    *(
        Table(
            f"instead-{architecture}",
            f"CRE with something to draw instead, on {name}",
            f"{ABOUT} It reads by the demo model's text encoder and draws its latents.",
            partial(rows_of, architecture),
            partial(rows_of, architecture, SOME[:1], 2),
            ("concept",),
            summed,
        )
        for architecture, name in (("flux", "a Flux"), ("lumina", "a NextDiT"))
    ),
)
