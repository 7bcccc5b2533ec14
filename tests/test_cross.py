"""Edits in the cross-attentions of diffusion transformers, against the papers' formulas done slowly."""

from __future__ import annotations

from typing import Any

import comfy.ldm.wan.model as wan
import comfy.sample
import comfy.supported_models
import pytest
import reference
import tiny
import torch
from comfy.model_patcher import ModelPatcher
from dits import concept, cond, tokens
from torch import Tensor

from conceptguard.editing.edits.spec import Direction, EditSpec, Gate
from conceptguard.editing.engine.host import add_edit

HEADS, WIDTH, DEPTH = 2, 16, 2


def build(dtype: torch.dtype = torch.float32) -> ModelPatcher:
    shape = dict(
        image_model="wan2.1", model_type="t2v", dim=32, ffn_dim=32, num_heads=HEADS, num_layers=DEPTH, text_dim=WIDTH
    )
    config = comfy.supported_models.WAN21_T2V(shape)
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.diffusion_model.named_parameters():
        random = torch.randn(weight.shape, generator=generator)
        few = random * 0.8 * weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1 * random
        weight.data.copy_(1 + few if "norm" in name and "weight" in name else few)
    cpu, embedding = torch.device("cpu"), model.to(dtype).diffusion_model.patch_embedding
    embedding.float()  # as the host loads it
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


def sample(model: ModelPatcher, positive: Any = None, batch: int = 1, cfg: float = 1.0, steps: int = 1) -> Tensor:
    empty = torch.zeros(batch, 16, 1, 8, 8)
    noise = comfy.sample.prepare_noise(empty, 5)
    positive, negative = positive or cond(tokens(1, 9)), cond(tokens(2, 9))
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "simple", positive, negative, empty, disable_pbar=True, seed=5
    )


def cre(model: ModelPatcher, **changes: Any) -> ModelPatcher:
    return add_edit(model, EditSpec("projection", concept(2), **{"options": tiny.CRE, "node": "Test", **changes}))


@pytest.mark.parametrize(
    ("batch", "cfg", "dtype", "close"),
    [(1, 1.0, torch.float32, 2e-4), (3, 5.0, torch.float32, 2e-4), (2, 5.0, torch.bfloat16, 0.03)],
)
def test_cre_edits_what_the_picture_finds_in_the_text(
    batch: int, cfg: float, dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, plain = build(dtype), [], wan.optimized_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, heads: int, **more: Any) -> Tensor:
        out = plain(q, k, v, heads, **more)
        if k.shape[1] == 9:
            calls.append((q.clone(), k.clone(), v.clone(), out.clone()))
        return out

    monkeypatch.setattr(wan, "optimized_attention", watched)
    sample(cre(model, strength=0.7), batch=batch, cfg=cfg)
    network, moved = model.model.diffusion_model, 0.0
    assert len(calls) == DEPTH
    for block, (q, k, v, out) in zip(network.blocks, calls, strict=True):
        attn = block.cross_attn
        for row in range(len(q)):
            conditional = len(q) == batch or row >= batch

            def found(encoding: Tensor, attn: Any = attn, q: Tensor = q[row]) -> Tensor:
                text = network.text_embedding(encoding.to(dtype))[0]
                return reference.attention(q, attn.norm_k(attn.k(text)), attn.v(text), HEADS)

            A = reference.attention(q[row], k[row], v[row], HEADS)
            At, A0 = [found(phrase.tokens) for phrase in concept(2).phrases], found(concept().baseline)
            s = [0.7 if conditional else 0.0] * 2
            want = reference.cre(A, At, s, 1, clip=True, joint=True, A0=A0)
            torch.testing.assert_close(out[row].double(), want, rtol=close, atol=close)
            moved = max(moved, float((want - A).abs().max()))
    assert moved > 3 * close


def test_off_is_bit_identical() -> None:
    model = build()
    plain = sample(model, batch=2, cfg=5.0, steps=2)
    for off in ({"strength": 0.0}, {"gate": Gate((0.0,))}, {"start_percent": 0.5, "end_percent": 0.5}):
        assert torch.equal(sample(cre(model, **off), batch=2, cfg=5.0, steps=2), plain)
    assert not torch.allclose(sample(cre(model), batch=2, cfg=5.0, steps=2), plain, atol=1e-3)


def test_another_packs_attention_is_kept() -> None:
    calls = []

    def theirs(plain: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(args[0]))
        return plain(*args, **kwargs)

    model = build()
    both = cre(model)
    both.model_options["transformer_options"]["optimized_attention_override"] = theirs
    assert torch.equal(sample(both), sample(cre(model)))
    assert len(calls) == 2 * DEPTH


def test_a_direction_is_added_to_the_positive_prompt() -> None:
    model, d = build(), tokens(3, 1)[0]
    edited = add_edit(model, EditSpec("direction", Direction("d", d), 0.7, node="Test"))
    expected = sample(model, cond(tokens(1, 9) + 0.7 * d), cfg=5.0, steps=2)
    torch.testing.assert_close(sample(edited, cfg=5.0, steps=2), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='Test: blocks is "block.1", but .* reads its text once'):
        add_edit(model, EditSpec("direction", Direction("d", d), blocks="block.1", node="Test"))
