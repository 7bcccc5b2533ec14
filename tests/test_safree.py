"""SAFREE's equations one token after the other, and what the host's attention reads of them."""

from __future__ import annotations

import json
import math
from typing import Any

import comfy.supported_models
import documents
import pytest
import tiny
import torch
from torch import Tensor

from conceptguard.editing.edits.encode import encode
from conceptguard.editing.edits.spec import Concept, EditSpec, Gate
from conceptguard.editing.engine.backbones.unet import UNet
from conceptguard.editing.engine.host import add_edit, edits_of
from conceptguard.editing.methods.adavd import AdaVDOptions
from conceptguard.editing.methods.safree import Filtered, SAFREEOptions, filtered, of_prompt
from conceptguard.editing.methods.sld import SLDOptions
from conceptguard.editing.presets.apply import Given, specs_of
from conceptguard.editing.presets.document import read, write
from conceptguard.editing.presets.save import Saver
from conceptguard.editing.presets.words import described
from conceptguard.nodes.concept import ConceptGuardConcept
from conceptguard.nodes.safree import ConceptGuardSAFREE

PROMPT = "a cat with a knife and a spoon"


def concept(clip: Any, text: str = "knife\na knife") -> Concept:
    return ConceptGuardConcept.execute(clip, text, "knife").args[0]


def onto(X: list[Tensor], x: Tensor) -> Tensor:
    """The nearest to x in the span of X, by least squares."""
    A = torch.stack([each.double() for each in X], 1)
    return A @ torch.linalg.lstsq(A, x.double()[:, None], driver="gelsd").solution[:, 0]


def slow(c: list[Tensor], e: list[Tensor], C: list[Tensor], alpha: float) -> tuple[list[Tensor], list[bool], float]:
    """c' of each token, whether it leads to the concept, and beta."""
    d = [(each.double() - onto(C, each)).norm() for each in e]
    out, leads, cosines = [], [], []
    for i, row in enumerate(c):
        others = [d[j] for j in range(len(d)) if j != i]
        leads.append(bool(others) and bool(d[i] >= (1 + alpha) * sum(others) / len(others)))
        inside = onto(e, row)
        safe = inside - onto(C, inside)
        cosines.append(float(torch.cosine_similarity(row.double(), safe, 0)))
        out.append(safe if leads[-1] else row.double())
    return out, leads, 1 - sum(cosines) / len(cosines)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_it_is_the_formula(alpha: float, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    c, E, C = (torch.randn(rows, 24, generator=generator) for rows in (n, n, 3))
    changed, leads, cos = filtered(c, E, C, alpha)
    expected, on, beta = slow(list(c), list(E), list(C), alpha)
    torch.testing.assert_close(changed, torch.stack(expected))
    assert leads.tolist() == on and 1 - float(cos.mean()) == pytest.approx(beta)
    assert n > 1 or not any(on)


@pytest.mark.parametrize("family", [comfy.supported_models.SD15, comfy.supported_models.SDXL])
def test_the_vectors_are_those_of_the_masked_prompts(family: Any) -> None:
    """Each masked prompt encoded on its own, and each row as the equations have it."""
    clip = tiny.clip(family)
    knife, tokens = concept(clip), clip.tokenize(PROMPT)
    n = len(PROMPT.split())
    e = []
    for i in range(1, n + 1):
        again = {name: [list(piece) for piece in pieces] for name, pieces in tokens.items()}
        for pieces in again.values():
            pieces[0][i] = (0, 1.0)
        e.append(clip.encode_from_tokens(again)[0, n + 1])
    c = encode(clip, PROMPT)[0]
    C = [phrase.tokens[0, phrase.own[-1] + 1] for phrase in knife.phrases]
    expected, leads, beta = slow(list(c[1 : n + 1]), e, C, 0.01)
    found = of_prompt(clip, PROMPT, knife)
    assert found.triggers == tuple(i + 1 for i, on in enumerate(leads) if on) and found.triggers
    torch.testing.assert_close((found.c + found.d)[1 : n + 1].double(), torch.stack(expected), rtol=1e-3, atol=1e-4)
    assert not found.d[0].any() and not found.d[n + 1 :].any() and found.beta == pytest.approx(beta, abs=1e-4)


@pytest.mark.parametrize(("beta", "steps"), [(0.0, 1), (0.5, 3), (0.5333, 6), (0.6, 11), (1.0, 11)])
def test_the_more_is_changed_the_longer_it_acts(beta: float, steps: int) -> None:
    prompt = Filtered(torch.zeros(77, 4), torch.zeros(77, 4), (1,), beta)
    assert prompt.share == pytest.approx(steps / 50)
    assert steps == round(10 / (1 + math.exp(-5 * (10 * beta - 5.333)))) + 1


def test_a_long_prompt_is_filtered_piece_by_piece(clip: Any) -> None:
    long = "a knife " + "and a cat " * 30
    found = of_prompt(clip, long, concept(clip))
    assert found.c.shape[0] == 154 and found.triggers and not found.d[[0, 76, 77, 153]].any()


# --- through the host ------------------------------------------------------------------------------------------------


def options(clip: Any, text: str = PROMPT, **more: Any) -> SAFREEOptions:
    return SAFREEOptions(of_prompt(clip, text, concept(clip)), **{"svf": False, **more})


def spec(clip: Any, **changes: Any) -> EditSpec:
    return EditSpec("filter", concept(clip), **{"options": options(clip), "node": "Test", **changes})


def prompt(clip: Any, text: str = PROMPT) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@pytest.mark.parametrize("length", [77, 154])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_attentions_read_the_filtered_prompt(model: Any, clip: Any, batch: int, length: int) -> None:
    edited, found = add_edit(model, spec(clip, strength=0.6)), of_prompt(clip, PROMPT, concept(clip))
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, prompt(clip), tiny.cond(2, length), steps=1, batch=batch)
    text = (found.c + 0.6 * found.d).repeat(length // 77, 1)
    for key, (call,) in seen.calls.items():
        for row in range(batch):
            for which in "kv":
                expected = seen.project(key, which, text)
                torch.testing.assert_close(call[which][batch + row].double(), expected, rtol=1e-3, atol=1e-3)
                untouched = seen.project(key, which, tiny.tokens(2, length)[0])
                torch.testing.assert_close(call[which][row].double(), untouched, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "off", [{"strength": 0.0}, {"gate": Gate((0.0,))}, {"start_percent": 0.5, "end_percent": 0.5}], ids=str
)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_off_is_bit_identical(model: Any, clip: Any, off: dict[str, Any], cfg: float) -> None:
    plain = tiny.sample(model, prompt(clip), cfg=cfg)
    assert torch.equal(tiny.sample(add_edit(model, spec(clip, **off)), prompt(clip), cfg=cfg), plain)
    assert not torch.equal(tiny.sample(add_edit(model, spec(clip)), prompt(clip), cfg=cfg), plain)


def test_a_prompt_without_such_words_is_bit_identical(model: Any, clip: Any) -> None:
    plain = tiny.sample(model, prompt(clip, "knife"))
    assert torch.equal(
        tiny.sample(add_edit(model, spec(clip, options=options(clip, "knife"))), prompt(clip, "knife")), plain
    )


def test_the_filters_window_ends_early(model: Any, clip: Any) -> None:
    kept = of_prompt(clip, PROMPT, concept(clip))
    brief = Filtered(kept.c, kept.d, kept.triggers, 0.0)  # one step of fifty
    first = EditSpec("filter", concept(clip), options=SAFREEOptions(brief), node="Test")
    hand = EditSpec("filter", concept(clip), options=SAFREEOptions(brief, svf=False), end_percent=0.02, node="Test")
    a, b = (tiny.sample(add_edit(model, each), prompt(clip), steps=10) for each in (first, hand))
    assert torch.equal(a, b) and not torch.equal(a, tiny.sample(model, prompt(clip), steps=10))


def test_another_prompt_than_the_one_it_was_given_is_an_error(model: Any, clip: Any) -> None:
    with pytest.raises(ValueError, match="Test: the prompt that is sampled is not the one in `text`; connect the same"):
        tiny.sample(add_edit(model, spec(clip)), prompt(clip, "a dog"))


# --- refusals and presets --------------------------------------------------------------------------------------------


def test_what_it_cannot_filter_is_refused(model: Any, clip: Any) -> None:
    node, knife = ConceptGuardSAFREE, concept(clip)
    with pytest.raises(ValueError, match="ConceptGuardSAFREE: text is empty; connect the prompt that is sampled"):
        node.execute(model, knife, clip, " ")
    with pytest.raises(
        ValueError, match="ConceptGuardSAFREE: clip is another text encoder than the concept's; connect"
    ):
        node.execute(model, knife, tiny.clip(comfy.supported_models.SDXL), PROMPT)
    with pytest.raises(ValueError, match="ConceptGuardSAFREE: alpha is -1; give a number from 0 to 10"):
        node.execute(model, knife, clip, PROMPT, alpha=-1)
    with pytest.raises(ValueError, match="ConceptGuardSAFREE: cannot edit AuraFlow"):
        node.execute(tiny.auraflow(), knife, clip, PROMPT)


def test_models_that_mix_text_and_picture_are_refused(model: Any, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UNet, "values_apart", False)
    with pytest.raises(ValueError, match="Test: the pooled vectors of its words are CLIP's, and .* another encoder's"):
        add_edit(model, spec(clip))
    options = AdaVDOptions("published")
    with pytest.raises(ValueError, match="Test: the values of the text cannot be changed alone in "):
        add_edit(model, EditSpec("values", concept(clip), options=options, node="Test"))
    monkeypatch.setattr(UNet, "adds_noise", False)
    with pytest.raises(ValueError, match="Test: the noise that .* predicts is of another kind"):
        add_edit(model, EditSpec("guidance", concept(clip), options=SLDOptions(), node="Test"))


def test_a_preset_holds_it(model: Any, clip: Any) -> None:
    edit = {"method": "SAFREE", "concept": documents.WORDS, "alpha": 0.02, "svf": False, "strength": 0.5}
    preset = read(json.dumps({**documents.DOCUMENT, "edits": [edit]}))
    assert read(write(preset)) == preset
    assert described(preset) == [
        'Filters the words that lead to "knife" (a knife; blades) out of the prompt (SAFREE, strength 0.5), through '
        "the whole sampling."
    ]
    with pytest.raises(ValueError, match="edit 1: it needs the prompt; give it to a Preset Gate node"):
        specs_of(preset, Given(clip), node="Test")
    (made,) = specs_of(preset, Given(clip, text=PROMPT), node="Test")
    by_hand = ConceptGuardSAFREE.execute(model, made.source, clip, PROMPT, 0.5, alpha=0.02, svf=False).args[0]
    assert torch.equal(tiny.sample(by_hand, prompt(clip)), tiny.sample(add_edit(model, made), prompt(clip)))
    assert Saver(clip).edits(edits_of(by_hand)) == preset.edits
