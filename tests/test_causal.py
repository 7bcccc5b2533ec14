"""The search for causal periods: its algorithms on artificial confidences, and the node on a tiny model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conceptguard.editing.causal import kept as cache
from conceptguard.editing.causal.search import (
    MEMORYLESS,
    Period,
    Prefixes,
    assess_with_exclusion,
    bisect,
    edges,
    is_causal,
    naive_calls,
)
from conceptguard.editing.edits.spec import EditSpec, Gate, InFlight
from conceptguard.editing.engine.host import add_edit, settled
from conceptguard.editing.methods.cre import DEFAULTS
from conceptguard.nodes import progress
from conceptguard.nodes.causal_period import ConceptGuardCausalPeriod

T = 10


def needs(start: int, end: int) -> Callable[[int, int], float]:
    """The confidence in a concept that comes into being in the steps start..end-1 alone."""
    return lambda a, b: 1 - max(0, min(b, end) - max(a, start)) / (end - start)


# --- the algorithms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [assess_with_exclusion, bisect])
def test_the_period_in_which_a_concept_comes_into_being(search: Any) -> None:
    for start, end in itertools.combinations(range(T + 1), 2):
        f = needs(start, end)
        found = search(f, T)
        assert (found.start, found.end) == (start, end)
        assert is_causal(f, found.start, found.end, T)


def printed(f: Callable[[int, int], float]) -> tuple[int, int, int]:
    """Algorithm 1 as it is printed, t from T down and te from 1 up, at delta = 0; and the runs it takes."""
    runs = 0

    def G(t_s: int, t_e: int) -> float:
        nonlocal runs
        runs += 1
        return f(T - t_s, T - t_e + 1)

    t_s, t_e = T, 1
    for t in range(T, 0, -1):
        if G(t, t_e) <= G(t_s, t_e):
            t_s = t
        else:
            break
    for t in range(1, t_s + 1):
        if G(t_s, t) <= G(t_s, t_e):
            t_e = t
        else:
            break
    return T - t_s, T - t_e + 1, runs


@given(st.lists(st.floats(0, 1), min_size=T * (T + 1) // 2, max_size=T * (T + 1) // 2))
def test_exclusion_is_algorithm_1(values: list[float]) -> None:
    table = dict(zip(((a, b) for a in range(T) for b in range(a + 1, T + 1)), values, strict=True))

    def f(a: int, b: int) -> float:
        return table[a, b]

    found = assess_with_exclusion(f, T)
    start, end, runs = printed(f)
    assert (found.start, found.end) == (start, end)
    assert len(set(found.probes)) == len(found.probes) and naive_calls(found.probes, T, literal=True) <= runs * T


@given(st.integers(0, T - 1), st.integers(1, T), st.floats(0, 0.3))
def test_a_delta_only_shortens(start: int, length: int, delta: float) -> None:
    f = needs(start, min(T, start + length))
    for search in (assess_with_exclusion, bisect):
        plain, loose = search(f, T), search(f, T, delta)
        assert loose.end - loose.start <= plain.end - plain.start


def test_definition_2_by_brute_force() -> None:
    f = needs(3, 6)
    causal = {(a, b) for a in range(T) for b in range(a + 1, T + 1) if is_causal(f, a, b, T)}
    assert (3, 6) in causal and not any(is_causal(f, a, b, T, 0.01) for a, b in [(0, 3), (4, 7), (2, 6)])


def whole_runs(a: int, b: int, steps: int) -> list[str]:
    return ["#" if a <= i < b else "-" for i in range(steps)]


@pytest.mark.parametrize("search", [assess_with_exclusion, bisect])
@pytest.mark.parametrize(("start", "end"), [(1, 22), (3, 19), (1, 21), (4, 28), (0, 50), (0, 1)])
def test_shared_steps_give_the_same_runs_for_fewer_calls(search: Any, start: int, end: int) -> None:
    """The paper's own periods, of 50 steps."""
    steps = 50

    def go_on(x: Any, i: int, window: tuple[int, int]) -> list[Any]:
        done, out = list(x), []
        for step in range(i, steps):
            done = [*done, "#" if window[0] <= step < window[1] else "-"]
            out.append(done)
        return out

    prefixes, f = Prefixes(go_on, [], steps), needs(start, end)  # type: ignore[arg-type]

    def confidence(a: int, b: int) -> float:
        assert prefixes.run(a, b) == whole_runs(a, b, steps)
        return f(a, b)

    found = search(confidence, steps)
    exact = assess_with_exclusion(f, steps)
    assert (found.start, found.end) == (exact.start, exact.end) == (start, end)
    if start > 0 and end < steps:  # where there is nothing to leave out there is nothing to share
        share = prefixes.calls / naive_calls(exact.probes, steps, literal=True)
        assert share < (0.17 if search is bisect else 0.22)


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.0), (0.65, 0.0), (0.25, 0.25), (0.35, 0.05)])
def test_what_an_exact_search_costs(p: float, q: float) -> None:
    """The share of the printed algorithm's model calls that its docstring says."""
    steps = 200
    prefixes = Prefixes(lambda x, i, window: [x] * (steps - i), torch.zeros(1), steps)
    f = needs(round(p * steps), round((1 - q) * steps))

    def confidence(a: int, b: int) -> float:
        prefixes.run(a, b)
        return f(a, b)

    found = assess_with_exclusion(confidence, steps)
    share = prefixes.calls / naive_calls(found.probes, steps, literal=True)
    assert share == pytest.approx((p - p**2 / 2 + q**2 / 2) / (2 * (p + q)), abs=0.01)


# --- percents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["normal", "karras", "exponential", "sgm_uniform", "beta"])
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_edges_part_the_steps_as_the_engine_does(scheduler: str, steps: int) -> None:
    sampling = tiny.sd1().get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps).tolist()
    percents = edges(sigmas, sampling.percent_to_sigma)
    assert percents[0] == 0 and percents[-1] == 1 and percents == sorted(percents) and len(percents) == steps + 1
    for a, b in itertools.combinations(range(0, steps + 1, max(1, steps // 5)), 2):
        high, low = sampling.percent_to_sigma(percents[a]), sampling.percent_to_sigma(percents[b])
        assert [i for i, sigma in enumerate(sigmas[:-1]) if low < sigma <= high] == list(range(a, b))


# --- the node --------------------------------------------------------------------------------------------------------


class Vae:
    """Hands latents through as pictures."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].movedim(1, -1)


class Told:
    """Says how far a picture is from the unedited one: the concept is there where they are alike."""

    name, key, models = "told", "told", ()

    def __init__(self, answer: Callable[[Tensor], list[float]]) -> None:
        self.answer, self.seen = answer, 0

    def scores(self, images: Tensor) -> list[float]:
        self.seen += 1
        return self.answer(images)


@pytest.fixture(autouse=True)
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    return tmp_path


STEPS = 5


def search(model: Any, judge: Any, batch: int = 2, **inputs: Any) -> Any:
    given = dict(positive=tiny.cond(1), seed=5, steps=STEPS, cfg=4.0, sampler_name="euler", scheduler="normal")
    return ConceptGuardCausalPeriod.execute(
        model=model,
        concept=tiny.concept(),
        discriminator=judge,
        negative=tiny.cond(2),
        vae=Vae(),
        latent={"samples": torch.zeros(batch, 4, tiny.SIZE, tiny.SIZE)},
        **{**given, **inputs},
    )


def pictures(model: Any, percents: list[float], a: int, b: int, sampler: str, strength: float = 1.0) -> Tensor:
    """The same window, by the edit node's own means."""
    spec = EditSpec("projection", tiny.concept(), strength, percents[a], percents[b], options=DEFAULTS)
    return Vae().decode(tiny.sample(add_edit(model, spec), batch=2, steps=STEPS, sampler=sampler))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun", "euler_ancestral", "dpmpp_2m"])
def test_it_judges_the_very_pictures_that_the_window_makes(model: Any, sampler: str) -> None:
    shown: list[Tensor] = []

    def answer(images: Tensor) -> list[float]:
        shown.append(images.clone())
        a, b = len(shown), STEPS
        return [min(1.0, 0.1 * (a > 2) + 0.0 * b)] * len(images)

    out = search(model, Told(answer), sampler_name=sampler, strength=1.5)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS).tolist()
    percents = edges(sigmas, sampling.percent_to_sigma)
    windows = [(0, 5), (1, 5), (2, 5), (1, 4)]  # the third raises the confidence, and so does leaving out the last
    assert len(shown) == len(windows)
    for images, (a, b) in zip(shown, windows, strict=True):
        assert torch.equal(images, pictures(model, percents, a, b, sampler, 1.5)), (sampler, a, b)
    assert out.args[0] == (percents[1], percents[5]) == out.args[1:3]
    assert out.ui["concept_guard_range"] == [percents[1], percents[5]], "what the range bars of the page shade"


@pytest.mark.slow
def test_a_naive_search_finds_the_same_with_more_calls(model: Any) -> None:
    """Counted in the model itself, with a discriminator that measures how much of the edit is there."""
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS).tolist()
    percents = edges(sigmas, sampling.percent_to_sigma)
    full = pictures(model, percents, 0, STEPS, "euler")

    def answer(images: Tensor) -> list[float]:
        return (1 - torch.exp(-(images - full).abs().mean((1, 2, 3)))).tolist()

    def naive(a: int, b: int) -> float:
        scores = answer(pictures(model, percents, a, b, "euler"))
        return sum(scores) / len(scores)

    calls = 0
    forward = model.model.diffusion_model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    model.model.diffusion_model.forward = counted
    try:
        for delta in (0.0, 0.2, 0.5):
            calls = 0
            expected = assess_with_exclusion(naive, STEPS, delta)
            of_naive, calls = calls, 0
            out = search(model, Told(answer), delta=delta)
            assert out.args[1:3] == (percents[expected.start], percents[expected.end])
            assert of_naive == naive_calls(expected.probes, STEPS) and calls < of_naive
    finally:
        model.model.diffusion_model.forward = forward


def test_prompts_are_searched_in_pictures_of_their_own(model: Any) -> None:
    shown: list[Tensor] = []

    def answer(images: Tensor) -> list[float]:
        shown.append(images.clone())
        return [0.5] * len(images)

    search(model, Told(answer), positive=tiny.cond(1) + tiny.cond(3), steps=2)
    assert shown[0].shape[0] == 4  # two seeds of two prompts
    spec = EditSpec("projection", tiny.concept(), options=DEFAULTS)
    for i, seed in ((0, 1), (1, 3)):
        alone = Vae().decode(tiny.sample(add_edit(model, spec), tiny.cond(seed), batch=2, steps=2))
        torch.testing.assert_close(shown[0][i::2], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_what_was_found_is_kept_in_a_file(model: Any, own_files: Path) -> None:
    judge = Told(lambda images: [0.5] * len(images))
    first = search(model, judge)
    seen = judge.seen
    again = search(model, judge)
    assert judge.seen == seen and again.args[:3] == first.args[:3] and torch.equal(again.args[3], first.args[3])
    (file,) = (own_files / "concept_guard" / "causal-periods").iterdir()
    for change in (
        {"seed": 6},
        {"delta": 0.1},
        {"cfg": 3.0},
        {"scheduler": "karras"},
        {"positive": tiny.cond(4)},
        {"search": "bisection"},
        {"strength": 2.0},
        {"batch": 1},
    ):
        before = judge.seen
        search(model, judge, **change)  # type: ignore[arg-type]
        assert judge.seen > before, change
    file.write_text("[" * 5000)
    before = judge.seen
    search(model, judge)
    assert judge.seen > before  # a damaged file is searched for again


def test_a_model_that_others_had_a_part_in_is_never_taken_for_another() -> None:
    assert settled(tiny.sd1()) == settled(tiny.sd1()) != settled(tiny.sd1(seed=1))
    patched = tiny.sd1()
    patched.set_model_attn2_patch(lambda *args: args)
    assert settled(patched) is None


def test_a_period_of_the_plain_model_is_not_given_to_one_with_a_lora(model: Any, own_files: Path) -> None:
    judge = Told(lambda images: [0.5] * len(images))
    search(model, judge)
    lora = model.clone()
    name = next(n for n in model.model.state_dict() if n.endswith("attn2.to_k.weight"))
    lora.add_patches({name: ("diff", (torch.ones_like(model.model.state_dict()[name]),))})
    assert settled(lora) is None
    seen = judge.seen
    search(lora, judge)
    assert judge.seen > seen, "it was searched for anew"
    assert len(list((own_files / "concept_guard" / "causal-periods").iterdir())) == 1, "and not kept"
    lora.unpatch_model()


@pytest.mark.parametrize(
    "held",
    [
        {},
        {"start": 0},
        {"start": 3, "end": 2, "steps": 5, "probes": []},
        {"start": 0, "end": 5, "steps": 5, "probes": [[0, 5, "x"]]},
        {"start": 0, "end": 9, "steps": 9, "probes": []},
    ],
)
def test_files_that_hold_no_period(tmp_path: Path, held: Any) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(held))
    assert cache.read(file, 5) is None
    cache.write(file, Period(1, 4, 5, ((0, 5, 0.25), (1, 4, 0.5))))
    assert cache.read(file, 5) == Period(1, 4, 5, ((0, 5, 0.25), (1, 4, 0.5)))
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_an_interrupt_stops_it_and_leaves_nothing(model: Any, own_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    monkeypatch.setattr(progress.comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(Stop):
        search(model, Told(lambda images: [0.5] * len(images)))
    assert not (own_files / "concept_guard").exists()


def test_the_model_that_comes_in_stays_as_it_was(model: Any) -> None:
    before = tiny.sample(model)
    out = search(model, Told(lambda images: [0.5] * len(images)))
    assert torch.equal(tiny.sample(model), before)
    assert out.args[3].shape[0] == 1 and out.args[3].shape[-1] == 3 and 0 <= out.args[3].min() <= out.args[3].max() <= 1


def test_bad_inputs_name_the_mend(model: Any) -> None:
    judge = Told(lambda images: [0.5] * len(images))
    gated = add_edit(
        model,
        EditSpec(
            "projection", tiny.concept(), options=DEFAULTS, gate=Gate(inflight=InFlight("x", lambda *_: [0.0], 0.3))
        ),
    )
    for change, message in [
        ({"discriminator": 3}, "discriminator is a int, which does not look at pictures"),
        ({"concept": "knife"}, "concept is a str; connect the output of a Concept node"),
        ({"search": "guess"}, "search is 'guess'; choose one of exclusion, bisection"),
        ({"model": gated}, "model carries an edit whose gate decides in flight"),
        ({"positive": tiny.cond(1) + tiny.cond(2, 154)}, "positive joins prompts of unlike length"),
    ]:
        inputs: dict[str, Any] = dict(
            model=model,
            concept=tiny.concept(),
            discriminator=judge,
            positive=tiny.cond(1),
            negative=tiny.cond(2),
            vae=Vae(),
            latent={"samples": torch.zeros(1, 4, 8, 8)},
            seed=0,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
        )
        with pytest.raises(ValueError, match=f"ConceptGuardCausalPeriod: {message}"):
            ConceptGuardCausalPeriod.execute(**{**inputs, **change})
    assert "euler" in MEMORYLESS
