"""What is drawn in a concept's place, and the floor that follows what the prompt's own words say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import reference
import tiny
import torch
from documents import DOCUMENT, keys
from torch import Tensor

from conceptguard.editing.edits.concept import NEUTRAL, apart, concept_from_text
from conceptguard.editing.edits.encode import encode, lines_of, rows_of
from conceptguard.editing.edits.spec import Concept, EditSpec, Phrase
from conceptguard.editing.engine.host import add_edit
from conceptguard.editing.methods import said
from conceptguard.editing.methods.cre import DEFAULTS
from conceptguard.editing.methods.eiup import EIUPOptions
from conceptguard.editing.presets.document import read, write
from conceptguard.editing.presets.words import described
from conceptguard.nodes.concept import ConceptGuardConcept, ConceptGuardConceptFromConditioning
from conceptguard.nodes.cre import ConceptGuardCRE
from conceptguard.nodes.preset import ConceptGuardApplyPreset, ConceptGuardSavePreset

POSITION = replace(DEFAULTS, evidence="position", floor=0.0)
CUP = tiny.tokens(300)


def replaced(name: str = "knife", seed: int = 100, phrases: int = 1, instead: Tensor | None = CUP) -> Concept:
    return replace(tiny.concept(name, seed, phrases), instead=instead)


def cre(model: Any, concept: Concept, options: Any = POSITION, **inputs: Any) -> Any:
    return add_edit(model, EditSpec("projection", concept, options=options, node="Test", **inputs))


def found(seen: tiny.Recorder, key: Any, q: Tensor, tokens: Tensor) -> Tensor:
    return reference.attention(q, *(seen.project(key, which, tokens) for which in "kv"), seen.heads(key))


# --- instead ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solve", ["joint", "sum"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_the_replacement_takes_the_concepts_place(model: Any, solve: str, pieces: int) -> None:
    """A - s c (A~ - A_r); beside a concept that has nothing to draw instead, in one solution."""
    concepts, options = [replaced("knife", 100, 2), replaced("gun", 200, 1, None)], replace(POSITION, solve=solve)
    edited = cre(cre(model, concepts[0], options, strength=0.8), concepts[1], options)
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, tiny.cond(1, 77 * pieces), tiny.cond(2, 77 * pieces), steps=1)
    for key, (call,) in seen.calls.items():
        q, k, v = (call[name][-1] for name in "qkv")
        A, (gun, knife) = reference.attention(q, k, v, seen.heads(key)), (concepts[1], concepts[0])
        phrases = [*gun.phrases, *knife.phrases]  # by name, as edits are applied
        At = [found(seen, key, q, phrase.tokens[0]) for phrase in phrases]
        A0, Ar = found(seen, key, q, knife.baseline[0]), found(seen, key, q, CUP[0])
        expected = reference.cre(A, At, [1.0, 0.8, 0.8], 1, True, solve == "joint", A0, instead=[None, Ar, Ar])
        torch.testing.assert_close(call["out"][-1].double(), expected, rtol=1e-3, atol=1e-3)


def test_without_a_baseline_too(model: Any) -> None:
    options = replace(POSITION, baseline="none", negative="keep")
    with tiny.Recorder(model) as seen:
        tiny.sample(cre(model, replaced(), options), steps=1)
    for key, (call,) in seen.calls.items():
        q, k, v = (call[name][-1] for name in "qkv")
        At = [found(seen, key, q, replaced().phrases[0].tokens[0])]
        Ar = [found(seen, key, q, CUP[0])]
        expected = reference.cre(reference.attention(q, k, v, seen.heads(key)), At, [1.0], 1, False, True, instead=Ar)
        torch.testing.assert_close(call["out"][-1].double(), expected, rtol=1e-3, atol=1e-3)


def test_the_concept_itself_becomes_its_replacement(model: Any) -> None:
    """c is 1 there: A~ - (A~ - A_r)."""
    concept = replaced()
    prompt = [[concept.phrases[0].tokens, {"pooled_output": torch.zeros(1, 1280)}]]
    cup = [[CUP, {"pooled_output": torch.zeros(1, 1280)}]]
    edited, drawn = tiny.sample(cre(model, concept), prompt), tiny.sample(model, cup)
    torch.testing.assert_close(edited, drawn, rtol=1e-2, atol=1e-2)


def test_eiup_alike_adds_the_replacement(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from conceptguard.editing.methods import eiup

    monkeypatch.setattr(eiup, "FLOOR", 0.05)  # a random network finds little alike
    options, concept = EIUPOptions(weights=(-0.7,), evidence="alike"), replaced()
    edited = add_edit(model, EditSpec("erasure", concept, options=options, node="Test"))
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, steps=1)
    for key, (call,) in seen.calls.items():
        q, k, v = (call[name][-1] for name in "qkv")
        A, At = reference.attention(q, k, v, seen.heads(key)), found(seen, key, q, concept.phrases[0].tokens[0])
        A0, Ar = found(seen, key, q, concept.baseline[0]), found(seen, key, q, CUP[0])
        expected = reference.eiup_alike(A, [At], [-0.7], A0, 0.05, instead=Ar)
        torch.testing.assert_close(call["out"][-1].double(), expected, rtol=1e-3, atol=1e-3)


def test_the_nodes_take_it(clip: Any) -> None:
    made = ConceptGuardConcept.execute(clip, "a mug", instead="a cup\na glass").args[0]
    both = torch.cat([encode(clip, "a cup"), encode(clip, "a glass")]).mean(0, keepdim=True)
    assert torch.equal(made.instead, both) and made.instead_text == "a cup\na glass"
    nobody_said = ConceptGuardConcept.execute(clip, "a mug").args[0]
    assert torch.equal(nobody_said.instead, encode(clip, "something"))
    assert nobody_said.given_instead is None and torch.equal(made.given_instead, both)  # edits of weights ask
    assert ConceptGuardConcept.execute(clip, "a mug", neutral="").args[0].instead is None
    made = ConceptGuardConceptFromConditioning.execute(tiny.cond(3), instead=tiny.cond(4)).args[0]
    assert torch.equal(made.instead, tiny.tokens(4))
    assert made.key != ConceptGuardConceptFromConditioning.execute(tiny.cond(3)).args[0].key


def test_another_encoders_replacement_is_refused() -> None:
    with pytest.raises(ValueError, match="instead was made with a text encoder of width 32 and conditioning with one"):
        ConceptGuardConceptFromConditioning.execute(tiny.cond(3), instead=[[torch.zeros(1, 77, 32), {}]])


def test_a_concept_is_never_compared_with_itself(clip: Any) -> None:
    assert apart(lines_of(NEUTRAL), ["The Cat", "dog"]) == lines_of(NEUTRAL)[2:]
    output = ConceptGuardConcept.execute(clip, "a cat\nthe dog")
    concept = output.args[0]
    assert torch.equal(concept.neutral, concept_from_text(clip, "x", neutral="\n".join(lines_of(NEUTRAL)[2:])).neutral)
    assert "left a cat, a dog out of the neutral prompts" in output.ui["text"][0]


# --- styles ----------------------------------------------------------------------------------------------------------


def test_a_style_is_what_ordinary_prompts_become_with_it(clip: Any) -> None:
    inputs = {"neutral": "a cat\na dog\nin the style of noto", "keep": "in ink", "instead": "in oil\nas a photo"}
    style = ConceptGuardConcept.execute(clip, "in the style of noto", **inputs).args[0]

    def mean(*texts: str) -> Tensor:
        return torch.cat([encode(clip, text) for text in texts]).mean(0, keepdim=True)

    assert style.kind == "style" and style.phrases[0].text == "in the style of noto"
    assert torch.equal(style.neutral, mean("a cat", "a dog"))
    assert torch.equal(style.phrases[0].tokens, mean("a cat in the style of noto", "a dog in the style of noto"))
    assert torch.equal(style.keep[0].tokens, mean("a cat in ink", "a dog in ink"))
    both = mean("a cat in oil", "a dog in oil"), mean("a cat as a photo", "a dog as a photo")
    torch.testing.assert_close(style.instead, torch.cat(both).mean(0, keepdim=True))
    assert len(style.phrases[0].like) == 2 == len(style.ordinary)
    assert style.phrases[0].own == tuple(range(1, 9))  # "a cat in the style of noto", whose last word is two tokens


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("in the style of noto", "auto", "style"),
        ("Noto style\nby Noto", "auto", "style"),
        ("in the style of noto\na cat", "auto", "thing"),
        ("a stylish cat standing by a door", "auto", "thing"),
        ("noto", "style", "style"),
        ("in the style of noto", "thing", "thing"),
    ],
)
def test_a_style_is_found_by_its_words_unless_somebody_says(clip: Any, text: str, kind: str, found: str) -> None:
    assert concept_from_text(clip, text, kind=kind).kind == found


def test_a_style_draws_what_its_prompts_draw_without_it(clip: Any) -> None:
    """Neutral lines that are styles are no contexts, nor is nothing; and nobody's replacement is `something`."""
    for neutral in ("", "in the style of fluent"):
        style = concept_from_text(clip, "in the style of noto", neutral=neutral)
        assert style.instead is None and torch.equal(style.baseline, concept_from_text(clip, "x").neutral)
        assert style.given_instead is style.neutral  # what edits of the weights make of it
    with pytest.raises(ValueError, match="kind is 'look'; choose one of auto, thing, style"):
        concept_from_text(clip, "noto", kind="look")


def test_a_preset_says_that_it_is_a_style(clip: Any, model: Any) -> None:
    by_hand = ConceptGuardCRE.execute(model, concept_from_text(clip, "noto style", instead="as a photo")).args[0]
    written = ConceptGuardSavePreset.execute(by_hand, clip, "Styles").args[0]
    document = json.loads(written)
    assert document["schema_version"] == 4 and "concepts that are styles" in document["needs"]
    assert document["edits"][0]["concept"]["kind"] == "style"
    assert 'Erases the style "noto style", drawing as a photo instead' in described(read(written))[0]
    assert keys(ConceptGuardApplyPreset.execute(model, clip, written).args[0]) == keys(by_hand)
    del document["edits"][0]["concept"]["kind"]  # what an older preset says: its words alone
    older = ConceptGuardApplyPreset.execute(model, clip, json.dumps(document)).args[0]
    assert keys(older) != keys(by_hand)


# --- what the words say ----------------------------------------------------------------------------------------------


def told(seed: int = 100, phrases: int = 1) -> Concept:
    """One whose words show in any prompt that has them: such prompts hold its own rows, somewhat changed."""
    concept = replace(tiny.concept("mug", seed, phrases), neutral=tiny.tokens(9))

    def said_by(phrase: Phrase) -> Phrase:
        rows = rows_of(phrase.tokens, phrase.own)
        like = (
            torch.cat([tiny.tokens(seed + 10 + i)[0, :5], rows + 0.3 * tiny.tokens(i)[0, : len(rows)]]) for i in (1, 2)
        )
        return replace(phrase, like=tuple(like))

    ordinary = tuple(tiny.tokens(50 + i)[0, :9] for i in range(3))
    return replace(concept, phrases=tuple(map(said_by, concept.phrases)), ordinary=ordinary)


def prompt_with(concept: Concept, share: float) -> Tensor:
    """[1, 77, W]: words of its own, and the concept's, as far as `share`."""
    tokens = tiny.tokens(1).clone()
    own = rows_of(concept.phrases[0].tokens, concept.phrases[0].own)[1:]
    tokens[0, 20 : 20 + len(own)] = share * own + (1 - share) * tokens[0, 20 : 20 + len(own)]
    return tokens


def expected_said(seen: tiny.Recorder, key: Any, concept: Concept, v: Tensor) -> float:
    """Of its surest phrase."""
    out = []
    for phrase in concept.phrases:
        own = seen.project(key, "v", rows_of(phrase.tokens, phrase.own)[1:])
        like, ordinary = ([seen.project(key, "v", x) for x in some] for some in (phrase.like, concept.ordinary))
        out.append(reference.said(v, own, like, ordinary, sure=said.SURE, spread=said.NARROW))
    return max(out)


@pytest.mark.parametrize("share", [0.0, 0.45, 1.0])
def test_the_tokens_are_asked_as_the_formula_says(model: Any, share: float) -> None:
    concept, saw, results = told(phrases=2), tiny.Recorder(model), []
    for key in saw.blocks:
        with torch.no_grad():
            test = said.said_test(concept, lambda x, key=key: saw.project(key, "v", x).float())
            v = saw.project(key, "v", prompt_with(concept, share)[0])
        assert test is not None
        result = test(v.float()[None])
        assert result.shape == (2, 1, 1)
        results.append(float(result.amax()))
        assert results[-1] == pytest.approx(expected_said(saw, key, concept, v), abs=1e-3)
    assert min(results) == 1 if share == 1 else 0 < sum(results) / len(results) < 0.9


def test_an_attention_that_hardly_tells_them_apart_is_trusted_as_little() -> None:
    """A cosine of 0.6, a tenth above an ordinary prompt's, beyond the concept's own of 0.51: still none of it."""
    t, v = torch.eye(2)[:1], torch.tensor([[[0.6, 0.8]]])
    close, apart = (said.Said(torch.zeros(2), t, torch.tensor([0.5]), torch.tensor([high])) for high in (0.51, 0.9))
    assert float(close(v)) == pytest.approx(0, abs=1e-5) and float(apart(v)) == 0
    assert float(close(torch.tensor([[[1.0, 0.0]]]))) == 1  # its own word says it all the same


def test_the_floor_follows(model: Any) -> None:
    """Through the host: each row's floor by its own prompt, a concept without examples at the floor as it stands."""
    mug = told()
    plain = replace(tiny.concept("zebra", 400), neutral=mug.neutral)
    options = replace(DEFAULTS, floor=0.1, solve="sum")
    edited = cre(cre(model, mug, options), plain, options)
    prompts = [[prompt_with(mug, share), {"pooled_output": torch.zeros(1, 1280)}] for share in (1.0, 0.0)]
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, prompts, steps=1)
    found_share = set()
    for key, (call,) in seen.calls.items():
        for row in range(1, 3):
            q, k, v = (call[name][row] for name in "qkv")
            share = expected_said(seen, key, mug, v)
            found_share.add(round(share, 1))
            A, A0 = reference.attention(q, k, v, seen.heads(key)), found(seen, key, q, mug.baseline[0])
            At = [found(seen, key, q, phrase.tokens[0]) for phrase in (*mug.phrases, *plain.phrases)]
            least = [0.1 * (1.7 + (0.4 - 1.7) * share), 0.1]
            expected = reference.cre(A, At, [1.0, 1.0], 1, True, False, A0, least)
            far = (call["out"][row].double() - expected).abs().amax(-1) > 1e-3
            assert far.float().mean() < 0.05  # a cosine at the very floor falls on either side
    assert 1.0 in found_share and min(found_share) < 0.5


def test_position_alone_is_as_before(model: Any) -> None:
    concept = told()
    bare = replace(concept, ordinary=(), phrases=tuple(replace(p, like=()) for p in concept.phrases))
    options = replace(DEFAULTS, floor=0.2)
    one = tiny.sample(cre(model, bare, options))
    assert torch.equal(tiny.sample(cre(model, concept, replace(options, evidence="position"))), one)
    assert not torch.equal(tiny.sample(cre(model, concept, options)), one)


def test_in_half_precision(clip: Any) -> None:
    model = tiny.sd1(torch.bfloat16)
    concept = concept_from_text(clip, "a mug", instead="a cup")
    assert torch.isfinite(tiny.sample(cre(model, concept, DEFAULTS), batch=3)).all()


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}], ids=str)
def test_off_is_bit_identical(model: Any, clip: Any, off: dict[str, Any]) -> None:
    concept = concept_from_text(clip, "a mug", instead="a cup")
    assert torch.equal(tiny.sample(cre(model, concept, DEFAULTS, **off)), tiny.sample(model))


def test_presets_hold_both_and_say_what_an_older_reader_lacks(clip: Any, model: Any) -> None:
    words = {"name": "mug", "phrases": ["a mug"], "instead": ["a cup"]}
    document = {**DOCUMENT, "edits": [{"method": "CRE", "concept": words, "evidence": "position"}]}
    preset = read(json.dumps(document))
    written = json.loads(write(preset))
    assert written["schema_version"] == 2
    assert written["needs"] == ["evidence by tokens or by position", "what to draw instead"]
    assert described(preset) == [
        'Erases "mug" (a mug), drawing a cup instead (CRE, strength 1), through the whole sampling.'
    ]
    applied = ConceptGuardApplyPreset.execute(model, clip, json.dumps(document)).args[0]
    by_hand = ConceptGuardConcept.execute(clip, "a mug", "mug", instead="a cup").args[0]
    assert keys(applied) == keys(ConceptGuardCRE.execute(model, by_hand, evidence="position").args[0])
    assert read(ConceptGuardSavePreset.execute(applied, clip, "Mugs").args[0]).edits == preset.edits
    assert json.loads(write(read(json.dumps(DOCUMENT))))["schema_version"] == 1


class Unpadded:
    """A text encoder that gives a prompt as many rows as it has words, and its start and end."""

    def tokenize(self, text: str, return_word_ids: bool = False) -> dict[str, Any]:
        words = [(word, 1.0, i) for i, word in enumerate(text.split(), 1)]
        return {"l": [[("<", 1.0, 0), *words, (">", 1.0, 0)]]}

    def encode_from_tokens(self, tokens: dict[str, Any], return_pooled: bool = False) -> tuple[Tensor, None]:
        rows = [tiny.tokens(sum(map(ord, str(word))), 1)[0] for word, *_ in tokens["l"][0]]
        return torch.cat(rows)[None], None


def test_neutral_prompts_of_an_encoder_that_does_not_pad() -> None:
    """Those of the commonest length: their mean has to have one."""
    clip = Unpadded()
    concept = concept_from_text(clip, "a mug", neutral="a cat\na dog\nthree black umbrellas", instead="a cup")
    both = torch.cat([encode(clip, "a cat"), encode(clip, "a dog")]).mean(0, keepdim=True)
    assert torch.equal(concept.neutral, both) and len(concept.ordinary) == 3
