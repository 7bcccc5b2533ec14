"""Edits in the cross-attentions of diffusion transformers, against the papers' formulas done slowly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import tiny
import torch
from comfy.model_patcher import ModelPatcher
from dits import CROSS, build, concept, cond, latent, sample, tokens
from torch import Tensor

from conceptguard.editing.edits.spec import Direction, EditSpec, Gate
from conceptguard.editing.engine.host import add_edit


def of_wan(network: Any, attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    text = network.text_embedding(text)
    return attn.norm_k(attn.k(text)), attn.v(text)


def of_cosmos(network: Any, attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    k = [attn.k_norm(head) for head in attn.k_proj(text).chunk(2, -1)]
    return torch.cat(k, -1), attn.v_proj(text)


def of_pixart(network: Any, attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    found = attn.kv_linear(network.y_embedder.y_proj(text))
    return found[..., :32], found[..., 32:]


# Of a network, one of its attentions and a text.
KEYS_VALUES: dict[str, Callable[[Any, Any, Tensor], tuple[Tensor, Tensor]]] = {
    "Wan": of_wan,
    "Cosmos-Predict2": of_cosmos,
    "PixArt": of_pixart,
}
every_family = pytest.mark.parametrize("name", CROSS)


def cre(model: ModelPatcher, **changes: Any) -> ModelPatcher:
    return add_edit(model, EditSpec("projection", concept(2), **{"options": tiny.CRE, "node": "Test", **changes}))


class Outputs:
    """q, k, v [B, L, C] of each cross-attention of the last call, and what goes into its output's projection."""

    def __init__(self, model: Any, name: str, text: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Tensor, ...]] = []
        (module, attention), outs = CROSS[name].attention, []
        plain = getattr(module, attention)

        def watched(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **more: Any) -> Tensor:
            out = plain(q, k, v, heads, *args, **more)
            if more.get("skip_reshape"):
                q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
            if k.shape[1] == text and q.shape[1] != text:
                self.calls.append((q.clone(), k.clone(), v.clone()))
            return out

        monkeypatch.setattr(module, attention, watched)
        for block in model.model.diffusion_model.blocks:
            attn = block.cross_attn
            last = next(getattr(attn, each) for each in ("o", "output_proj", "proj") if hasattr(attn, each))
            last.forward = kept(last.forward, outs)
        self.outs = outs


def kept(forward: Any, outs: list[Tensor]) -> Any:
    def keeping(x: Tensor, *args: Any) -> Tensor:
        outs.append(x.clone())
        return forward(x, *args)

    return keeping


@every_family
@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "cfg", "text", "dtype", "close"),
    [
        (1, 1.0, 9, torch.float32, 2e-4),
        (3, 5.0, 9, torch.float32, 2e-4),
        (2, 5.0, 4, torch.float32, 2e-4),
        (2, 5.0, 9, torch.bfloat16, 0.03),
    ],
)
def test_cre_edits_what_the_picture_finds_in_the_text(
    name: str, batch: int, cfg: float, text: int, dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, dtype)
    edited = cre(model, strength=0.7)
    seen = Outputs(model, name, text, monkeypatch)
    sample(name, edited, cond(tokens(1, text)), cond(tokens(2, text)), batch=batch, cfg=cfg)
    network, moved = model.model.diffusion_model, 0.0
    assert len(seen.calls) == len(seen.outs) == CROSS[name].blocks
    for block, (q, k, v), out in zip(network.blocks, seen.calls, seen.outs, strict=True):
        attn = block.cross_attn
        for row in range(len(q)):
            conditional = len(q) == batch or row >= batch

            def found(encoding: Tensor, attn: Any = attn, q: Tensor = q[row]) -> Tensor:
                k, v = KEYS_VALUES[name](network, attn, encoding.to(dtype))
                return reference.attention(q, k[0], v[0], CROSS[name].heads)

            A = reference.attention(q[row], k[row], v[row], CROSS[name].heads)
            At, A0 = [found(phrase.tokens) for phrase in concept(2).phrases], found(concept().baseline)
            s = [0.7 if conditional else 0.0] * 2
            want = reference.cre(A, At, s, 1, clip=True, joint=True, A0=A0)
            torch.testing.assert_close(out[row].double(), want, rtol=close, atol=close)
            moved = max(moved, float((want - A).abs().max()))
    assert moved > 3 * close


@every_family
def test_off_is_bit_identical(name: str) -> None:
    model = build(name)
    plain = sample(name, model, batch=2, cfg=5.0, steps=2)
    for off in ({"strength": 0.0}, {"gate": Gate((0.0,))}, {"start_percent": 0.5, "end_percent": 0.5}):
        assert torch.equal(sample(name, cre(model, **off), batch=2, cfg=5.0, steps=2), plain)
    assert not torch.allclose(sample(name, cre(model), batch=2, cfg=5.0, steps=2), plain, atol=1e-3)


@pytest.mark.parametrize("name", ["Wan", "Cosmos-Predict2"])
def test_another_packs_attention_is_kept(name: str) -> None:
    calls = []

    def theirs(plain: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(args[0]))
        return plain(*args, **kwargs)

    model = build(name)
    both = cre(model)
    both.model_options["transformer_options"]["optimized_attention_override"] = theirs
    assert torch.equal(sample(name, both), sample(name, cre(model)))
    assert len(calls) == 2 * CROSS[name].blocks


@every_family
def test_a_text_as_long_as_the_picture_is_told_from_it(name: str) -> None:
    model, n = build(name), latent(name).shape[-1] ** 2 // 4
    edited, (positive, longer) = cre(model), (cond(tokens(1, n)), cond(torch.cat([tokens(1, n)] * 2, 1)))
    same = sample(name, edited, positive), sample(name, edited, longer)
    torch.testing.assert_close(*same, rtol=1e-3, atol=1e-3)  # a text twice is found as once
    assert not torch.allclose(same[0], sample(name, model, positive), atol=1e-2)


@every_family
def test_nothing_stays_behind(name: str) -> None:
    model = build(name)
    plain = sample(name, model)
    sample(name, cre(model))
    assert torch.equal(sample(name, model), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.diffusion_model.modules())


@every_family
def test_a_direction_is_added_to_the_positive_prompt(name: str) -> None:
    model, d = build(name), tokens(3, 1)[0]
    edited = add_edit(model, EditSpec("direction", Direction("d", d), 0.7, node="Test"))
    expected = sample(name, model, cond(tokens(1, 9) + 0.7 * d), cfg=5.0, steps=2)
    torch.testing.assert_close(sample(name, edited, cfg=5.0, steps=2), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='Test: blocks is "block.1", but .* reads its text once'):
        add_edit(model, EditSpec("direction", Direction("d", d), blocks="block.1", node="Test"))
