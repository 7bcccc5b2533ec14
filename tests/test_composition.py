"""Our nodes in every order, beside each other and beside what other packs and the host do to a model (foreign.py)."""

from __future__ import annotations

import inspect
import itertools
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers
import foreign
import pytest
import tiny
import torch
from torch import Tensor

from conceptguard.editing.edits.spec import Gate
from conceptguard.editing.methods import eiup_weight as adapters
from conceptguard.nodes.cre import ConceptGuardCRE
from conceptguard.nodes.eiup import ConceptGuardEIUP

pytestmark = pytest.mark.slow

Node = Callable[[Any], Any]


def cre(seed: int = 100, **inputs: Any) -> Node:
    inputs = {"floor": 0.0, **inputs}  # random weights find nothing alike
    return lambda model: ConceptGuardCRE.execute(model, tiny.concept(f"c{seed}", seed), **inputs).args[0]


def eiup(seed: int = 300, **inputs: Any) -> Node:
    concept = tiny.concept(f"e{seed}", seed, phrases=2)
    return lambda model: ConceptGuardEIUP.execute(model, concept, **inputs).args[0]


OURS: dict[str, Node] = {
    "CRE": cre(100),
    "CRE of another concept": cre(200, strength=0.7, end_percent=0.6),
    "EIUP": eiup(300),
    "EIUP joint": eiup(400, form="joint", weights="-1\n-0.5"),
    "EIUP with evidence": eiup(500, evidence="share", blocks="output"),
}
THREE = [OURS["CRE"], OURS["EIUP"], OURS["EIUP joint"]]


def chain(model: Any, nodes: Sequence[Node]) -> Any:
    for node in nodes:
        model = node(model)
    return model


def all_equal(pictures: Sequence[Tensor]) -> bool:
    return all(torch.equal(picture, pictures[0]) for picture in pictures)


# --- our own ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [*itertools.combinations(OURS, 2), tuple(OURS)], ids=" + ".join)
def test_any_order_of_our_nodes_gives_the_same_bits(model: Any, names: tuple[str, ...]) -> None:
    """The engine sorts edits, so that two orders of each pair, and all five turned about, are every case there is."""
    nodes = [OURS[name] for name in names]
    pictures = [tiny.sample(chain(model, order)) for order in (nodes, nodes[::-1], nodes[2:] + nodes[:2])]
    assert all_equal(pictures)
    for left_out in range(len(names)):
        fewer = [OURS[name] for i, name in enumerate(names) if i != left_out]
        assert not torch.equal(pictures[0], tiny.sample(chain(model, fewer))), f"{names[left_out]} does nothing"


@pytest.mark.parametrize("names", list(itertools.combinations(OURS, 2)), ids=" + ".join)
def test_and_on_sdxl(names: tuple[str, ...]) -> None:
    xl = tiny.sdxl()
    orders = itertools.permutations([OURS[name] for name in names])
    assert all_equal([tiny.sample(chain(xl, order), steps=1) for order in orders])


def test_gates_and_windows_compose_in_any_order(model: Any) -> None:
    nodes = [cre(100, gate=Gate((1.0, 0.0)), end_percent=0.5), eiup(300, gate=Gate((0.0, 1.0)), start_percent=0.3)]
    pictures = [tiny.sample(chain(model, order), batch=2, steps=4) for order in itertools.permutations(nodes)]
    assert all_equal(pictures)
    for image, alone in enumerate(nodes):
        expected = tiny.sample(alone(model), batch=2, steps=4)[image]
        torch.testing.assert_close(pictures[0][image], expected, rtol=1e-3, atol=1e-2)


# --- packs that patch the model --------------------------------------------------------------------------------------


def pag(model: Any) -> Any:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, 3.0).args[0]


def slg(model: Any) -> Any:
    """Skips layers of DiTs, which this model has not; its further model call goes through our wrapper all the same."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "0", "0").args[0]


FOREIGN: dict[str, Node] = {
    "IPAdapter": foreign.ip_adapter,
    "IPAdapter in the block's slot": lambda model: foreign.ip_adapter(model, transformer=False),
    "attention couple": foreign.couple,
    "normalised attention guidance": foreign.nag,
    "a longer context": foreign.longer_context,
    "FreeU": foreign.free_u,
    "LoRA": foreign.lora,
    "perturbed attention guidance": pag,
    "skip layer guidance": slg,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_pack_in_every_place(model: Any, name: str) -> None:
    """It in each place among three of our nodes; their own order is held above."""
    other = FOREIGN[name]
    orders = [[*THREE[:i], other, *THREE[i:]] for i in range(4)]
    pictures = [tiny.sample(chain(model, order), batch=2) for order in orders]
    assert torch.isfinite(pictures[0]).all() and all_equal(pictures)
    assert not torch.equal(pictures[0], tiny.sample(other(model), batch=2)), "our edits do nothing"
    if name != "skip layer guidance":
        assert not torch.equal(pictures[0], tiny.sample(chain(model, THREE), batch=2)), f"{name} does nothing"


@pytest.mark.parametrize(
    ("name", "ours"), [*((name, "CRE") for name in FOREIGN), *(("IPAdapter", ours) for ours in list(OURS)[1:])]
)
def test_an_edit_that_is_off_leaves_the_other_pack_its_bits(model: Any, name: str, ours: str) -> None:
    other, off = FOREIGN[name], eiup(weight=0.0) if ours == "EIUP" else None
    off = off or {"CRE": cre(strength=0.0), "CRE of another concept": cre(end_percent=0.0)}.get(ours)
    off = off or eiup(gate=Gate((0.0,)), form="joint" if "joint" in ours else "separate")
    expected = tiny.sample(other(model), steps=1)
    assert all_equal([expected, tiny.sample(off(other(model)), steps=1), tiny.sample(other(off(model)), steps=1)])


def test_two_other_packs_at_once(model: Any) -> None:
    """IPAdapter in the slots, attention couple around them, and ours among them."""
    packs, ours = [foreign.ip_adapter, foreign.couple], [OURS["CRE"], OURS["EIUP"]]
    for two in (packs, packs[::-1]):
        orders = [[*two, *ours], [*ours, *two], [two[0], ours[0], two[1], ours[1]], [ours[0], *two, ours[1]]]
        pictures = [tiny.sample(chain(model, order), batch=2) for order in orders]
        assert all_equal(pictures)


def test_every_row_of_the_positive_is_edited_beside_attention_couple(model: Any) -> None:
    def rows(m: Any) -> Tensor:
        with tiny.Recorder(model) as seen:
            tiny.sample(m, batch=2, steps=1)
        return seen.calls["input", 1, 0][0]["out"]

    for edit in (OURS["EIUP"], OURS["EIUP joint"]):
        before, after = rows(foreign.couple(model)), rows(foreign.couple(edit(model)))
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, *[False] * 4]


BLOCK = "diffusion_model.middle_block.1.transformer_blocks.0"


@pytest.mark.parametrize(
    ("backend", "part"),
    [
        pytest.param("eager", "diffusion_model", marks=pytest.mark.slow),
        pytest.param("inductor", BLOCK, marks=pytest.mark.slow),
    ],
)
def test_the_compiled_model(model: Any, backend: str, part: str) -> None:
    """The host's TorchCompileModel on either side, which traces and guards, but with "eager" generates no code; and a
    part compiled in earnest, as KJNodes' compile nodes do.

    All steps share one graph: nothing that the edits bring breaks it or looks new at a later step.
    """
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.utils import counters

    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")

    def compiled(m: Any) -> Any:
        torch.compiler.reset()
        counters.clear()
        m = m.clone()
        set_torch_compile_wrapper(m, backend=backend, keys=[part])
        return m

    edits = [OURS["CRE"], eiup(300, end_percent=1.0)]
    expected = tiny.sample(chain(model, edits), steps=3)
    orders = [[compiled, *edits], [*edits, compiled]]
    for order in orders if backend == "eager" else orders[:1]:
        result = tiny.sample(chain(model, order), steps=3)
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-2)
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch.compiler.reset()


# --- what a conditioning brings --------------------------------------------------------------------------------------


def conditionings(model: Any) -> dict[str, dict[str, Any]]:
    mask = torch.zeros(1, tiny.SIZE, tiny.SIZE)
    mask[:, :4] = 1.0
    widths = tuple(block.attn2.to_q.in_features for block in tiny.Recorder(model).blocks.values())
    return {
        "TransformerOptionsHook": {"hooks": foreign.options_hook()},
        "LoRA hook": {"hooks": foreign.lora_hook(model)},
        "ControlNet": {"control": foreign.control_net(), "control_apply_to_uncond": True},
        "GLIGEN": {"gligen": foreign.gligen(widths)},
        "area": {"area": (4, 8, 0, 0), "strength": 1.0, "set_area_to_bounds": False},
        "mask": {"mask": mask, "mask_strength": 1.0, "set_area_to_bounds": False},
        "mask with its bounds": {"mask": mask, "mask_strength": 1.0, "set_area_to_bounds": True},
        "a part of the steps": {"start_percent": 0.0, "end_percent": 0.4},
    }


CONDITIONINGS = list(conditionings(tiny.sd1()))


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_beside_what_a_conditioning_brings(model: Any, name: str) -> None:
    """One prompt brings it and another does not, as regional prompts do."""
    brought = conditionings(model)[name]
    positive = tiny.cond(1, **brought) + tiny.cond(3)
    pictures = [tiny.sample(chain(model, order), positive, batch=2) for order in (THREE, THREE[::-1])]
    model.unpatch_hooks()
    assert torch.isfinite(pictures[0]).all() and all_equal(pictures)
    assert not torch.equal(pictures[0], tiny.sample(model, positive, batch=2)), "our edits do nothing"
    assert not torch.equal(pictures[0], tiny.sample(chain(model, THREE), tiny.cond(1) + tiny.cond(3), batch=2))
    model.unpatch_hooks()


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_each_prompt_is_edited_as_if_alone(model: Any, name: str) -> None:
    """Of all calls in a step, those rows change that serve the positive, however the host batches them."""
    positive = tiny.cond(1, **conditionings(model)[name]) + tiny.cond(3)

    def rows(m: Any) -> list[tuple[int, Tensor]]:
        """(0 for a row that serves the positive, its output in the first cross-attention)."""
        chunks: list[list[int]] = []

        def spy(executor: Any, *args: Any, **kwargs: Any) -> Any:
            chunks.append(list(args[5]["cond_or_uncond"]))
            return executor(*args, **kwargs)

        m = m.clone()
        m.add_wrapper_with_key("apply_model", "spy", spy)
        with tiny.Recorder(model) as seen:
            tiny.sample(m, positive, steps=1)
        calls = seen.calls["input", 1, 0]
        return [pair for c, call in zip(chunks, calls, strict=True) for pair in zip(c, call["out"], strict=True)]

    edited = rows(chain(model, [OURS["CRE"], OURS["EIUP"]]))
    model.unpatch_hooks()
    for (cond, before), (_, after) in zip(rows(model), edited, strict=True):
        assert torch.equal(before, after) == (cond == 1)
    model.unpatch_hooks()


def test_the_look_for_an_automatic_weight_leaves_a_controlnets_outputs_to_the_step(model: Any) -> None:
    """A model call uses a ControlNet's outputs up; the one more call at the first step must not."""
    from conceptguard.editing.edits.spec import EditSpec
    from conceptguard.editing.engine.host import add_edit
    from conceptguard.editing.methods.eiup import EIUPOptions

    names = [".".join(map(str, key)) for key in tiny.SD1_BLOCKS]
    auto = adapters.train(torch.rand(4, len(names)), torch.full((4,), -0.7), names, steps=1)
    positive = tiny.cond(1, **conditionings(model)["ControlNet"])

    def erase(options: EIUPOptions) -> Tensor:
        edit = EditSpec("erasure", tiny.concept("e", 300), options=options)
        return tiny.sample(add_edit(model, edit), positive)

    found, given = erase(EIUPOptions(auto=auto)), erase(EIUPOptions(weights=(-0.7,)))
    torch.testing.assert_close(found, given, rtol=1e-3, atol=1e-2)


# --- samplers --------------------------------------------------------------------------------------------------------


def edited_calls(model: Any, edit: Node, sampler: str, steps: int = 5) -> tuple[list[float], list[bool]]:
    """The noise level of each model call, and whether its positive was edited."""
    sigmas: list[float] = []

    def spy(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        sigmas.append(float(t.max()))
        return executor(x, t, *args, **kwargs)

    m = edit(model)
    m.add_wrapper_with_key("apply_model", "spy", spy)
    with tiny.Recorder(model) as seen:
        tiny.sample(m, steps=steps, sampler=sampler, cfg=1.0)
    changed = []
    for call in seen.calls["input", 1, 0]:
        heads = seen.heads(("input", 1, 0))
        q, k, v = (call[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv")
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        changed.append(bool((plain - call["out"]).abs().max() > 1e-3))
    return sigmas, changed


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"])
@pytest.mark.parametrize("make", [cre, eiup])
def test_calls_between_the_steps_follow_the_window_by_their_own_noise(model: Any, sampler: str, make: Any) -> None:
    """heun and dpm_2 call at noise levels that are on no schedule."""
    sigmas, changed = edited_calls(model, make(start_percent=0.15, end_percent=0.6), sampler)
    sampling = model.get_model_object("model_sampling")
    high, low = sampling.percent_to_sigma(0.15), sampling.percent_to_sigma(0.6)
    assert changed == [low < sigma <= high for sigma in sigmas] and True in changed and False in changed


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "euler_ancestral"])
def test_samplers_in_both_orders_of_our_nodes(model: Any, sampler: str) -> None:
    orders = THREE, THREE[::-1]
    assert all_equal([tiny.sample(chain(model, order), steps=3, sampler=sampler) for order in orders])


def test_two_advanced_samplers_make_what_one_makes(model: Any) -> None:
    """The host's KSamplerAdvanced, with leftover noise handed from the first part to the second."""
    from nodes import KSamplerAdvanced

    edited = chain(model, [cre(100, start_percent=0.2), eiup(300, end_percent=0.7)])
    empty = {"samples": torch.zeros(1, 4, tiny.SIZE, tiny.SIZE)}

    def part(latent: dict[str, Tensor], noise: str, start: int, end: int, leftover: str) -> dict[str, Tensor]:
        return KSamplerAdvanced().sample(
            edited, noise, 5, 6, 4.0, "euler", "normal", tiny.cond(1), tiny.cond(2), latent, start, end, leftover
        )[0]

    whole = part(empty, "enable", 0, 6, "disable")
    two = part(part(empty, "enable", 0, 3, "enable"), "disable", 3, 6, "disable")
    torch.testing.assert_close(two["samples"], whole["samples"], rtol=1e-3, atol=1e-2)
    assert not torch.equal(whole["samples"], tiny.sample(model, steps=6))


def test_perpendicular_negative_guidance_in_every_order(model: Any) -> None:
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    def sample(m: Any) -> Tensor:
        guider = Guider_PerpNeg(m)
        guider.set_conds(tiny.cond(1), tiny.cond(2), tiny.cond(3))
        guider.set_cfg(4.0, 1.0)
        sigmas = comfy.samplers.calculate_sigmas(m.get_model_object("model_sampling"), "normal", 2)
        latent = torch.zeros(1, 4, tiny.SIZE, tiny.SIZE)
        euler = comfy.samplers.sampler_object("euler")
        return guider.sample(torch.ones_like(latent), latent, euler, sigmas, disable_pbar=True)

    pictures = [sample(chain(model, order)) for order in (THREE, THREE[::-1])]
    assert all_equal(pictures) and not torch.equal(pictures[0], sample(model))


# --- context windows -------------------------------------------------------------------------------------------------


def windows(model: Any, length: int = 2, overlap: int = 0) -> Any:
    """The host's Context Windows (Manual) over the images of a batch, as for AnimateDiff.

    The host compares the schedule's noise levels with the batch's, and so wants as many: n + 1 images for n steps.
    """
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    inputs = [length, overlap, "standard_static", 1, False, "pyramid", 0]
    newer = "freenoise" in inspect.signature(ContextWindowsManualNode.execute).parameters
    return ContextWindowsManualNode.execute(model, *inputs, *[False] * newer).args[0]


def test_context_windows_in_every_order(model: Any) -> None:
    orders = itertools.permutations([windows, *THREE[:2]])
    pictures = [tiny.sample(chain(model, order), batch=4, steps=3) for order in orders]
    assert all_equal(pictures)
    expected = tiny.sample(chain(model, THREE[:2]), batch=4, steps=3)
    torch.testing.assert_close(pictures[0], expected, rtol=1e-3, atol=1e-2)


def test_gates_find_their_images_through_a_context_window(model: Any) -> None:
    edit = eiup(300, gate=Gate((0.0, 1.0, 1.0, 0.0)))
    seen, plain = (tiny.sample(windows(m), batch=4, steps=3) for m in (edit(model), model))
    assert [torch.equal(a, b) for a, b in zip(seen, plain, strict=True)] == [True, False, False, True]
    with pytest.raises(ValueError, match="the gate decided about 2 images, but a context window shows image 4"):
        tiny.sample(windows(eiup(300, gate=Gate((1.0, 1.0)))(model)), batch=4, steps=3)


def test_automatic_weights_find_their_images_through_a_context_window(model: Any) -> None:
    from conceptguard.editing.edits.spec import EditSpec
    from conceptguard.editing.engine.host import add_edit
    from conceptguard.editing.methods.eiup import EIUPOptions

    names = [".".join(map(str, key)) for key in tiny.SD1_BLOCKS]
    x = torch.rand(64, len(names), generator=torch.Generator().manual_seed(0)) * 0.05
    auto = adapters.train(x, -3 * x.mean(-1) / x.mean(), names, steps=200)
    edited = add_edit(model, EditSpec("erasure", tiny.concept("e", 300), options=EIUPOptions(auto=auto)))
    seen, whole = (tiny.sample(m, batch=4, steps=3) for m in (windows(edited), edited))
    torch.testing.assert_close(seen, whole, rtol=1e-3, atol=1e-2)
