"""The engine beside other packs (foreign.py) and the host's own ways of changing a model."""

from __future__ import annotations

from typing import Any

import comfy.hooks
import pytest
import reference
import tiny
import torch
from foreign import Attn2Replace, couple, ip_adapter
from torch import Tensor

from conceptguard.editing.edits.spec import EditSpec, Gate, PromptTokens
from conceptguard.editing.engine.backbones.unet import cross_attentions
from conceptguard.editing.engine.host import add_edit
from conceptguard.editing.engine.run import OBSERVER
from conceptguard.editing.methods.eiup import EIUPOptions
from conceptguard.editing.methods.kpop import append


def cre(model: Any, seed: int = 100, **inputs: Any) -> Any:
    return add_edit(model, EditSpec("projection", tiny.concept("c", seed), options=tiny.CRE, node="Test", **inputs))


def prompt(model: Any, **inputs: Any) -> Any:
    return add_edit(
        model, EditSpec("prompt", PromptTokens("p", tiny.tokens(60, 10), tiny.tokens(61, 10)), node="Test", **inputs)
    )


@pytest.mark.parametrize("transformer", [True, False], ids=["block and transformer", "block"])
def test_ip_adapter_in_any_order(model: Any, transformer: bool) -> None:
    after, before = ip_adapter(cre(model), transformer), cre(ip_adapter(model, transformer))
    assert torch.equal(tiny.sample(after), tiny.sample(before))
    assert not torch.equal(tiny.sample(after), tiny.sample(cre(model)))
    assert not torch.equal(tiny.sample(after), tiny.sample(ip_adapter(model, transformer)))


def test_a_foreign_patch_is_left_as_it_was(model: Any) -> None:
    both = cre(ip_adapter(model))
    slots = dict(both.model_options["transformer_options"]["patches_replace"]["attn2"])
    tiny.sample(both)
    assert both.model_options["transformer_options"]["patches_replace"]["attn2"] == slots
    again = ip_adapter(both)  # a second adapter finds its .add
    assert torch.isfinite(tiny.sample(again)).all()


def test_cre_removes_what_the_adapter_brings(model: Any) -> None:
    """The projection comes last: it works on the adapter's output, not on the text's attention alone."""
    options = tiny.CRE.__class__("full", "all", "none", "keep", "sum")
    edited = add_edit(ip_adapter(model), EditSpec("projection", tiny.concept(), options=options))
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, cfg=1.0, steps=1)
    for key, (call,) in seen.calls.items():
        h, steer = seen.heads(key), tiny.concept().phrases[0].tokens[0]
        At = reference.attention(call["q"][0], seen.project(key, "k", steer), seen.project(key, "v", steer), h)
        left = (call["out"][0].double() * At).sum(-1) / At.norm(dim=-1)
        torch.testing.assert_close(left, torch.zeros_like(left), atol=1e-3, rtol=0)


def test_appended_tokens_leave_the_adapters_part_alone(model: Any) -> None:
    """Beside a foreign replacement, what appending changes is worked out on the text's attention and added."""
    edited = prompt(ip_adapter(model))
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, cfg=1.0, steps=1)
    for i, (key, (call,)) in enumerate(seen.calls.items()):
        q, k, v = (call[name] for name in "qkv")
        h = seen.heads(key)
        adapter = Attn2Replace(i)(q, k, v, {"n_heads": h})[0].double()
        A = reference.attention(q[0], k[0], v[0], h)
        k_e, v_e = seen.project(key, "k", tiny.tokens(60, 10)[0]), seen.project(key, "v", tiny.tokens(61, 10)[0])
        joined = reference.appended(q[0], k[0], v[0], k_e, v_e, 1, h)
        torch.testing.assert_close(call["out"][0].double(), adapter + joined - A, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("edit", [cre, prompt])
def test_attention_couple_in_any_order(model: Any, edit: Any) -> None:
    after, before = couple(edit(model)), edit(couple(model))
    assert torch.equal(tiny.sample(after, batch=2), tiny.sample(before, batch=2))
    assert not torch.equal(tiny.sample(after, batch=2), tiny.sample(couple(model), batch=2))


def test_every_region_is_edited_and_gates_find_their_images(model: Any) -> None:
    with tiny.Recorder(model) as before:
        tiny.sample(couple(model), batch=2, steps=1)
    with tiny.Recorder(model) as after:
        tiny.sample(couple(cre(model, gate=Gate((0.0, 1.0)))), batch=2, steps=1)
    for key in before.calls:
        old, new = before.calls[key][0]["out"], after.calls[key][0]["out"]
        assert len(new) == 6  # two images: negative, first region, second region
        assert [i for i in range(6) if not torch.equal(old[i], new[i])] == [3, 5]


def test_a_batch_that_cannot_be_read_is_an_error(model: Any) -> None:
    odd = cre(model)
    odd.set_model_attn2_patch(lambda n, c, v, extra: (n[:3], c[:3], v[:3]))
    odd.set_model_attn2_output_patch(lambda n, extra: torch.cat([n, n[:1]]))
    with pytest.raises(ValueError, match="Test: cannot tell which of 3 rows belong to which prompt"):
        tiny.sample(odd, batch=2)


# --- the host's own -------------------------------------------------------------------------------------------------


def patch_weights(model: Any, strength: float = 1.0) -> dict[str, Any]:
    """What a LoRA does to the cross-attentions' key and value weights."""
    names = [n for n in model.model.state_dict() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    weights = model.model.state_dict()
    return {
        n: ("diff", (strength * torch.randn(weights[n].shape, generator=torch.Generator().manual_seed(i)),))
        for i, n in enumerate(names)
    }


@pytest.mark.parametrize("late", [False, True], ids=["LoRA before", "LoRA behind"])
def test_concepts_are_read_with_the_loras_weights(model: Any, late: bool) -> None:
    patches = patch_weights(model)
    lora = cre(model).clone() if late else model.clone()
    lora.add_patches(patches)
    lora = lora if late else cre(lora)
    # the same weights, without a patch
    merged = tiny.sd1()
    state = merged.model.state_dict()
    for name, (_, (diff,)) in patches.items():
        state[name] += diff
    tiny.sample(cre(model))  # leaves nothing that the next run could use
    torch.testing.assert_close(tiny.sample(lora), tiny.sample(cre(merged)), rtol=1e-3, atol=1e-2)
    lora.unpatch_model()


def test_a_lora_on_one_conditioning_is_not_the_others(model: Any) -> None:
    """LoRA hooks swap the weights within a step: each cond's concepts are read with the weights of that cond."""
    hook = comfy.hooks.WeightHook()
    hook.weights, hook.need_weight_init = patch_weights(model), False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    merged = tiny.sd1()
    state = merged.model.state_dict()
    for name, (_, (diff,)) in hook.weights.items():
        state[name] += diff

    def first_outputs(m: Any, positive: Any) -> list[Tensor]:
        with tiny.Recorder(m) as seen:
            tiny.sample(cre(m), positive, cfg=1.0, steps=1)
        return [row for call in seen.calls[("input", 1, 0)] for row in call["out"]]

    both = first_outputs(model, tiny.cond(1, hooks=group) + tiny.cond(3))
    expected = [*first_outputs(merged, tiny.cond(1)), *first_outputs(model, tiny.cond(3))]
    assert len(both) == 2
    for output in expected:
        assert min((output - each).abs().max() for each in both) < 1e-3
    model.unpatch_hooks()


def test_a_lora_whose_strength_changes_within_a_run(model: Any) -> None:
    """Keyframes give a hook another strength from a step on: the concept is read anew with those weights."""

    def hook(strengths: dict[float, float]) -> comfy.hooks.HookGroup:
        made = comfy.hooks.WeightHook()
        made.weights, made.need_weight_init = patch_weights(model), False
        group, frames = comfy.hooks.HookGroup(), comfy.hooks.HookKeyframeGroup()
        for start, strength in strengths.items():
            frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start, guarantee_steps=0))
        group.add(made)
        group.set_keyframes_on_hooks(frames)
        return group

    def outputs(strengths: dict[float, float]) -> list[dict[str, Tensor]]:
        with tiny.Recorder(model) as seen:
            tiny.sample(cre(model), tiny.cond(1, hooks=hook(strengths)), cfg=1.0, steps=2)
        model.unpatch_hooks()
        return seen.calls[("middle", 0, 0)]

    def at_strength(strength: float, call: dict[str, Tensor]) -> Tensor:
        """CRE by hand on this call, the concept read with weights of this strength."""
        block = cross_attentions(model.model.diffusion_model)[("middle", 0, 0)]
        patches = patch_weights(model)
        steer, empty = tiny.concept("c", 100).phrases[0].tokens[0], tiny.concept("c", 100).baseline

        def weight(which: str) -> Tensor:
            name = next(
                n for n in patches if n.endswith(f"middle_block.1.transformer_blocks.0.attn2.to_{which}.weight")
            )
            return (getattr(block.attn2, f"to_{which}").weight + strength * patches[name][1][0]).double()

        def found(text: Tensor) -> Tensor:
            return reference.attention(call["q"][0], text.double() @ weight("k").T, text.double() @ weight("v").T, 4)

        A = reference.attention(call["q"][0], call["k"][0], call["v"][0], 4)
        return reference.cre(A, [found(steer)], [1.0], 1, True, True, found(empty[0]))

    first, second = outputs({0.0: 1.0, 0.4: 0.2})
    for call, strength in ((first, 1.0), (second, 0.2)):
        torch.testing.assert_close(call["out"][0].double(), at_strength(strength, call), rtol=1e-3, atol=1e-3)
    assert (second["out"][0].double() - at_strength(1.0, second)).abs().max() > 0.05


def hooked(scope: comfy.hooks.EnumHookScope, edit: EditSpec) -> comfy.hooks.HookGroup:
    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.TransformerOptionsHook(tiny.hooked(edit), hook_scope=scope))
    return group


@pytest.mark.parametrize("scope", list(comfy.hooks.EnumHookScope))
def test_an_edit_that_a_conditioning_brings(model: Any, scope: comfy.hooks.EnumHookScope) -> None:
    edit = EditSpec("projection", tiny.concept("c", 100), options=tiny.CRE)
    result = tiny.sample(model, tiny.cond(1, hooks=hooked(scope, edit)))
    torch.testing.assert_close(result, tiny.sample(cre(model)), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("scope", list(comfy.hooks.EnumHookScope))
def test_edits_of_the_model_and_of_a_conditioning_add_up(model: Any, scope: comfy.hooks.EnumHookScope) -> None:
    edit = EditSpec("projection", tiny.concept("c", 200), options=tiny.CRE)
    result = tiny.sample(cre(model), tiny.cond(1, hooks=hooked(scope, edit)))
    torch.testing.assert_close(result, tiny.sample(cre(cre(model), 200)), rtol=1e-3, atol=1e-2)


def test_perturbed_attention_guidance_runs_with_the_edit(model: Any) -> None:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    def pag(m: Any) -> Any:
        return PerturbedAttentionGuidance.execute(m, 3.0).args[0]

    assert torch.equal(tiny.sample(pag(cre(model))), tiny.sample(cre(pag(model))))


def test_perpendicular_negative_guidance_edits_the_positive_alone(model: Any) -> None:
    import comfy.samplers
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    def rows(m: Any) -> list[Tensor]:
        guider = Guider_PerpNeg(m)
        guider.set_conds(tiny.cond(1), tiny.cond(2), tiny.cond(3))
        guider.set_cfg(4.0, 1.0)
        sigmas = comfy.samplers.calculate_sigmas(m.get_model_object("model_sampling"), "normal", 1)
        latent = torch.zeros(1, 4, tiny.SIZE, tiny.SIZE)
        with tiny.Recorder(model) as seen:
            guider.sample(
                torch.ones_like(latent), latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True
            )
        return [row for call in seen.calls[("input", 1, 0)] for row in call["out"]]

    assert [torch.equal(a, b) for a, b in zip(rows(model), rows(cre(model)), strict=True)].count(False) == 1


def test_two_prompts_side_by_side_are_both_edited(model: Any) -> None:
    """ConditioningCombine and areas: several parts of the batch serve the positive."""
    both = tiny.cond(1) + tiny.cond(3)
    with tiny.Recorder(model) as before:
        tiny.sample(model, both, steps=1)
    with tiny.Recorder(model) as after:
        tiny.sample(cre(model), both, steps=1)
    same = [
        torch.equal(*pair) for pair in zip(*(r.calls[("input", 1, 0)][0]["out"] for r in (before, after)), strict=True)
    ]
    assert same.count(False) == 2 and same.count(True) == 1


def test_an_attention_override_still_applies(model: Any) -> None:
    """Sage, Flash and their like: the base attention goes the host's way."""
    calls: list[int] = []

    def override(attention: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return attention(*args, **kwargs)

    def count(m: Any) -> int:
        m = m.clone()
        m.model_options["transformer_options"]["optimized_attention_override"] = override
        calls.clear()
        tiny.sample(m, steps=1)
        return len(calls)

    assert count(model) == count(cre(model)) == 14


def test_the_attention_is_the_same_with_the_hosts_cpu_default(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.ldm.modules import attention as host

    from conceptguard.editing.engine.backbones import unet

    expected = tiny.sample(cre(model))
    for module in (host, unet):
        monkeypatch.setattr(module, "optimized_attention", host.attention_sub_quad)
    torch.testing.assert_close(tiny.sample(cre(model)), expected, rtol=1e-3, atol=1e-2)


def test_an_observer_sees_every_projection(model: Any) -> None:
    seen: list[dict[str, Any]] = []
    watched = cre(model)
    watched.model_options["transformer_options"][OBSERVER] = lambda **what: seen.append(what)
    assert torch.equal(tiny.sample(watched), tiny.sample(cre(model)))
    assert [each["block"] for each in seen] == tiny.SD1_BLOCKS * 2
    assert seen[0]["At"].shape == (1, *seen[0]["A"].shape) and seen[0]["A0"].shape == seen[0]["A"].shape


def test_another_weight_of_appended_tokens_at_each_image(model: Any) -> None:
    """Gates of appended tokens count copies; half open is half a copy."""
    q, k, A = (torch.randn(2, 6, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    K, V = (torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(i)) for i in (3, 4))
    both = append(A, q, k, [(K, V, torch.tensor([1.0, 0.5]))])
    for row, s in enumerate((1.0, 0.5)):
        alone = append(A[row : row + 1], q[row : row + 1], k[row : row + 1], [(K, V, torch.tensor([s]))])
        torch.testing.assert_close(both[row], alone[0])


def test_erasure_beside_an_adapter_in_any_order(model: Any) -> None:
    def eiup(m: Any) -> Any:
        return add_edit(m, EditSpec("erasure", tiny.concept("e", 300), options=EIUPOptions("joint", (-1.0,))))

    assert torch.equal(tiny.sample(eiup(ip_adapter(model))), tiny.sample(ip_adapter(eiup(model))))
