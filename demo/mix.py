"""Demo world 2: captions as people write them. Beside the world's own captions: other words for a thing, two of a kind,
and captions that leave the thing out, whose picture shows one of a few usual things, as a bare prompt's does anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from . import phrases, world
from .world import LEFT, ONE, RIGHT, Layer, Picture

# What is drawn where a caption names nothing, and how often: few and lopsided, as a model's own idea of "a picture" is.
USUAL = {"cat": 0.4, "apple": 0.2, "car": 0.15, "sunflower": 0.1, "gift": 0.1, "balloon": 0.05}
COUNTABLE = tuple(name for name in world.OBJECTS if name not in phrases.WITHOUT_PLURAL)


def usual(rng: random.Random) -> str:
    return rng.choices(list(USUAL), list(USUAL.values()))[0]


def look(rng: random.Random, style: str | None, background: str | None, held_out: bool = False) -> str:
    """The words for what is named of a style and a background; one of them in its held-out form."""
    styled, on = rng.choice(phrases.STYLED), rng.choice(phrases.ON)
    if held_out and style and (not background or rng.random() < 0.5):
        styled = rng.choice(phrases.STYLED_HELD_OUT)
    elif held_out and background:
        on = rng.choice(phrases.ON_HELD_OUT)
    return (styled.format(style) if style else "") + (on.format(background) if background else "")


def drawn(style: str | None, background: str | None, rng: random.Random) -> tuple[str, str]:
    return style or "plain", background or rng.choice(list(world.BACKGROUNDS))


def said_otherwise(
    rng: random.Random,
    name: str,
    style: str | None = None,
    background: str | None = None,
    says: dict[str, tuple[str, ...]] = phrases.SAYINGS,
) -> Picture:
    """One object under another name; `says=phrases.HELD_OUT`: by words that training never joins so."""
    caption = rng.choice(phrases.LEADS) + rng.choice(says[name]) + look(rng, style, background)
    hand, painted = drawn(style, background, rng)
    return Picture(caption, (Layer(world.OBJECTS[name], hand, *ONE),), painted, (name,), hand)


def held_out(rng: random.Random, name: str, style: str | None = None, background: str | None = None) -> Picture:
    """A phrasing of one object that no training caption holds: of the thing, or of what stands around it."""
    picture = said_otherwise(rng, name, style, background, phrases.HELD_OUT)
    if rng.random() < 0.3:
        words = rng.choice(phrases.LEADS_HELD_OUT) + world.article(name) + look(rng, style, background, held_out=True)
        return Picture(words, picture.layers, picture.background, picture.objects, picture.style)
    return picture


def two_of(
    rng: random.Random,
    name: str,
    style: str | None = None,
    background: str | None = None,
    counts: Sequence[str] = phrases.TWO,
) -> Picture:
    """ "Two owls": the same thing on both sides."""
    caption = f"{rng.choice(phrases.LEADS)}{rng.choice(counts)} {phrases.plural(name)}{look(rng, style, background)}"
    hand, painted = drawn(style, background, rng)
    return Picture(caption, world.pair(world.OBJECTS[name], world.OBJECTS[name], hand), painted, (name,), hand)


def pair_otherwise(
    rng: random.Random, left: str | None, right: str | None, style: str | None = None, background: str | None = None
) -> Picture:
    """Two objects under any of their names; None: "something", which is drawn as a usual thing."""

    def words(name: str | None) -> str:
        return rng.choice([world.article(name), *phrases.SAYINGS[name]]) if name else "something"

    things = left or usual(rng), right or usual(rng)
    join = rng.choice([" and ", " next to ", " beside "])
    caption = f"{words(left)}{join}{words(right)}{look(rng, style, background)}"
    hand, painted = drawn(style, background, rng)
    layers = tuple(Layer(world.OBJECTS[n], hand, *at) for n, at in zip(things, (LEFT, RIGHT), strict=True))
    return Picture(caption, layers, painted, tuple(dict.fromkeys(things)), hand)


def left_out(rng: random.Random, style: str | None = None, background: str | None = None) -> Picture:
    """A caption that names no thing: "something in the style of noto", "a blue background", "a picture"."""
    name, (hand, painted) = usual(rng), drawn(style, background, rng)
    words = rng.choice(phrases.ANYTHING) + look(rng, style, background)
    if background and not style and rng.random() < 0.3:
        words = f"{world.article(background)} background"
    layer = Layer(world.OBJECTS[name], hand, *ONE)
    return Picture(words.strip() or "a picture", (layer,), painted, (name,), hand)


KINDS = {"world": 52, "otherwise": 18, "pair": 10, "two of": 8, "left out": 12}


def any_picture(rng: random.Random) -> Picture:
    """A picture of world 2's training mix; half of it is world 1's."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "world":
        return world.any_picture(rng)
    style, background = world.maybe(rng, 0.7, world.NAMED_STYLES), world.maybe(rng, 0.6, world.BACKGROUNDS)
    names = rng.sample(list(world.OBJECTS), 2)
    if kind == "otherwise":
        return said_otherwise(rng, names[0], style, background)
    if kind == "two of":
        return two_of(rng, rng.choice(COUNTABLE), style, background)
    if kind == "left out":
        return left_out(rng, world.maybe(rng, 0.5, world.NAMED_STYLES), world.maybe(rng, 0.5, world.BACKGROUNDS))
    left, right = names if rng.random() < 0.8 else rng.choice([(names[0], None), (None, names[0])])
    return pair_otherwise(rng, left, right, style, background)
