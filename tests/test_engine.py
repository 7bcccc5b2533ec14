"""The engine with CRE, through the real host on tiny models."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import reference
import tiny
import torch
from torch import Tensor

from conceptguard.editing.edits.spec import Concept, EditSpec, Gate
from conceptguard.editing.engine import host as binding
from conceptguard.editing.engine.backbone import Backbone
from conceptguard.editing.engine.host import RUN, add_edit, edits_of
from conceptguard.editing.engine.run import EDITS, Run
from conceptguard.editing.methods.cre import CREOptions

PRINTED = CREOptions(width="full", tokens="all", baseline="none", negative="keep", solve="sum")


def cre(model: Any, concept: Concept | None = None, options: CREOptions = tiny.CRE, **inputs: Any) -> Any:
    return add_edit(model, EditSpec("projection", concept or tiny.concept(), options=options, node="Test", **inputs))


@pytest.fixture(scope="module")
def unedited(model: Any) -> Tensor:
    return tiny.sample(model)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weak references to every Run that is made."""
    made: list[Any] = []

    class Watched(Run):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(binding, "Run", Watched)
    return made


# --- equation 4 through the host -------------------------------------------------------------------------------------


def expected_output(
    seen: tiny.Recorder, key: Any, call: dict[str, Tensor], row: int, concepts: list[Concept], o: CREOptions
) -> Tensor:
    """What equation 4 makes of one row, from the q, k, v that the host computed and the block's weights."""
    heads = seen.heads(key)
    q, k, v = (call[name][row] for name in "qkv")

    def found(tokens: Tensor) -> Tensor:
        return reference.attention(q, seen.project(key, "k", tokens), seen.project(key, "v", tokens), heads)

    A = reference.attention(q, k, v, heads)
    phrases = [phrase for concept in concepts for phrase in concept.phrases]
    At = [found(p.tokens[0, list(p.own)] if o.tokens == "own" else p.tokens[0]) for p in phrases]
    A0 = found(concepts[0].baseline[0]) if o.baseline == "neutral" else None  # type: ignore[index]
    width = heads if o.width == "head" else 1
    keep = [[found(kept.tokens[0]) for kept in concept.keep] for concept in concepts for _ in concept.phrases]
    clip, joint = o.negative == "clip", o.solve == "joint"
    return reference.cre(A, At, [1.0] * len(At), width, clip, joint, A0, o.floor, keep)


@pytest.mark.parametrize("make", [tiny.sd1, tiny.sdxl])
@pytest.mark.parametrize("options", [PRINTED, tiny.CRE, CREOptions("head", "own", "neutral", "clip", "joint")], ids=str)
def test_the_conditional_rows_of_every_block_follow_equation_4(make: Any, options: CREOptions) -> None:
    model = make()
    concepts = [tiny.concept("knife", 100, phrases=2), tiny.concept("gun", 200, own=(1, 2, 5))]
    edited = model
    for concept in concepts:
        edited = cre(edited, concept, options)
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, batch=2, steps=1)
    for key, (call,) in seen.calls.items():
        assert call["out"].shape[0] == 4  # the negative's two images, then the positive's
        for row in range(4):
            chunk_of_positive = row >= 2
            if chunk_of_positive:
                expected = expected_output(seen, key, call, row, concepts[::-1], options)
            else:
                expected = reference.attention(*(call[name][row] for name in "qkv"), seen.heads(key))
            torch.testing.assert_close(call["out"][row].double(), expected, rtol=1e-3, atol=1e-3)


def test_kept_neighbours_of_any_length_in_every_block(model: Any) -> None:
    near = [phrase for seed in (300, 301) for phrase in tiny.concept("spoon", seed).phrases]
    near[1] = replace(near[1], tokens=near[1].tokens.repeat(1, 2, 1))
    concepts = [replace(tiny.concept("knife", 100, phrases=2), keep=tuple(near)), tiny.concept("gun", 200)]
    edited = model
    for concept in concepts:
        edited = cre(edited, concept)
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, cfg=1.0, steps=1)
    spared = 0
    for key, (call,) in seen.calls.items():
        expected = expected_output(seen, key, call, 0, concepts[::-1], tiny.CRE)
        torch.testing.assert_close(call["out"][0].double(), expected, rtol=1e-3, atol=1e-3)
        without = expected_output(seen, key, call, 0, [replace(c, keep=()) for c in concepts[::-1]], tiny.CRE)
        spared += int((without != expected).any(-1).sum())
    assert spared, "the neighbours kept nothing"


def test_the_printed_formula_to_full_precision(model: Any) -> None:
    with tiny.Recorder(model) as seen:
        tiny.sample(cre(model, options=PRINTED), cfg=1.0, steps=1)
    for key, (call,) in seen.calls.items():
        expected = expected_output(seen, key, call, 0, [tiny.concept()], PRINTED)
        torch.testing.assert_close(call["out"][0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_half_precision_models(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny.sd1(dtype)
    with tiny.Recorder(model) as seen:
        tiny.sample(cre(model, options=PRINTED), cfg=1.0, steps=1)
    for key, (call,) in seen.calls.items():
        assert call["out"].dtype == dtype
        expected = expected_output(seen, key, call, 0, [tiny.concept()], PRINTED)
        torch.testing.assert_close(call["out"][0].double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("blocks", ["middle", "input.3,output.1-2"])
def test_only_the_named_blocks_are_edited(model: Any, blocks: str) -> None:
    named = {"middle": {("middle", 0, 0)}, "input.3,output.1-2": {("input", 3, 0), ("output", 1, 0), ("output", 2, 0)}}
    with tiny.Recorder(model) as seen:
        tiny.sample(cre(model, blocks=blocks), cfg=1.0, steps=1)
    for key, (call,) in seen.calls.items():
        A = reference.attention(*(call[name][0] for name in "qkv"), seen.heads(key))
        assert (key in named[blocks]) == bool((A - call["out"][0]).abs().max() > 1e-3)


# --- when nothing is to be done, nothing is done ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        {"strength": 0.0},
        {"start_percent": 0.4, "end_percent": 0.4},
        {"start_percent": 0.0, "end_percent": 0.0},
        {"start_percent": 1.0, "end_percent": 1.0},
        {"gate": Gate((0.0,))},
        {"gate": Gate((0.0, 0.0, 0.0))},
    ],
    ids=str,
)
def test_an_inactive_edit_is_bit_identical_to_none(model: Any, inputs: dict[str, Any]) -> None:
    assert torch.equal(tiny.sample(cre(model, **inputs), batch=3), tiny.sample(model, batch=3))


def test_an_active_edit_changes_the_picture(model: Any, unedited: Tensor) -> None:
    assert (tiny.sample(cre(model)) - unedited).abs().max() > 1


def test_unconditional_rows_are_bit_identical(model: Any) -> None:
    with tiny.Recorder(model) as before:
        tiny.sample(model, batch=2, steps=1)
    with tiny.Recorder(model) as after:
        tiny.sample(cre(model), batch=2, steps=1)
    for key in before.calls:
        assert torch.equal(before.calls[key][0]["out"][:2], after.calls[key][0]["out"][:2])
        assert not torch.equal(before.calls[key][0]["out"][2:], after.calls[key][0]["out"][2:])


def test_a_gate_for_each_image(model: Any) -> None:
    """The image whose gate is closed must not notice that the others of its batch are edited."""
    plain, edited = (tiny.sample(m, batch=3) for m in (model, cre(model, gate=Gate((1.0, 0.0, 1.0)))))
    assert torch.equal(plain[1], edited[1])
    assert not torch.equal(plain[0], edited[0]) and not torch.equal(plain[2], edited[2])
    torch.testing.assert_close(edited[[0, 2]], tiny.sample(cre(model), batch=3)[[0, 2]], rtol=1e-3, atol=1e-2)


def test_a_closed_gate_of_one_concept_leaves_the_other_as_if_alone(model: Any) -> None:
    knife, gun = tiny.concept("knife", 100), tiny.concept("gun", 200)
    alone = tiny.sample(cre(model, knife), batch=2)
    both = tiny.sample(cre(cre(model, knife), gun, gate=Gate((0.0, 1.0))), batch=2)
    torch.testing.assert_close(both[0], alone[0], rtol=1e-3, atol=1e-2)
    assert (both[1] - alone[1]).abs().max() > 1


def test_a_gate_multiplies_the_strength(model: Any) -> None:
    assert torch.equal(tiny.sample(cre(model, gate=Gate((0.5,)))), tiny.sample(cre(model, strength=0.5)))


def test_a_gate_for_another_number_of_images_is_an_error(model: Any) -> None:
    with pytest.raises(ValueError, match="Test: the gate decided about 2 images, but 3 are being sampled"):
        tiny.sample(cre(model, gate=Gate((1.0, 0.0))), batch=3)


# --- the window ------------------------------------------------------------------------------------------------------


def steps_edited(
    model: Any, start: float, end: float, steps: int = 20, scheduler: str = "normal", then: Any = lambda model: model
) -> list[int]:
    """The model calls in which the middle block's output is not plain attention; `then` is a node behind ours."""
    edited = then(cre(model, options=PRINTED, start_percent=start, end_percent=end, blocks="middle"))
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, cfg=1.0, steps=steps, scheduler=scheduler)
    key = ("middle", 0, 0)
    plain = [reference.attention(*(call[name][0] for name in "qkv"), seen.heads(key)) for call in seen.calls[key]]
    changed = [(call["out"][0] - A).abs().max() > 1e-4 for call, A in zip(seen.calls[key], plain, strict=True)]
    return [i for i, different in enumerate(changed) if different]


def steps_within(model: Any, start: float, end: float) -> list[int]:
    """Those of 20 steps whose noise level the window's definition holds."""
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 20)[:-1].tolist()
    high, low = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    return [i for i, sigma in enumerate(sigmas) if low < sigma <= high]


@pytest.mark.parametrize(
    ("start", "end"), [(0.0, 1.0), (0.0, 0.3), (0.3, 1.0), (0.3, 0.6), (0.0, 0.001), (0.999, 1.0), (0.95, 1.0)]
)
def test_the_window_holds_the_steps_whose_noise_lies_within(model: Any, start: float, end: float) -> None:
    assert steps_edited(model, start, end) == steps_within(model, start, end)


def test_windows_that_meet_share_no_step_and_miss_none(model: Any) -> None:
    early, late = steps_edited(model, 0.0, 0.45), steps_edited(model, 0.45, 1.0)
    assert early + late == list(range(20)) and early and late


def test_the_first_and_the_last_step_belong_to_the_whole_window(model: Any) -> None:
    for scheduler in ("karras", "sgm_uniform"):
        assert steps_edited(model, 0.0, 1.0, steps=4, scheduler=scheduler) == [0, 1, 2, 3]


def test_percents_are_read_with_the_sampling_that_is_used(model: Any) -> None:
    """A node behind ours may change the noise levels: percents become sigmas only when sampling starts."""

    class Louder(type(model.get_model_object("model_sampling"))):  # type: ignore[misc]
        def percent_to_sigma(self, percent: float) -> float:
            return 3.0 * super().percent_to_sigma(percent)

    def louder(model: Any) -> Any:
        model = model.clone()
        model.add_object_patch("model_sampling", Louder(model.model.model_config))
        return model

    assert steps_edited(model, 0.2, 0.7, then=louder) == steps_within(louder(model), 0.2, 0.7)
    assert steps_within(louder(model), 0.2, 0.7) != steps_within(model, 0.2, 0.7)


def test_sampling_in_two_parts_equals_sampling_at_once(model: Any) -> None:
    """KSamplerAdvanced's way: the second part starts in the middle of the schedule."""
    import comfy.sample

    edited = cre(model, start_percent=0.2, end_percent=0.7)
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, tiny.SIZE, tiny.SIZE), 5)

    def part(latent: Tensor, noise: Tensor, **steps: Any) -> Tensor:
        return comfy.sample.sample(
            edited, noise, 6, 4.0, "euler", "normal", tiny.cond(1), tiny.cond(2), latent, disable_pbar=True, **steps
        )

    whole = part(torch.zeros_like(noise), noise)
    first = part(torch.zeros_like(noise), noise, start_step=0, last_step=3)
    second = part(first, torch.zeros_like(noise), disable_noise=True, start_step=3, last_step=6)
    torch.testing.assert_close(second, whole, rtol=1e-3, atol=1e-2)


# --- batches, prompts, samplers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_every_image_of_a_batch_is_edited_as_if_alone(model: Any, batch: int) -> None:
    import comfy.sample

    edited, latent = cre(model), torch.zeros(batch, 4, tiny.SIZE, tiny.SIZE)
    noise = comfy.sample.prepare_noise(latent, 5)

    def run(noise: Tensor) -> Tensor:
        return comfy.sample.sample(
            edited,
            noise,
            2,
            4.0,
            "euler",
            "normal",
            tiny.cond(1),
            tiny.cond(2),
            torch.zeros_like(noise),
            disable_pbar=True,
        )

    together = run(noise)
    for i in range(batch):
        torch.testing.assert_close(together[i : i + 1], run(noise[i : i + 1]), rtol=1e-3, atol=1e-2)


def test_without_guidance_the_conditional_part_alone_is_edited(model: Any) -> None:
    assert not torch.equal(tiny.sample(cre(model), cfg=1.0), tiny.sample(model, cfg=1.0))


@pytest.mark.parametrize("positive", [77, 154, 231])
@pytest.mark.parametrize("negative", [77, 154, 231])
def test_prompts_of_any_length(model: Any, positive: int, negative: int) -> None:
    """However the host batches prompts of different lengths, the positive one's edit is the same as alone."""
    edited = cre(model, options=PRINTED)
    one, two = tiny.cond(1, positive), tiny.cond(2, negative)
    with tiny.Recorder(model) as alone:
        tiny.sample(edited, one, two, cfg=1.0, steps=1)
    with tiny.Recorder(model) as beside:
        tiny.sample(edited, one, two, steps=1)
    first = ("input", 1, 0)  # the deeper blocks read what the first one wrote
    expected = alone.calls[first][0]["out"][0]
    rows = [row for call in beside.calls[first] for row in call["out"]]  # in one call or two, in the host's order
    nearest = min(rows, key=lambda row: (row - expected).abs().max())
    torch.testing.assert_close(nearest, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [77, 154])
def test_a_concept_of_two_pieces_of_prompt(model: Any, length: int) -> None:
    long = Concept(
        "long", (tiny.concept(seed=300).phrases[0], tiny.Phrase("x", tiny.tokens(301, 154), (1,))), tiny.tokens(7)
    )
    with tiny.Recorder(model) as seen:
        tiny.sample(cre(model, long), tiny.cond(1, length), cfg=1.0, steps=1)
    for key, (call,) in seen.calls.items():
        expected = expected_output(seen, key, call, 0, [long], tiny.CRE)
        torch.testing.assert_close(call["out"][0].double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "euler_ancestral", "dpmpp_2m", "uni_pc", "lcm"])
def test_samplers_that_call_between_the_steps(model: Any, sampler: str) -> None:
    result = tiny.sample(cre(model, start_percent=0.2, end_percent=0.8), steps=4, sampler=sampler)
    assert torch.isfinite(result).all()
    assert not torch.equal(result, tiny.sample(model, steps=4, sampler=sampler))


# --- order, repetition, sharing --------------------------------------------------------------------------------------


def test_two_runs_are_equal(model: Any) -> None:
    edited = cre(model)
    assert torch.equal(tiny.sample(edited), tiny.sample(edited))


def test_the_order_of_nodes_changes_no_bit(model: Any) -> None:
    import itertools

    edits: list[dict[str, Any]] = [
        {"concept": tiny.concept("knife", 100), "strength": 0.8, "end_percent": 0.7},
        {"concept": tiny.concept("gun", 200, phrases=2), "start_percent": 0.1},
        {"concept": tiny.concept("gun", 300), "options": PRINTED, "blocks": "output"},
    ]
    pictures = []
    for order in itertools.permutations(edits):
        edited = model
        for edit in order:
            edited = cre(edited, **edit)
        pictures.append(tiny.sample(edited))
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)


def test_concepts_with_other_readings_are_removed_from_the_same_output(model: Any) -> None:
    """Two groups: each takes its part from the original A, and the parts add up."""
    knife, gun, sum_, head = (
        tiny.concept("knife", 100),
        tiny.concept("gun", 200),
        PRINTED,
        CREOptions("head", "all", "none", "keep", "sum"),
    )
    with tiny.Recorder(model) as seen:
        tiny.sample(cre(cre(model, knife, sum_, strength=0.5), gun, head), cfg=1.0, steps=1)
    for key, (call,) in seen.calls.items():
        A = reference.attention(*(call[name][0] for name in "qkv"), seen.heads(key))
        one = expected_output(seen, key, call, 0, [knife], sum_)
        two = expected_output(seen, key, call, 0, [gun], head)
        torch.testing.assert_close(call["out"][0].double(), A + 0.5 * (one - A) + (two - A), rtol=1e-3, atol=1e-4)


def test_the_model_that_came_in_stays_unedited(model: Any, unedited: Tensor) -> None:
    edited = cre(model)
    assert edits_of(model) == () and len(edits_of(edited)) == 1
    assert not model.get_all_wrappers("outer_sample")
    tiny.sample(edited)
    assert torch.equal(tiny.sample(model), unedited)


def test_clones_share_the_concept(model: Any) -> None:
    edited = cre(model)
    clone = edited.clone().clone()
    assert edits_of(clone)[0] is edits_of(edited)[0]
    assert clone.model_options["transformer_options"][EDITS] is not edited.model_options["transformer_options"][EDITS]
    assert torch.equal(tiny.sample(clone), tiny.sample(edited))


def test_a_copy_of_the_options_of_a_run_copies_no_model(model: Any, runs: list[Any]) -> None:
    """Samplers that deep-copy model_options in mid-run must not copy the weights that the run knows."""
    copies: list[Any] = []

    def copying(executor: Any, *args: Any, **kwargs: Any) -> Any:
        copies.append(copy.deepcopy(args[5]))
        return executor(*args, **kwargs)

    edited = cre(model)
    edited.add_wrapper_with_key("apply_model", "copying", copying)
    tiny.sample(edited, steps=1)
    assert copies[0][RUN] is runs[0]()


def test_wrappers_are_registered_once(model: Any) -> None:
    twice = cre(cre(model), tiny.concept("gun", 200))
    for kind in binding.WRAPPERS:
        assert len(twice.get_wrappers(kind, EDITS)) == 1


# --- what is left behind ---------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_nothing_is_left_after_a_run(model: Any, runs: list[Any]) -> None:
    edited = cre(model)
    before = str(edited.model_options)
    tiny.sample(edited)
    gc.collect()
    assert len(runs) == 1 and runs[0]() is None
    assert str(edited.model_options) == before


def test_nothing_is_left_after_an_exception(model: Any, runs: list[Any], unedited: Tensor) -> None:
    edited = cre(model)
    expected = tiny.sample(edited, steps=3)
    options: list[dict[str, Any]] = []
    alive: list[Run] = []

    def spy(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options.append(executor.class_obj.model_options["transformer_options"])
        return executor(*args, **kwargs)

    def stop(step: int, *_: Any) -> None:
        if step == 1:
            alive.append(options[0][RUN])
            assert alive[0].plans
            raise Stop

    watched = edited.clone()
    watched.add_wrapper_with_key("outer_sample", "spy", spy)
    with pytest.raises(Stop):
        tiny.sample(watched, steps=3, callback=stop)
    assert RUN not in options[0]
    run = alive.pop()
    assert not run.plans and not hasattr(run, "hooks")  # whoever still holds the run holds no tensor
    del run
    gc.collect()
    assert [each() for each in runs] == [None, None]
    assert torch.equal(tiny.sample(edited, steps=3), expected)
    assert torch.equal(tiny.sample(model), unedited)


def test_a_run_within_a_run(model: Any) -> None:
    """Another sampling started from a step's callback, as previews and detailers do."""
    edited, other = cre(model), cre(tiny.sdxl(), tiny.concept("gun", 200))
    expected, inner = tiny.sample(edited, steps=3), []
    result = tiny.sample(edited, steps=3, callback=lambda *_: inner.append(tiny.sample(other)))
    assert torch.equal(result, expected)
    assert all(torch.equal(one, tiny.sample(other)) for one in inner)


def test_patches_are_the_same_functions_at_every_step(model: Any) -> None:
    """torch.compile takes another function for other code and compiles again."""
    seen: list[Any] = []

    def spy(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(args[5]["patches_replace"]["attn2"])
        return executor(*args, **kwargs)

    edited = cre(model)
    edited.add_wrapper_with_key("apply_model", "spy", spy)
    tiny.sample(edited, steps=3)
    assert len(seen) == 3 and all(seen[0][key] is step[key] for step in seen for key in tiny.SD1_BLOCKS)


def test_an_edit_is_active_from_its_start_to_just_before_its_end() -> None:
    """sigma(end) < sigma <= sigma(start), at the very noise levels of the percents."""

    class Bare(Backbone):
        def hooks(self, run: Run) -> Any:
            return None

    block: Any = None
    run = Run(Bare("x", tiny.WIDTH, {("middle", 0, 0): block}), lambda percent: 10 - 10 * percent)
    spec = EditSpec("projection", tiny.concept(), start_percent=0.2, end_percent=0.5, options=tiny.CRE)
    assert [bool(run.active([spec], sigma)) for sigma in (8.1, 8.0, 7.9, 5.1, 5.0, 4.9)] == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_model_that_was_sampled_goes_with_its_last_reference(model: Any) -> None:
    """Not only when Python looks for circles: the host would take its network for a leak, and look for circles itself
    whenever it loads a model."""
    edited = cre(model)
    tiny.sample(edited)
    there = weakref.ref(edited)
    gc.collect()
    gc.disable()
    try:
        tiny.sample(edited)
        del edited
        assert there() is None
    finally:
        gc.enable()
    assert not [loaded for loaded in comfy.model_management.current_loaded_models if loaded.is_dead()]
