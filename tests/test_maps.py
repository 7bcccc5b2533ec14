"""Where a concept is found: the maps, and the node that paints them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management
import pytest
import reference
import tiny
import torch
from torch import Tensor

from conceptguard.editing.edits.spec import EditSpec
from conceptguard.editing.engine.host import RUN, add_edit, add_watch
from conceptguard.editing.engine.run import WATCH
from conceptguard.editing.engine.watch import Watch
from conceptguard.editing.methods import eiup
from conceptguard.editing.methods.cre import DEFAULTS as CRE
from conceptguard.editing.pictures.heat import SCALES, painted, scaled
from conceptguard.jobs.map import noise_levels
from conceptguard.nodes.concept_map import ConceptGuardConceptMap

CONCEPT = tiny.concept("knife", 100, phrases=2)


def watch(**inputs: Any) -> Watch:
    return Watch(CONCEPT, "Test", **inputs)


def cre(model: Any) -> Any:
    return add_edit(model, EditSpec("projection", tiny.concept("c", 300), options=CRE, node="Test"))


def latent(batch: int = 1) -> dict[str, Tensor]:
    return {"samples": torch.randn(batch, 4, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(3))}


def look(model: Any, batch: int = 1, concept: Any = CONCEPT, positive: Any = None, **inputs: Any) -> Any:
    """The node's image and mask."""
    positive = tiny.cond(1) if positive is None else positive
    return ConceptGuardConceptMap.execute(model, concept, positive, latent(batch), **inputs).args


# --- what is collected -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evidence", ["none", "share"])
@pytest.mark.parametrize("make", [tiny.sd1, tiny.sdxl])
def test_a_map_is_the_attention_of_the_concepts_own_tokens(make: Any, evidence: str) -> None:
    model, saw = make(), watch(evidence=evidence)
    with tiny.Recorder(model) as seen:
        tiny.sample(add_watch(model, saw), batch=2, steps=1)
    assert saw.maps.keys() == seen.calls.keys()
    for key, (call,) in seen.calls.items():
        (found,), h = saw.maps[key], seen.heads(key)
        side = int(call["q"].shape[1] ** 0.5)
        assert found.shape == (2, 2, side, side)
        for p, phrase in enumerate(CONCEPT.phrases):
            K = seen.project(key, "k", phrase.tokens[0])
            for image in range(2):
                q, k = call["q"][2 + image], seen.project(key, "k", tiny.tokens(1)[0])
                heads = zip(q.double().chunk(h, -1), K.chunk(h, -1), strict=True)
                A_e = torch.stack([torch.softmax(a @ b.T / b.shape[-1] ** 0.5, -1) for a, b in heads], 1)
                own = A_e[..., list(phrase.own)].sum(-1)
                if evidence == "share":
                    own = own * reference.share(q, k, K[list(phrase.own)], h, 1)
                torch.testing.assert_close(found[p, image].double().flatten(), own.mean(-1), rtol=1e-3, atol=1e-6)


def test_a_map_of_what_is_alike_shows_where_edits_act(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eiup, "FLOOR", 0.05)  # a random network finds little alike
    long = replace(CONCEPT.phrases[0], tokens=tiny.tokens(400, 154))  # another length than the baseline, and first
    concept = replace(CONCEPT, phrases=(long, CONCEPT.phrases[1]))
    saw = Watch(concept, "Test", evidence="alike")
    with tiny.Recorder(model) as seen:
        tiny.sample(add_watch(model, saw), batch=2, steps=1)
    for key, (call,) in seen.calls.items():
        (found,), h = saw.maps[key], seen.heads(key)
        for p, phrase in enumerate(concept.phrases):
            for image in range(2):
                q = call["q"][2 + image]

                def output(tokens: Tensor, q: Tensor = q, key: Any = key, h: int = h) -> Tensor:
                    return reference.attention(q, seen.project(key, "k", tokens), seen.project(key, "v", tokens), h)

                A = output(tiny.tokens(1)[0])
                edited = reference.eiup_alike(A, [output(phrase.tokens[0])], [1.0], output(CONCEPT.baseline[0]), 0.05)
                torch.testing.assert_close(found[p, image].flatten() > 0, (edited != A.double()).any(-1))
    features = saw.features(saw.maps)
    assert features.shape == (2, 2, len(saw.maps)) and 0 < features.mean() < 1


def test_looking_changes_no_bit(model: Any) -> None:
    """Of the plain model, nor of one with edits."""
    for m in (model, cre(model)):
        assert torch.equal(tiny.sample(add_watch(m, watch()), batch=2), tiny.sample(m, batch=2))


def test_only_the_named_blocks_are_looked_at(model: Any) -> None:
    saw = watch(blocks="middle")
    tiny.sample(add_watch(cre(model), saw), steps=2)
    assert list(saw.maps) == [("middle", 0, 0)] and len(saw.maps["middle", 0, 0]) == 2


def test_every_region_of_a_prompt_counts(model: Any) -> None:
    """Two prompts side by side are two parts of the batch that serve the same image."""
    one, two, both = watch(), watch(), watch()
    tiny.sample(add_watch(model, one), tiny.cond(1), steps=1, cfg=1.0)
    tiny.sample(add_watch(model, two), tiny.cond(3), steps=1, cfg=1.0)
    tiny.sample(add_watch(model, both), tiny.cond(1) + tiny.cond(3), steps=1, cfg=1.0)
    key = ("input", 1, 0)
    (found,) = both.maps[key]
    torch.testing.assert_close(found, (one.maps[key][0] + two.maps[key][0]) / 2, rtol=1e-4, atol=1e-6)


def test_nothing_is_left_in_the_model(model: Any) -> None:
    saw = watch()
    watched = add_watch(model, saw)
    tiny.sample(watched, steps=1)
    options = watched.model_options["transformer_options"]
    assert options[WATCH] is saw and RUN not in options and WATCH not in model.model_options["transformer_options"]
    saw.close()
    assert not saw.maps


# --- heat ------------------------------------------------------------------------------------------------------------


def test_heat_is_the_mean_over_calls_and_blocks_of_the_phrase_found_most() -> None:
    saw = watch()
    saw.maps[("input", 1, 0)] = [torch.full((2, 1, 4, 4), 0.1), torch.full((2, 1, 4, 4), 0.3)]
    saw.maps[("middle", 0, 0)] = [torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 0.6)])] * 2
    torch.testing.assert_close(saw.heat(8, 8), torch.full((1, 8, 8), (0.2 + 0.6) / 2))


def test_a_hot_spot_stays_where_it_is() -> None:
    saw = watch()
    spot = torch.zeros(2, 1, 4, 4)
    spot[0, 0, 1, 3] = 1.0
    saw.maps[("input", 1, 0)] = [spot]
    heat = saw.heat(16, 16)[0]
    row, column = divmod(int(heat.argmax()), 16)
    assert (row // 4, column // 4) == (1, 3)


@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale: str) -> None:
    heat = torch.tensor([[[0.1, 0.3]], [[0.1, 0.2]]])
    expected = {"picture": [[0, 1], [0, 1]], "batch": [[0, 1], [0, 0.5]], "none": [[0.1, 0.3], [0.1, 0.2]]}[scale]
    torch.testing.assert_close(scaled(heat, scale)[:, 0], torch.tensor(expected, dtype=torch.float32))
    assert torch.isfinite(scaled(torch.zeros(1, 2, 2), scale)).all()


def test_colours_rise_with_the_heat() -> None:
    hot = painted(torch.linspace(0, 1, 50)[None, None])
    assert hot.shape == (1, 1, 50, 3) and hot.min() >= 0 and hot.max() <= 1
    brightness = hot[0, 0] @ torch.tensor([0.3, 0.6, 0.1])
    assert (brightness.diff() > 0).all() and not hot[0, 0, 0].any()
    picture = torch.rand(1, 1, 50, 4)
    over = painted(torch.zeros(1, 1, 50), picture)
    torch.testing.assert_close(over, 0.75 * picture[..., :3])


# --- the node --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_the_node_paints_every_picture(model: Any, batch: int) -> None:
    image, mask = look(model, batch)
    assert image.shape == (batch, 8 * tiny.SIZE, 8 * tiny.SIZE, 3) and mask.shape == image.shape[:3]
    assert float(mask.min()) >= 0 and float(mask.max()) <= 1 and mask.std() > 0.05
    again = look(model, batch)
    assert torch.equal(again[0], image) and torch.equal(again[1], mask)
    assert not torch.equal(look(model, batch, seed=1)[1], mask)


def test_the_map_lies_over_the_decoded_picture(model: Any) -> None:
    picture = torch.rand(1, 40, 24, 3)
    image, mask = look(model, 2, image=picture)
    assert image.shape == (2, 40, 24, 3) and torch.equal(image, painted(mask, picture))
    with pytest.raises(ValueError, match="ConceptGuardConceptMap: image has 3 pictures and latent 2"):
        look(model, 2, image=torch.rand(3, 40, 24, 3))


def test_each_noise_level_is_one_call_at_that_level(model: Any) -> None:
    sigmas: list[float] = []

    def spy(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sigmas.append(float(t[0]))
        assert args[3]["cond_or_uncond"] == [0]
        return executor(x, t, *args, **kwargs)

    spied = model.clone()
    spied.add_wrapper_with_key("apply_model", "spy", spy)
    look(spied, steps=3, start_percent=0.1, end_percent=0.7)
    sampling = model.get_model_object("model_sampling")
    assert sigmas == pytest.approx([sampling.percent_to_sigma(p) for p in (0.2, 0.4, 0.6)])


def test_levels_stay_inside_what_the_model_knows(model: Any) -> None:
    sampling = model.get_model_object("model_sampling")
    assert float(noise_levels(model, 0.0, 0.0, 1)) == pytest.approx(float(sampling.sigma_max))
    assert float(noise_levels(model, 1.0, 1.0, 1)) == pytest.approx(float(sampling.sigma_min))


def test_the_edits_of_the_model_are_looked_at_too(model: Any) -> None:
    assert not torch.equal(look(cre(model))[1], look(model)[1])


def test_a_prompt_for_a_part_is_asked_about_the_whole(model: Any) -> None:
    part = tiny.cond(1, area=(4, 4, 0, 0), mask=torch.ones(1, 8, 8), strength=1.0)
    torch.testing.assert_close(look(model, positive=part)[1], look(model)[1])


def test_a_prompt_that_plays_no_part(model: Any) -> None:
    with pytest.raises(ValueError, match="ConceptGuardConceptMap: the prompt plays no part at the noise levels"):
        look(model, positive=tiny.cond(1, start_percent=0.0, end_percent=0.1))


def test_an_interrupt_stops_it(model: Any) -> None:
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        look(model)
    assert torch.isfinite(look(model)[0]).all()


def test_it_says_how_far_it_is(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False)  # of newer hosts
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: seen.append((done, total)))
    look(model, steps=3)
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"concept": "knife"}, "concept is a str; connect the output of a Concept node"),
        ({"start_percent": 0.9, "end_percent": 0.1}, "start_percent 0.9 lies after"),
        ({"blocks": "input.77"}, 'blocks "input.77": this model has no cross-attention there'),
        ({"evidence": "much"}, "evidence is 'much'"),
        ({"scale": "much"}, "scale is 'much'; choose one of picture, batch, none"),
    ],
    ids=str,
)
def test_bad_input_is_named(model: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ConceptGuardConceptMap: {message}"):
        look(model, **inputs)
