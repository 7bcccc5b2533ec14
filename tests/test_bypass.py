"""Packs that can leave an edit out: the edit acts all the same, or the run stops and says what is in its way."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import dits
import foreign_bypass as packs
import pytest
import tiny
import torch
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_model_merging import ModelMergeSimple
from foreign_rows import AttentionCouple
from test_conditional import guided

from conceptguard.editing.edits.concept import concept_from_conditioning, concept_from_text
from conceptguard.editing.edits.spec import Direction, EditSpec
from conceptguard.editing.engine.backbones.joint import Joint
from conceptguard.editing.engine.host import accounts_of, add_edit
from conceptguard.editing.methods.cre import CREOptions
from conceptguard.editing.methods.eiup import EIUPOptions

PRINTED = CREOptions("full", "own", "none", "keep", "sum")


def cre(model: Any, **inputs: Any) -> Any:
    return add_edit(model, EditSpec("projection", tiny.concept(), options=tiny.CRE, node="Test", **inputs))


def cre_spec() -> EditSpec:
    return EditSpec("projection", tiny.concept(), options=tiny.CRE, node="Test")


def eiup(model: Any) -> Any:
    return add_edit(model, EditSpec("erasure", tiny.concept(), options=EIUPOptions("joint"), node="Test"))


def directed(model: Any) -> Any:
    shift = Direction("d", torch.randn(1, tiny.WIDTH, generator=torch.Generator().manual_seed(3)))
    return add_edit(model, EditSpec("direction", shift, node="Test"))


EDITS = [cre, eiup, directed]
NOT_APPLIED = "Test: the edit was not applied"


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    ("pack", "cause"),
    [
        (packs.DeepCache().apply, "DeepCache.apply"),
        (packs.known_options_only, "known_options_only"),
        (packs.new_transformer_options, "transformer_options"),
        (packs.new_wrappers, "wrappers"),
        (packs.wrappers_dropped_while_sampling, "wrappers"),
        (packs.own_forward, "own_forward"),
    ],
)
def test_an_edit_that_is_left_out_is_an_error(model: Any, edit: Any, pack: Any, cause: str) -> None:
    with pytest.raises(ValueError, match=f"{NOT_APPLIED}.*{cause}"):
        tiny.sample(pack(edit(model)))


@pytest.mark.parametrize("edit", EDITS)
def test_several_devices_are_refused_before_the_first_step(model: Any, edit: Any) -> None:
    seen: list[int] = []
    with pytest.raises(ValueError, match=f"{NOT_APPLIED}.*MultiGPU CFG Split.*take that node out"):
        tiny.sample(packs.several_devices(edit(model)), callback=lambda i, *_: seen.append(i))
    assert seen == []


@pytest.mark.parametrize(
    "pack", [packs.DeepCache().apply, packs.known_options_only, packs.own_forward, packs.several_devices]
)
def test_without_an_edit_nobody_complains(model: Any, pack: Any) -> None:
    plain = tiny.sample(pack(model), steps=4)
    assert torch.equal(tiny.sample(pack(cre(model, strength=0.0)), steps=4), plain)


def test_an_edit_that_misses_blocks_is_an_error(model: Any) -> None:
    with pytest.raises(ValueError, match=r"Test: .*5 of 7 blocks.*input\.1, input\.3.*ends_early"):
        tiny.sample(packs.ends_early(cre(model)))
    tiny.sample(packs.ends_early(cre(model, blocks="middle,output")))  # all that it names


@pytest.mark.parametrize("first", [True, False], ids=["stops at the first step", "before the last"])
def test_it_does_not_wait_for_the_end(model: Any, first: bool) -> None:
    """What never worked is said after the first step, not after all of them."""
    seen: list[int] = []
    start = 0.0 if first else 0.5
    with pytest.raises(ValueError, match=NOT_APPLIED):
        tiny.sample(
            packs.known_options_only(cre(model, start_percent=start)), steps=6, callback=lambda i, *_: seen.append(i)
        )
    assert len(seen) <= (1 if first else 5)


def test_an_error_of_the_run_itself_is_not_covered_up(model: Any) -> None:
    def stop(*_: Any) -> None:
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.sample(packs.own_forward(cre(model)), callback=stop, steps=3)


def test_patches_for_a_range_of_timesteps(model: Any) -> None:
    """ComfyUI-bleh: edits of `model_matched` are among what it does not copy; those of `model_default` stay."""
    with pytest.raises(ValueError, match=f"{NOT_APPLIED}.*ModelPatchConditional"):
        tiny.sample(packs.ModelPatchConditional(ip(model), ip(cre(model))).patch())
    both = packs.ModelPatchConditional(ip(cre(model)), ip(model)).patch()
    assert torch.equal(tiny.sample(both), tiny.sample(cre(packs.ModelPatchConditional(ip(model), ip(model)).patch())))


def test_patches_for_a_range_with_edits_on_both_sides(model: Any) -> None:
    """The edit of the one is there, and answers for itself alone."""
    other = EditSpec("projection", tiny.concept("mug", 200), options=tiny.CRE, node="Other")
    with pytest.raises(ValueError, match="Other: the edit was not applied.*ModelPatchConditional"):
        tiny.sample(packs.ModelPatchConditional(cre(model), add_edit(model, other)).patch())
    edited = cre(model)
    assert torch.equal(tiny.sample(packs.ModelPatchConditional(edited, ip(edited), 1.0).patch()), tiny.sample(edited))


@pytest.mark.parametrize("name", ["Flux.1", "Z-Image", "SD3"])
def test_patches_for_a_range_of_a_transformers_timesteps(name: str) -> None:
    """None of its patches are those of a UNet's blocks."""
    made = dits.build(name)
    edited = add_edit(made, EditSpec("projection", dits.concept(), options=tiny.CRE, node="Test"))
    with pytest.raises(ValueError, match=f"{NOT_APPLIED}.*ModelPatchConditional"):
        dits.sample(name, packs.ModelPatchConditional(made, edited).patch(), cfg=4.0)
    with pytest.raises(ValueError, match=f"{NOT_APPLIED}.*ModelPatchConditional"):
        dits.sample(name, packs.ModelPatchConditional(made, edited).patch())  # at cfg 1


@pytest.mark.parametrize(
    ("name", "node"),
    [("Flux.1", EasyCacheNode), ("Flux.1", LazyCacheNode), ("Z-Image", EasyCacheNode), ("SD3", LazyCacheNode)],
)
def test_steps_that_a_cache_leaves_out_of_a_transformer_are_no_error(name: str, node: Any) -> None:
    """Its attentions are not called there, neither for the prompt nor for the concept."""
    made = dits.build(name)
    edited = add_edit(made, EditSpec("projection", dits.concept(), options=tiny.CRE, node="Test"))
    cached = node.execute(edited, 3.0, 0.1, 0.9, False).args[0]
    negative = dits.cond(dits.tokens(2, 6))  # calls of their own
    dits.sample(name, cached, negative=negative, steps=8, cfg=4.0)
    ((_, account),) = accounts_of(edited).runs
    (only,) = account.entries.values()
    assert 0 < len(only.acted) < 8 and "left out by a cache" in only.line(8) and account.applied


@pytest.mark.parametrize("near", [0.01, 0.3])
@pytest.mark.parametrize(
    ("name", "form"), [("HiDream", "beside"), ("Qwen-Image", "beside"), ("Qwen-Image", "appended")]
)
def test_a_cache_that_takes_the_prompt_for_the_concept_is_an_error(
    name: str, form: str, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the concept is a call of its own, in the prompt's place; it would be drawn from then on."""
    if form == "beside":
        monkeypatch.setattr(Joint, "appends", lambda *_: False)
    model = dits.build(name)
    spec = EditSpec("projection", dits.concept(), options=tiny.CRE, node="Test")
    cached = add_edit(packs.step_cache(model, 0.7, near), spec)
    if form == "beside":
        with pytest.raises(ValueError, match=f"{NOT_APPLIED}: a cache took the prompt.*Take the cache out"):
            dits.sample(name, cached, steps=6)
    else:
        made, alone = dits.sample(name, cached, steps=6), dits.sample(name, add_edit(model, spec), steps=6)
        assert torch.allclose(made, alone) == (near < 0.1)


@pytest.mark.parametrize("name", [name for name in (*dits.FAMILIES, "Wan", "Cosmos-Predict2") if name != "SD3"])
@pytest.mark.parametrize("order", [False, True])
def test_tokens_that_a_wrapper_puts_behind_the_text_are_an_error(name: str, order: bool) -> None:
    """They would be taken for the picture's."""
    model, more = dits.build(name), dits.tokens(77, 3)
    spec = EditSpec("projection", dits.concept(), options=tiny.CRE, node="Test")
    edited = add_edit(packs.longer_text(model, more), spec) if order else packs.longer_text(add_edit(model, spec), more)
    with pytest.raises(ValueError, match=NOT_APPLIED):
        dits.sample(name, edited, steps=2)
    kept = packs.longer_text(add_edit(model, spec), more[:, :0])
    assert torch.equal(dits.sample(name, kept), dits.sample(name, add_edit(model, spec)))


@pytest.mark.parametrize("name", [name for name in (*dits.FAMILIES, "Wan", "Cosmos-Predict2") if name != "SD3"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_an_attention_that_comes_in_later_is_an_error(name: str, cfg: float) -> None:
    """Of the last steps alone, where a cache might have left them out; not one that asks for the edits'."""
    model = dits.build(name)
    edited = add_edit(model, EditSpec("projection", dits.concept(), options=tiny.CRE, node="Test"))
    with pytest.raises(ValueError, match=f"{NOT_APPLIED}: .*(late_attention|a cache took)"):
        dits.sample(name, packs.late_attention(edited, 0.97, False), steps=4, cfg=cfg)
    kept = dits.sample(name, packs.late_attention(edited, 0.97, True), steps=4, cfg=cfg)
    assert torch.equal(kept, dits.sample(name, edited, steps=4, cfg=cfg))


def ip(model: Any) -> Any:
    from foreign import ip_adapter

    return ip_adapter(model)


def test_nag_is_refused_before_it_changes_the_model() -> None:
    """ChenDarYen's: it would leave the network with a forward of its own, also for those who sample it next."""
    model = tiny.sd1()  # one that a failing test may leave changed
    plain = tiny.sample(model)
    unet = model.model.diffusion_model

    def run(model: Any) -> Any:
        guider = packs.NAGCFGGuider(model)
        guider.set_conds(tiny.cond(1), tiny.cond(2))
        guider.set_cfg(4.0)
        guider.set_nag(tiny.cond(3))
        return guided(guider, steps=2)

    run(model)
    for edit in EDITS:
        with pytest.raises(ValueError, match="Test: .*NAGCFGGuider.*forward"):
            run(edit(model))
        assert "forward" not in vars(unet)
        assert torch.equal(tiny.sample(model), plain)


def test_a_forward_that_nag_left_behind_is_named() -> None:
    """By a run that was stopped: the network stays changed until it is loaded again."""
    from functools import partial
    from types import MethodType

    model = tiny.sd1()
    unet = model.model.diffusion_model
    unet.forward = MethodType(partial(packs.nag_unet_forward, negative=tiny.tokens(3), scale=5.0), unet)
    try:
        with pytest.raises(ValueError, match="Test: .*nag_unet_forward"):
            tiny.sample(cre(model))
    finally:
        vars(unet).pop("forward", None)


# --- old couples, NegPip ---------------------------------------------------------------------------------------------


def test_directions_cannot_reach_regions_with_keys_of_their_own(model: Any) -> None:
    old = AttentionCouple().attention_couple
    for order in (old(directed(model)), directed(old(model))):
        with pytest.raises(ValueError, match="Test: .*AttentionCouple.*keys and values of its own"):
            tiny.sample(order)
    assert not torch.equal(tiny.sample(old(cre(model))), tiny.sample(old(model)))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a knife", "a knife, (sharp:1.3)"])
def test_a_concept_of_negpips_clip_is_that_of_the_plain_one(clip: Any, text: str) -> None:
    plain, doubled = (
        concept_from_text(each, f"{text}\nblade", keep="spoon") for each in (clip, packs.negpip_clip(clip))
    )
    assert doubled.key == plain.key


def test_a_concept_of_negpips_conditioning(model: Any) -> None:
    plain, doubled = (concept_from_conditioning(each, "c") for each in (tiny.cond(4), packs.doubled(tiny.cond(4))))
    assert doubled.key == plain.key
    longer = concept_from_conditioning(tiny.cond(4, 154), "c")
    assert longer.phrases[0].tokens.shape[1] == 154


def test_edits_beside_negpip(model: Any) -> None:
    """Its context is twice as long; the keys and values that the edit sees are not."""
    one, two = tiny.cond(1), tiny.cond(2)
    for edit in EDITS:
        expected = tiny.sample(edit(model), one, two)
        found = tiny.sample(packs.negpip_model(edit(model)), packs.doubled(one), packs.doubled(two))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


# --- merging and saving ----------------------------------------------------------------------------------------------


def test_merging_into_an_edited_model_keeps_its_edits(model: Any) -> None:
    other = tiny.sd1(seed=1)
    merged = ModelMergeSimple().merge(cre(model), other, 0.5)[0]
    plain = ModelMergeSimple().merge(model, other, 0.5)[0]
    assert not torch.equal(tiny.sample(merged), tiny.sample(plain))
    merged.unpatch_model()


def test_merging_an_edited_model_into_another_is_an_error(model: Any) -> None:
    """Of the second one the host's merges take the weights alone."""
    other = tiny.sd1(seed=1)
    for edited in (cre(model), cre(model).clone().clone(), add_edit(directed(model), cre_spec())):
        with pytest.raises(ValueError, match="Test: .*a merge takes the weights of this MODEL alone.*behind the merge"):
            ModelMergeSimple().merge(other, edited, 0.5)
    merged = ModelMergeSimple().merge(other, cre(model, strength=0.0), 0.5)[0]  # nothing is lost
    plain = ModelMergeSimple().merge(other, model, 0.5)[0]
    assert torch.equal(tiny.sample(merged), tiny.sample(plain))
    for each in (merged, plain):
        each.unpatch_model()


def test_saving_an_edited_model_is_an_error(model: Any, tmp_path: Path) -> None:
    """A checkpoint holds weights alone."""
    with pytest.raises(ValueError, match="Test: .*a file of weights cannot hold it.*Save Safety Preset"):
        comfy.model_management.load_models_gpu([cre(model)], force_patch_weights=True)
    comfy.model_management.load_models_gpu([model], force_patch_weights=True)
    comfy.model_management.unload_all_models()


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_steps_that_a_cache_leaves_out_are_no_error(model: Any, node: Any) -> None:
    cached = node.execute(cre(model), 3.0, 0.1, 0.9, False).args[0]
    assert torch.isfinite(tiny.sample(cached, steps=8)).all()


def test_deepcache_alone_still_works(model: Any) -> None:
    """The stand-in does what the host does where it reuses nothing."""
    full = packs.DeepCache().apply(model, cache_interval=1)
    torch.testing.assert_close(tiny.sample(full, steps=3), tiny.sample(model, steps=3), rtol=1e-4, atol=1e-4)


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["all,input.99", "input.99,all", "all,output.7-9", "ALL, Input.99"])
def test_every_part_of_blocks_must_name_something(model: Any, blocks: str) -> None:
    with pytest.raises(ValueError, match="Test: blocks .*no cross-attention there"):
        cre(model, blocks=blocks)
    cre(model, blocks="all,input.1")


def test_nothing_is_logged_twice(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tiny.sample(cre(model))
    assert len([r for r in caplog.records if r.getMessage().startswith("Test: ")]) == 1
