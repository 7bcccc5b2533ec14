"""Prompts that say a concept are read anew: what says it becomes what is to be drawn in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import reference
import tiny
import torch
from test_instead import CUP, cre, expected_said, found, told
from torch import Tensor

from conceptguard.editing.edits.concept import NEUTRAL, concept_from_text
from conceptguard.editing.edits.encode import encode, own_tokens, rows_of
from conceptguard.editing.edits.sayings import FURTHER, SAYINGS, holds, tagged
from conceptguard.editing.edits.spec import Concept, EditSpec
from conceptguard.editing.engine.host import add_edit
from conceptguard.editing.methods.cre import DEFAULTS
from conceptguard.editing.methods.eiup import EIUPOptions
from conceptguard.editing.methods.reread import reading
from conceptguard.editing.methods.said import rows_of_all

OPTIONS = replace(DEFAULTS, floor=0.1, solve="sum")


def becoming(seed: int, cup: Tensor = CUP) -> Concept:
    """One whose words show in any prompt, and what they become."""
    concept = replace(told(seed), name=f"mug {seed}", instead=cup)
    (phrase,) = concept.phrases
    T = rows_of(phrase.tokens, phrase.own)[1:]
    return replace(concept, phrases=(replace(phrase, becomes=(T, cup[0, : len(T)])),))


def saying(*shares: tuple[Concept, float]) -> list[Any]:
    """A prompt of its own words, and of concepts' as far as the shares."""
    tokens = tiny.tokens(1).clone()
    for at, (concept, share) in enumerate(shares):
        own = concept.phrases[0].becomes[0]
        place = slice(20 + 20 * at, 20 + 20 * at + len(own))
        tokens[0, place] = share * own + (1 - share) * tokens[0, place]
    return [tokens, {"pooled_output": torch.zeros(1, 1280)}]


def expected(
    seen: tiny.Recorder, key: Any, row: dict[str, Tensor], edits: Sequence[tuple[Concept, float]], A: Tensor
) -> Tensor:
    """The output for one row, in double precision; A: what the edits find there, of which the prompt's is a part."""
    q, k, v = row["q"], row["k"], row["v"]
    ours = reference.attention(q, k, v, seen.heads(key))
    said = [expected_said(seen, key, concept, v) for concept, _ in edits]
    A0 = found(seen, key, q, edits[0][0].baseline[0])
    At = [found(seen, key, q, concept.phrases[0].tokens[0]) for concept, _ in edits]
    Ar = [found(seen, key, q, concept.instead[0]) for concept, _ in edits]
    least = [0.1 * (1.7 + (0.4 - 1.7) * share) for share in said]
    most = max((share * s for (_, s), share in zip(edits, said, strict=True)), default=0.0)
    keys, values = k.double(), v.double()
    for (concept, s), share in zip(edits, said, strict=True):
        if share > 0 and s > 0:
            T, G = ([seen.project(key, which, x) for which in "kv"] for x in concept.phrases[0].becomes)
            P = seen.project(key, "v", torch.cat(concept.ordinary))
            more = reference.reread(k, v, T, G, P)
            keys, values = keys + share * s / most * more[0], values + share * s / most * more[1]
    lost = ours - reference.attention(q, keys, values, seen.heads(key))
    a, once = A.double() - A0, torch.zeros(len(A), 1, dtype=torch.double)
    for x, (_, s), share, floor in zip(At, edits, said, least, strict=True):
        near = torch.cosine_similarity(a, x - A0, dim=-1)[:, None] >= floor
        once = torch.maximum(once, share * s * near)
    left = A.double() - once * lost
    more = [share > 0 for share in said]
    return reference.cre(left, At, [s for _, s in edits], 1, True, False, A0, least, instead=Ar, beyond=more)


def apart(result: Tensor, expected: Tensor) -> float:
    """The share of positions that differ: where a cosine is at the very floor it falls on either side."""
    return float(((result.double() - expected).abs().amax(-1) > 2e-3).float().mean())


def test_what_is_looked_up_is_the_formulas() -> None:
    concept = becoming(100)
    weights = {which: torch.randn(16, 24, generator=torch.Generator().manual_seed(i)) for i, which in enumerate("kv")}
    keys, values = (lambda x, w=weights[which]: x @ w for which in "kv")
    made = reading(concept, keys, values, {})
    k, v = (saying((concept, 1.0))[0][0] @ weights[which] for which in "kv")
    T, G = ([x @ weights[which] for which in "kv"] for x in concept.phrases[0].becomes)
    for result, slow in zip(
        made(v[None]), reference.reread(k, v, T, G, torch.cat(concept.ordinary) @ weights["v"]), strict=True
    ):
        torch.testing.assert_close(result[0].double(), slow, rtol=1e-3, atol=1e-3)


def test_what_is_like_no_row_or_of_zeros_stays() -> None:
    made = reading(becoming(100), lambda x: x, lambda x: x, {})
    said = becoming(100).phrases[0].becomes[0]
    moved = [made(rows[None])[1].norm(dim=-1).mean() for rows in (said, tiny.tokens(55)[0])]
    assert moved[1] < 0.4 * moved[0]
    assert not made(0 * said[None])[0].any()


def test_what_is_kept_is_read_as_before() -> None:
    concept, cups = becoming(100), tiny.concept("cup", 300).phrases
    values = lambda x: x  # noqa: E731
    plain, kept = (reading(each, values, values, {}) for each in (concept, replace(concept, keep=cups)))
    rows = rows_of(cups[0].tokens, cups[0].own)[None, 1:]
    assert kept(rows)[1].norm() < 0.6 * plain(rows)[1].norm()


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_row_is_read_anew_as_far_as_it_says_the_concept(model: Any, strength: float) -> None:
    mug = becoming(100)
    edited = cre(model, mug, OPTIONS, strength=strength)
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, [saying((mug, 1.0)), saying((mug, 0.0))], steps=1)
    far, differs = [], []
    for key, (call,) in seen.calls.items():
        for i in range(1, 3):
            row = {name: call[name][i] for name in "qkv"}
            A = reference.attention(row["q"], row["k"], row["v"], seen.heads(key))
            far.append(apart(call["out"][i], expected(seen, key, row, [(mug, strength)], A)))
            differs.append(apart(A, expected(seen, key, row, [(mug, strength)], A)))
    assert max(far) < 0.05 and max(differs) > 0.3


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_two_concepts_are_read_anew_at_once_each_by_its_strength_and_as_far_as_it_is_said(
    model: Any, share: float
) -> None:
    mug, owl = becoming(100), becoming(700, tiny.tokens(800))
    owl = replace(owl, neutral=mug.neutral, ordinary=mug.ordinary)
    edited = cre(cre(model, mug, OPTIONS), owl, OPTIONS, strength=0.5)
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, [saying((mug, 1.0), (owl, share))], steps=1)
    far, said = [], []
    for key, (call,) in seen.calls.items():
        row = {name: call[name][-1] for name in "qkv"}
        A = reference.attention(row["q"], row["k"], row["v"], seen.heads(key))
        far.append(apart(call["out"][-1], expected(seen, key, row, [(mug, 1.0), (owl, 0.5)], A)))
        said.append(float(expected_said(seen, key, owl, row["v"])))
    assert max(far) < 0.05 and any(0.1 < each < 0.9 for each in said) == (share < 1)


@pytest.mark.parametrize("other", ["EIUP", "a pack's"])
def test_what_others_add_stays(model: Any, other: str) -> None:
    """In the first attention, whose queries nobody has changed: only the prompt's own part is read anew."""
    mug, key = becoming(100), tiny.SD1_BLOCKS[0]
    if other == "EIUP":
        spec = EditSpec("erasure", tiny.concept("zebra", 400), options=EIUPOptions(weights=(0.5,)), node="Test")
        beside = add_edit(model, spec)
    else:
        beside = model.clone()
        beside.set_model_attn2_replace(lambda q, k, v, extra: 2 * q, *key)
    with tiny.Recorder(model) as seen:
        tiny.sample(beside, [saying((mug, 1.0))], steps=1)
        tiny.sample(cre(beside, mug, OPTIONS), [saying((mug, 1.0))], steps=1)
    alone, both = seen.calls[key]
    row = {name: both[name][-1] for name in "qkv"}
    assert apart(both["out"][-1], expected(seen, key, row, [(mug, 1.0)], alone["out"][-1])) < 0.05


# --- what the prompts become -----------------------------------------------------------------------------------------


def test_an_article_in_front_of_a_phrase_is_no_part_of_what_says_it(clip: Any) -> None:
    """Tags say it without; the phrase's tokens, which are what is taken away, have it."""
    one, bare = (concept_from_text(clip, text, instead="a cup").phrases[0] for text in ("a mug", "mug"))
    assert torch.equal(one.stem, bare.like[0]) and bare.stem is None and not torch.equal(one.tokens, bare.tokens)
    for mine, theirs in zip((*rows_of_all(one), *one.becomes), (*rows_of_all(bare), *bare.becomes), strict=True):
        assert torch.equal(mine, theirs)
    assert [tagged(text) for text in ("The mug", "a", "an old mug", "mugs")] == ["mug", "a", "old mug", "mugs"]


def test_each_row_becomes_what_stands_in_its_place(clip: Any) -> None:
    concept = concept_from_text(clip, "a beer mug", instead="a cup\na tea bowl")
    T, G = concept.phrases[0].becomes
    rows: list[tuple[Tensor, Tensor]] = []
    for said in (*SAYINGS, *FURTHER):
        texts = [said.format(thing) for thing in ("beer mug", "a cup", "a tea bowl")]
        tokens, own = [encode(clip, text)[0] for text in texts], [own_tokens(clip, text) for text in texts]
        behind = len(said.split("{}")[1].split())
        first = [each[len(each) - 1 - behind] for each in own]  # mug, cup, bowl
        last = own[0][-1] - first[0]
        for i in (*range(last + 1), last + 1, last + 2, last + 9, 76 - first[0]):
            others = [tokens[j][min(first[j] + i, 76)] for j in (1, 2)]
            rows.append((tokens[0][first[0] + i], sum(others) / 2))
    assert torch.equal(T, torch.stack([a for a, _ in rows]))
    torch.testing.assert_close(G, torch.stack([b for _, b in rows]))


def test_ordinary_prompts_say_other_things_in_the_same_ways(clip: Any) -> None:
    concept = concept_from_text(clip, "a mug", instead="a cup")
    ways, things = (*SAYINGS[1:], *FURTHER), NEUTRAL.splitlines()
    assert len(concept.further) == len(ways)
    for rows, way, thing in zip(concept.further, ways, things, strict=False):
        text = way.format(thing)
        assert torch.equal(rows, rows_of(encode(clip, text), own_tokens(clip, text)))
    assert replace(concept, further=()).key != concept.key
    assert not concept_from_text(clip, "in the style of noto").further


def test_a_phrasing_that_holds_another_adds_nothing(clip: Any) -> None:
    assert holds("a picture of a mug", "mug") and holds("the mug", "a mug") and not holds("mugs", "mug")
    concept = concept_from_text(clip, "a picture of a mug\na mug\nmug\nmugs", instead="a cup")
    assert [phrase.becomes is not None for phrase in concept.phrases] == [False, True, False, True]
    style = concept_from_text(clip, "a drawing in the style of noto\nin the style of noto", instead="in an oil style")
    assert [phrase.becomes is not None for phrase in style.phrases] == [False, True]


def test_what_somebody_says_remains_is_no_prompt_to_be_read(clip: Any) -> None:
    assert concept_from_text(clip, "a mug", neutral="a cat\na dog").phrases[0].becomes is None
    assert concept_from_text(clip, "a mug").phrases[0].becomes is not None


@pytest.mark.parametrize("instead", ["", "in an oil style\nin the style of fluent"])
def test_a_style_becomes_what_stands_behind_the_same_things(clip: Any, instead: str) -> None:
    """The other styles' words, or, with none, the end of a prompt without one."""
    style, contexts = "in the style of noto", "a cat\na dog\na red fish"
    concept = concept_from_text(clip, style, neutral=contexts, instead=instead)
    T, G = concept.phrases[0].becomes
    rows: list[tuple[Tensor, Tensor]] = []
    for context in contexts.splitlines():
        tokens, begin = encode(clip, f"{context} {style}")[0], own_tokens(clip, context)[-1] + 1
        end = own_tokens(clip, f"{context} {style}")[-1] + 1
        others = []
        for other in instead.splitlines() or [""]:
            text = f"{context} {other}".strip()
            others.append((encode(clip, text)[0], own_tokens(clip, text)[-1] + 1))
        for i in (*range(begin, end), end, end + 1, end + 8, 76):
            places = [(x, end_of + (i - end if instead else max(0, i - end))) for x, end_of in others]
            rows.append((tokens[i], torch.stack([x[min(at, 76)] for x, at in places]).mean(0)))
    assert torch.equal(T, torch.stack([a for a, _ in rows]))
    torch.testing.assert_close(G, torch.stack([b for _, b in rows]))


def test_in_cross_attention_no_style_is_read_anew(model: Any) -> None:
    style = replace(becoming(100), kind="style")
    (phrase,) = style.phrases
    plain = replace(style, phrases=(replace(phrase, becomes=None),))
    out = [tiny.sample(cre(model, each, OPTIONS), [saying((becoming(100), 1.0))], steps=1) for each in (style, plain)]
    assert torch.equal(*out)
    assert not torch.equal(out[0], tiny.sample(cre(model, becoming(100), OPTIONS), [saying((style, 1.0))], steps=1))


def test_what_a_concept_becomes_is_part_of_what_it_is() -> None:
    concept = becoming(100)
    (phrase,) = concept.phrases
    other = replace(concept, phrases=(replace(phrase, becomes=(phrase.becomes[0], phrase.becomes[1] + 1)),))
    assert other.key != concept.key


@torch.no_grad()
def test_values_of_nothing_change_nothing() -> None:
    """As of a block whose projection is zeroed."""
    made = reading(becoming(100), lambda x: x, lambda x: 0 * x, {})
    k, v = made(torch.zeros(1, 5, 16))
    assert not k.any() and not v.any()


def test_a_strength_below_nothing_stays_finite(model: Any) -> None:
    mug = becoming(100)
    assert torch.isfinite(tiny.sample(cre(model, mug, OPTIONS, strength=-0.5), [saying((mug, 1.0))], steps=1)).all()
