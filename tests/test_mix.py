"""Demo world 2: other words, two of a kind, things left out, and phrasings that training never sees."""

from __future__ import annotations

import hashlib
import random

import pytest

from conceptguard.demo import mix, phrases, train, world


@pytest.fixture(scope="module")
def pictures() -> list[world.Picture]:
    rng = random.Random(12)
    return [mix.any_picture(rng) for _ in range(8_000)]


def test_world_one_draws_what_it_always_drew() -> None:
    rng = random.Random(7)
    drawn = repr([world.any_picture(rng) for _ in range(300)])
    assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == "6289a1bec57b84cd"


def test_every_thing_has_other_words_and_held_out_ones() -> None:
    assert set(phrases.SAYINGS) == set(phrases.HELD_OUT) == set(world.OBJECTS)
    assert all(len(words) >= 2 for words in phrases.SAYINGS.values()) and all(phrases.HELD_OUT.values())


def test_held_out_phrasings_are_never_drawn_in_training(pictures: list[world.Picture]) -> None:
    captions = {f" {p.caption} " for p in pictures}
    assert len(captions) > 4_000
    unseen = [words for all_words in phrases.HELD_OUT.values() for words in all_words]
    unseen += [lead + world.article(name) for lead in phrases.LEADS_HELD_OUT for name in world.OBJECTS]
    unseen += [f"{two} {phrases.plural(name)}" for two in phrases.TWO_HELD_OUT for name in mix.COUNTABLE]
    said = "\n".join(captions)
    for words in unseen:
        assert f" {words} " not in said, words
    for form in (*phrases.STYLED_HELD_OUT, *phrases.ON_HELD_OUT):
        values = world.NAMED_STYLES if form in phrases.STYLED_HELD_OUT else world.BACKGROUNDS
        assert not any(caption.endswith(f"{form.format(v)} ") for v in values for caption in captions), form


def test_held_out_phrasings_use_words_that_training_knows(pictures: list[world.Picture]) -> None:
    """Token by token: a model has seen each of them, though never so joined."""
    tokenize = train.tokenizer()
    known = {token for caption in {p.caption for p in pictures} for token in tokenize(caption)}
    rng = random.Random(0)
    unseen = [mix.held_out(rng, name, "noto", "blue") for name in world.OBJECTS for _ in range(20)]
    unseen += [mix.two_of(rng, name, counts=phrases.TWO_HELD_OUT) for name in mix.COUNTABLE for _ in range(4)]
    for picture in unseen:
        assert set(tokenize(picture.caption)) <= known, picture.caption


def test_two_of_a_kind_are_drawn_on_both_sides() -> None:
    rng = random.Random(0)
    picture = mix.two_of(rng, "owl", "noto", "blue")
    assert "owls" in picture.caption and picture.objects == ("owl",)
    assert picture.layers == world.pair(world.OBJECTS["owl"], world.OBJECTS["owl"], "noto")
    assert phrases.plural("butterfly") == "butterflies" and phrases.plural("cat") == "cats"


def test_what_a_caption_leaves_out_is_drawn_all_the_same() -> None:
    """A style or background that is named is kept, nothing else is named, and a usual thing is there."""
    rng = random.Random(1)
    names = {word for name in world.OBJECTS for word in name.split()}
    found = []
    for style, background in ((None, None), ("noto", None), (None, "blue"), ("fluent", "red")) * 100:
        picture = mix.left_out(rng, style, background)
        assert not names & set(picture.caption.split()) and picture.caption
        assert len(picture.layers) == 1 and picture.objects[0] in mix.USUAL
        assert picture.style == (style or "plain") and (picture.style in picture.caption) == (style is not None)
        assert background is None or (picture.background == background and background in picture.caption)
        found.append(picture)
    captions = {p.caption for p in found}
    assert {"a blue background", "something in the style of noto", "a picture"} <= captions
    assert sum(p.objects == ("cat",) for p in found) > 0.3 * len(found)


def test_an_unnamed_half_of_a_pair_is_a_usual_thing_on_its_side() -> None:
    rng = random.Random(2)
    for _ in range(20):
        picture = mix.pair_otherwise(rng, None, "hammer")
        assert picture.caption.startswith("something ") and picture.objects[-1] == "hammer"
        assert (picture.layers[0].x, picture.layers[1].glyph) == (world.LEFT[1], world.OBJECTS["hammer"])
        assert picture.objects[0] in mix.USUAL


def test_the_mix_is_a_seed_and_lies_on_the_latent_grid(pictures: list[world.Picture]) -> None:
    rng = random.Random(12)
    assert [mix.any_picture(rng) for _ in range(200)] == pictures[:200]
    assert all(v % 8 == 0 for p in pictures for layer in p.layers for v in (layer.x, layer.y, layer.size))
    kept = sum(p.reference is not None for p in pictures), sum(p.role is not None for p in pictures)
    assert all(count > 0.03 * len(pictures) for count in kept)


def test_a_held_out_picture_says_something_held_out() -> None:
    rng = random.Random(3)
    for name in world.OBJECTS:
        for _ in range(6):
            picture = mix.held_out(rng, name, "noto", "blue")
            things = any(f" {words} " in f" {picture.caption} " for words in phrases.HELD_OUT[name])
            assert things or picture.caption.startswith(phrases.LEADS_HELD_OUT), picture.caption
            assert picture.objects == (name,)
