"""The pooled text as an edit leaves it, against its formula done slowly, and that the model is told it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dits
import pytest
import tiny
import torch
from dits import POOLED, pooled
from torch import Tensor

from conceptguard.demo.load import load
from conceptguard.editing.edits.concept import concept_from_conditioning, concept_from_text
from conceptguard.editing.edits.spec import Concept, EditSpec, Phrase
from conceptguard.editing.engine.host import add_edit
from conceptguard.editing.methods.pooled import pooled_edit

S = 0.7


def told(concept: Concept, **more: Any) -> Concept:
    phrases = tuple(replace(phrase, pooled=pooled(50 + i)) for i, phrase in enumerate(concept.phrases))
    return replace(concept, phrases=phrases, pooled=pooled(60), **more)


def by_hand(p: Tensor, concept: Concept, s: float) -> Tensor:
    """p [P] less its projections, number by number."""
    p0 = concept.pooled[0].double()  # type: ignore[index]
    p = p.double()
    for phrase in concept.phrases:
        p_c = phrase.pooled[0].double()  # type: ignore[index]
        d = p_c - p0
        dot = sum(float((p[i] - p0[i]) * d[i]) for i in range(len(p)))
        square = sum(float(d[i] ** 2) for i in range(len(p)))
        kept = [k.pooled[0].double() - p0 for k in concept.keep]  # type: ignore[index]
        nearer = [float((p - p0) @ k / k.norm()) > dot / square**0.5 for k in kept]
        if dot > 0 and not any(nearer):
            end = p0 if concept.pooled_instead is None else concept.pooled_instead[0].double()
            p = p - s * dot / square * (p_c - end)
    return p


def kept_phrase(p: Tensor) -> Phrase:
    return Phrase("kept", dits.tokens(3, 7), (1,), pooled=p)


@pytest.mark.parametrize("instead", [False, True])
def test_it_loses_its_projection_on_the_concepts(instead: bool) -> None:
    concept = told(dits.concept(2), pooled_instead=pooled(70) if instead else None)
    spec = EditSpec("projection", concept, S, options=tiny.CRE)
    change = pooled_edit(spec, torch.device("cpu"))
    assert change is not None
    p_c = [phrase.pooled for phrase in concept.phrases]
    away = 3 * pooled(60) - p_c[0] - p_c[1]  # type: ignore[operator]
    p = torch.cat([pooled(i) for i in range(20)] + [away])
    want = torch.stack([by_hand(row, concept, S) for row in p])
    torch.testing.assert_close(change(p, torch.full((21,), S)).double(), want, rtol=1e-4, atol=1e-4)
    moved = (want - p).abs().amax(-1)
    assert (moved == 0).any() and (moved > 0.1).any()  # what points away from the concept stays


def test_what_is_more_like_a_kept_prompt_stays() -> None:
    concept = told(dits.concept(1))
    p_c = concept.phrases[0].pooled
    assert p_c is not None and concept.pooled is not None
    near = p_c + 0.3 * pooled(80)
    concept = replace(concept, keep=(kept_phrase(near),))
    change = pooled_edit(EditSpec("projection", concept, S, options=tiny.CRE), torch.device("cpu"))
    assert change is not None
    p = torch.cat([near, p_c])
    out = change(p, torch.full((2,), S))
    torch.testing.assert_close(out[0], p[0])
    torch.testing.assert_close(out.double(), torch.stack([by_hand(row, concept, S) for row in p]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out[1], p[1], atol=0.1)


class Heard:
    """What a module is called with."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls: list[Tensor] = []
        module.register_forward_pre_hook(lambda _, inputs: self.calls.append(inputs[0].clone()))


def conditional(y: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Rows of the negative prompt, and of the positive."""
    return y[:batch], y[batch:]


@pytest.mark.parametrize(("name", "module"), [("Flux.1", "vector_in"), ("SD3", "y_embedder")])
def test_a_transformer_is_told_the_edited_pooled_text(name: str, module: str) -> None:
    model, concept = dits.build(name), told(dits.concept(2))
    assert concept.phrases[0].pooled is not None
    heard = Heard(getattr(model.model.diffusion_model, module))
    about = concept.phrases[0].pooled + 0.2 * pooled(1)
    positive, negative = dits.cond(dits.tokens(1, 9), about), dits.cond(dits.tokens(2, 9), about)
    edited = add_edit(model, EditSpec("projection", concept, S, options=tiny.CRE, node="Test"))
    dits.sample(name, edited, positive, negative, batch=2, cfg=5.0)
    left, changed = conditional(torch.cat(heard.calls)[-4:], 2)  # of one call, or of one for each prompt
    torch.testing.assert_close(left, about.expand(2, -1))
    want = by_hand(about[0], concept, S).float().expand(2, -1)
    torch.testing.assert_close(changed, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, left, atol=0.1)


def test_not_by_an_edit_of_some_blocks_or_without_its_own() -> None:
    """It is told to all blocks at once."""
    model, heard = dits.build("Flux.1"), []
    model.model.diffusion_model.vector_in.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0].clone()))
    for concept, blocks in ((told(dits.concept()), "double"), (dits.concept(), "all")):
        dits.sample(
            "Flux.1", add_edit(model, EditSpec("projection", concept, blocks=blocks, options=tiny.CRE, node="Test"))
        )
    assert all(torch.equal(y, pooled(1)) for y in heard)


def test_sdxl_is_told_it_before_its_sizes() -> None:
    """Its real widths of text in a small network: 1280 numbers of pooled text, and 1536 of sizes that stay."""
    model = tiny._patcher(tiny.comfy.supported_models.SDXL, {**tiny._SDXL, "context_dim": 2048}, torch.float32, 0)

    def text(seed: int, *shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))

    concept = Concept("it", (Phrase("it", text(1, 77, 2048), (1,), pooled=text(2, 1280)),), text(3, 77, 2048))
    concept = replace(concept, pooled=text(4, 1280))
    heard = Heard(model.model.diffusion_model.label_emb)
    about = concept.phrases[0].pooled
    positive, negative = ([[text(seed, 77, 2048), {"pooled_output": about}]] for seed in (5, 6))
    edited = add_edit(model, EditSpec("projection", concept, S, options=tiny.CRE, node="Test"))
    tiny.sample(edited, positive, negative, batch=2, steps=1)
    left, changed = conditional(heard.calls[-1], 2)
    assert about is not None and left.shape == (2, 2816)
    torch.testing.assert_close(left[:, :1280], about.expand(2, -1))
    torch.testing.assert_close(changed[0, :1280].double(), by_hand(about[0], concept, S), rtol=1e-4, atol=1e-4)
    assert torch.equal(changed[:, 1280:], left[:, 1280:]) and not torch.allclose(changed, left, atol=0.1)


def test_a_concept_knows_its_pooled_text() -> None:
    _, clip, _ = load()

    def of(text: str) -> Tensor:
        return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1]

    concept = concept_from_text(clip, "a cat\na kitten", "", "a dog\na car", "a fox", "a fish")
    assert [torch.equal(x.pooled, of(x.text)) for x in (*concept.phrases, *concept.keep)] == [True] * 3
    torch.testing.assert_close(concept.pooled, (of("a dog") + of("a car")) / 2)
    torch.testing.assert_close(concept.pooled_instead, of("a fish"))
    torch.testing.assert_close(concept_from_text(clip, "a cat", "", "").pooled, of(""))
    given = concept_from_conditioning(
        *[clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a cat",)],
        neutral=clip.encode_from_tokens_scheduled(clip.tokenize("a dog")),
    )
    assert torch.equal(given.phrases[0].pooled, of("a cat")) and torch.equal(given.pooled, of("a dog"))
    assert concept_from_conditioning([[dits.tokens(1, 5), {"pooled_output": None}]]).phrases[0].pooled is None


def test_other_widths_are_left_alone() -> None:
    concept = told(dits.concept())
    change = pooled_edit(EditSpec("projection", concept, S, options=tiny.CRE), torch.device("cpu"))
    assert change is not None
    p = torch.randn(2, POOLED + 1)
    assert torch.equal(change(p, torch.ones(2)), p)
