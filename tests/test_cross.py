"""Edits in the cross-attentions of diffusion transformers, against the papers' formulas done slowly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.supported_models
import foreign_bypass as packs
import pytest
import reference
import tiny
import torch
from comfy.model_patcher import ModelPatcher
from dits import CROSS, build, concept, cond, latent, sample, tokens
from torch import Tensor

from conceptguard.editing.edits.digest import digest
from conceptguard.editing.edits.encode import rows_of
from conceptguard.editing.edits.spec import Concept, Direction, EditSpec, Gate, Phrase
from conceptguard.editing.engine.host import accounts_of, add_edit, add_watch
from conceptguard.editing.engine.watch import Watch
from conceptguard.editing.methods.cre import DEFAULTS
from conceptguard.editing.methods.eiup import EIUPOptions
from conceptguard.editing.methods.eiup_weight import train
from conceptguard.editing.methods.said import NARROW, SURE


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


def becoming() -> Concept:
    """One whose words show in any prompt that has them, and what its rows become."""
    own = rows_of(concept().phrases[0].tokens, (1, 2))[1:]
    like = tuple(torch.cat([tokens(20 + i, 4)[0], own + 0.3 * tokens(30 + i, len(own))[0]]) for i in range(2))
    phrase = replace(concept().phrases[0], like=like, becomes=(own, tokens(300, 9)[0, : len(own)]))
    ordinary = tuple(tokens(40 + i, 9)[0] for i in range(3))
    return replace(concept(), phrases=(phrase,), neutral=tokens(9, 9), ordinary=ordinary, instead=tokens(300, 9))


def read_anew(
    make: Callable[[Tensor], tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, heads: int, s: float
) -> tuple[Tensor, Tensor]:
    """One row's output in double precision, by reference.py, and what eq. 4 alone would make of it, were nothing read
    anew. make: of a text [n, W] to its keys and values; q: [N, C]; k, v: [L, C]."""
    it = becoming()
    (phrase,) = it.phrases

    def found(text: Any) -> Tensor:
        return reference.attention(q, *make(text), heads)

    like, ordinary = ([make(x)[1] for x in some] for some in (phrase.like, it.ordinary))
    own = make(rows_of(phrase.tokens, phrase.own)[1:])[1]
    share = reference.said(v, own, like, ordinary, sure=SURE, spread=NARROW)
    A, At, A0, Ar = reference.attention(q, k, v, heads), *map(found, (phrase.tokens[0], it.neutral[0], it.instead[0]))
    floor = 0.1 * (1.7 + (0.4 - 1.7) * share)
    more_k, more_v = reference.reread(k, v, *map(make, phrase.becomes), torch.cat(ordinary))
    near = torch.cosine_similarity(A - A0, At - A0, dim=-1)[:, None] >= floor
    lost = A - reference.attention(q, k + more_k, v + more_v, heads)
    outs = (A - share * s * near * lost, A) if share else (A, A)
    cre = [
        reference.cre(each, [At], [s], 1, True, False, A0, [floor], instead=[Ar], beyond=[more])
        for each, more in zip(outs, (share > 0, False), strict=True)
    ]
    return cre[0], cre[1]


@every_family
@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "cfg", "dtype", "close"),
    [
        (1, 1.0, torch.float32, 1e-3),
        (3, 5.0, torch.float32, 1e-3),
        (2, 5.0, torch.bfloat16, 0.025),
    ],
)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_prompt_that_says_the_concept_is_read_anew(
    name: str,
    batch: int,
    cfg: float,
    dtype: torch.dtype,
    close: float,
    strength: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By UCE's closed form in each attention's own keys and values, though its keys are not linear in the text; the
    negative prompt, which says it as well, is left alone."""
    model, options = build(name, dtype), replace(DEFAULTS, floor=0.1, solve="sum")
    edited = add_edit(model, EditSpec("projection", becoming(), strength, options=options, node="Test"))
    prompt, rows = tokens(1, 12), becoming().phrases[0].becomes[0]  # type: ignore[index]
    prompt[0, 4 : 4 + len(rows)] = rows
    seen = Outputs(model, name, 12, monkeypatch)
    sample(name, edited, cond(prompt), cond(prompt.roll(2, 1)), batch=batch, cfg=cfg)
    network, far, moved = model.model.diffusion_model, [], []
    assert len(seen.calls) == len(seen.outs) == CROSS[name].blocks
    for block, (q, k, v), out in zip(network.blocks, seen.calls, seen.outs, strict=True):

        def make(text: Tensor, attn: Any = block.cross_attn) -> tuple[Tensor, Tensor]:
            K, V = KEYS_VALUES[name](network, attn, text[None].to(dtype))
            return K[0].double(), V[0].double()

        for row in range(len(q)):
            if len(q) > batch and row < batch:
                A = reference.attention(q[row], k[row], v[row], CROSS[name].heads)
                torch.testing.assert_close(out[row].double(), A, rtol=close, atol=close)
                continue
            want, of_eq_4 = read_anew(make, q[row], k[row], v[row], CROSS[name].heads, strength)
            far.append(float(((out[row].double() - want).abs().amax(-1) > close).float().mean()))
            moved.append(float(((of_eq_4 - want).abs().amax(-1) > 3 * close).float().mean()))
    assert max(far) < 0.05 and min(moved) > 0.9  # a cosine at the very floor falls on either side


@torch.no_grad()
def test_a_block_behind_one_that_is_left_out_has_its_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip Layer Guidance asks for the positive prompt once more, without some blocks, and without counting them."""
    model = build("Wan")
    edited = cre(model, blocks="block.1", strength=0.7)
    edited.set_model_patch_replace(lambda args, _: args, "dit", "double_block", 0)
    seen = Outputs(model, "Wan", 9, monkeypatch)
    sample("Wan", edited)
    ((q, k, v),), (out,) = seen.calls, seen.outs
    network = model.model.diffusion_model
    heads = CROSS["Wan"].heads

    def found(encoding: Tensor) -> Tensor:
        k, v = of_wan(network, network.blocks[1].cross_attn, encoding)
        return reference.attention(q[0], k[0], v[0], heads)

    A, At = reference.attention(q[0], k[0], v[0], heads), [found(phrase.tokens) for phrase in concept(2).phrases]
    want = reference.cre(A, At, [0.7] * 2, 1, clip=True, joint=True, A0=found(concept().baseline))
    torch.testing.assert_close(out[0].double(), want, rtol=2e-4, atol=2e-4)
    assert not torch.allclose(want, A, atol=1e-2)


def twice(given: Any, more: Any) -> Any:
    """A pack's block that calls the host's own again, as for another look at it."""
    more["original_block"](dict(given))
    return more["original_block"](given)


@pytest.mark.parametrize("name", ["Wan", "Cosmos-Predict2"])
def test_a_block_that_is_called_twice_has_its_own_keys_both_times(name: str) -> None:
    model = build(name)
    edited = cre(model)
    plain = sample(name, edited, steps=2)
    edited.set_model_patch_replace(twice, "dit", "double_block", 0)
    assert torch.equal(sample(name, edited, steps=2), plain)


@torch.no_grad()
@pytest.mark.parametrize("text", [9, 5, 16], ids=["as long as the prompt", "shorter", "as long as the picture"])
@pytest.mark.parametrize("order", [False, True])
def test_beside_a_guidance_within_the_attentions(order: bool, text: int) -> None:
    """KJNodes' WanVideoNAG: what it finds in the prompt is edited with the block's own keys, its own text is not."""
    model, heads = build("Wan"), CROSS["Wan"].heads
    nag = packs.WanVideoNAG(tokens(50, text))
    edited = nag.patch(cre(model, strength=0.7)) if order else cre(nag.patch(model), strength=0.7)
    plain = sample("Wan", nag.patch(model), cond(tokens(1, text)), batch=2)
    nag.looked.clear()
    made = sample("Wan", edited, cond(tokens(1, text)), batch=2)
    assert len(nag.looked) == 2 * CROSS["Wan"].blocks and not torch.allclose(made, plain, atol=1e-2)
    network, moved = model.model.diffusion_model, 0.0
    for i, (q, k, v, out) in enumerate(nag.looked):
        attn = network.blocks[i // 2].cross_attn
        for row in range(2):
            A = reference.attention(q[row], k[row], v[row], heads)

            def found(encoding: Tensor, attn: Any = attn, q: Tensor = q[row]) -> Tensor:
                return reference.attention(q, *(x[0] for x in of_wan(network, attn, encoding)), heads)

            At, A0 = [found(phrase.tokens) for phrase in concept(2).phrases], found(concept().baseline)
            want = A if i % 2 else reference.cre(A, At, [0.7] * 2, 1, clip=True, joint=True, A0=A0)
            torch.testing.assert_close(out[row].double(), want, rtol=2e-4, atol=2e-4)
            moved = max(moved, float((want - A).abs().max()))
    assert moved > 0.01
    accounts = accounts_of(edited)
    assert accounts is not None and (account := accounts.of("")) is not None
    (only,) = account.entries.values()
    assert not only.missed and (only.installed, only.edited) == (1, 2)
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("order", [False, True])
def test_beside_skip_layer_guidance(order: bool) -> None:
    """Whoever patches first, both passes of the prompt are edited."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    def guided(m: ModelPatcher) -> ModelPatcher:
        return SkipLayerGuidanceDiT.execute(m, 3.0, 0.0, 1.0, "0", "", 0.0).args[0]

    model = build("Wan")
    edited = guided(cre(model)) if order else cre(guided(model))
    assert not torch.equal(sample("Wan", guided(model), cfg=5.0), picture := sample("Wan", edited, cfg=5.0))
    assert torch.equal(picture, sample("Wan", cre(guided(cre(model)), strength=0.0), cfg=5.0))
    accounts = accounts_of(edited)
    assert accounts is not None and (found := accounts.of("")) is not None
    (only,) = found.entries.values()
    assert (only.installed, only.edited, only.seen) == (2, 2, 3) and not only.missed


def prompt_of_anima(seed: int, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Its encoding, and the T5 tokens that the model's adapter reads with it: more of them, or fewer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 30000, (length + seed % 3 - 1,), generator=generator)
    return torch.randn(1, length, 1024, generator=generator), {
        "t5xxl_ids": ids,
        "t5xxl_weights": torch.rand(len(ids), generator=generator) + 0.5,
    }


@pytest.mark.skipif(not hasattr(comfy.supported_models, "Anima"), reason="this host has no Anima")
@pytest.mark.parametrize(("batch", "cfg"), [(1, 1.0), (2, 5.0)])
def test_anima_reads_a_concept_through_its_adapter(batch: int, cfg: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the prompts that the baseline is the mean of, and then their mean."""
    (knife, said), *ordinary = (prompt_of_anima(seed, 5) for seed in (3, 4, 5))
    neutral = torch.cat([x for x, _ in ordinary]).mean(0, keepdim=True)
    beside = {digest((knife[0],)): ({"tokens": knife, **said},)}
    beside[digest((neutral[0],))] = tuple({"tokens": x, **more} for x, more in ordinary)
    it = Concept("knife", (Phrase("knife", knife, (1,)),), neutral, beside=beside)
    model, (words, of_words) = build("Anima"), prompt_of_anima(1, 7)
    spec = EditSpec("projection", it, 0.7, options=tiny.CRE, node="Test")
    edited = add_edit(model, spec)
    seen = Outputs(model, "Cosmos-Predict2", 512, monkeypatch)
    with torch.inference_mode():
        negative = cond(prompt_of_anima(2, 7)[0], **of_words)
        sample("Anima", edited, cond(words, **of_words), negative, batch=batch, cfg=cfg)
        network, moved = model.model.diffusion_model, 0.0

        def adapted(x: Tensor, more: dict[str, Tensor]) -> Tensor:
            out = network.llm_adapter(x, more["t5xxl_ids"][None]) * more["t5xxl_weights"][None, :, None]
            return torch.cat([out, torch.zeros(1, 512 - out.shape[1], 1024)], 1)

        texts = [adapted(knife, said), (adapted(*ordinary[0]) + adapted(*ordinary[1])) / 2]
        assert len(seen.calls) == len(seen.outs) == 2
        for block, (q, k, v), out in zip(network.blocks, seen.calls, seen.outs, strict=True):
            for row in range(len(q)):
                A = reference.attention(q[row], k[row], v[row], 2)
                At, A0 = (
                    reference.attention(q[row], *(x[0] for x in of_cosmos(network, block.cross_attn, text)), 2)
                    for text in texts
                )
                s = 0.7 if len(q) == batch or row >= batch else 0.0
                want = reference.cre(A, [At], [s], 1, clip=True, joint=True, A0=A0)
                torch.testing.assert_close(out[row].double(), want, rtol=2e-4, atol=2e-4)
                moved = max(moved, float((want - A).abs().max()))
        assert moved > 1e-3
    with pytest.raises(ValueError, match='Test: concept "knife" lacks what Anima .* reads of a prompt beside'):
        add_edit(model, replace(spec, source=replace(it, beside={})))


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
def test_a_map_and_a_weight_that_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the watch sees of a concept's own tokens, and a weight that a first look finds by it."""
    model, it = build(name), concept()
    watch, plain = Watch(it, "Test"), sample(name, model, batch=2)
    seen = Outputs(model, name, 9, monkeypatch)
    assert torch.equal(sample(name, add_watch(model, watch), batch=2), plain)
    network = model.model.diffusion_model
    for block, (q, _, _), (maps,) in zip(network.blocks, seen.calls, watch.maps.values(), strict=True):
        K, _ = KEYS_VALUES[name](network, block.cross_attn, it.phrases[0].tokens)
        for row in range(2):
            heads = zip(
                q[row].double().chunk(CROSS[name].heads, -1), K[0].double().chunk(CROSS[name].heads, -1), strict=True
            )
            A_e = torch.stack([torch.softmax(a @ b.T / b.shape[-1] ** 0.5, -1) for a, b in heads], 1)
            want = A_e[..., list(it.phrases[0].own)].sum(-1).mean(-1)
            torch.testing.assert_close(maps[0, row].flatten().double(), want, rtol=1e-3, atol=1e-5)
    x = watch.features(watch.maps)[0]
    auto = train(x.repeat(8, 1), torch.full((16,), -20.0), ["block.0.0", "block.1.0"], steps=1)
    found, given = (
        add_edit(model, EditSpec("erasure", it, options=EIUPOptions(**options), node="Test"))
        for options in ({"auto": auto}, {"weights": (-20.0,)})
    )
    torch.testing.assert_close(sample(name, found, batch=2), sample(name, given, batch=2), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(sample(name, found, batch=2), plain, atol=1e-2)


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
