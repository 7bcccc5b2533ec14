"""What a mask hides of a prompt is no part of it, and what it weighs counts as it weighs: each row of a batch whose
prompts are padded to one length is edited as it would be alone, and as the formulas say of the tokens that are seen."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import comfy.conds
import comfy.ldm.qwen_image.model
import comfy.model_base
import comfy.sample
import dits
import pytest
import reference
import tiny
import torch
from comfy.ldm.flux.redux import ReduxImageEncoder
from comfy.sd import StyleModel
from dits import FAMILIES, cond, tokens
from nodes import StyleModelApply
from test_joint import Seen, as_prompt, weight
from torch import Tensor

from conceptguard.editing.edits.encode import rows_of
from conceptguard.editing.edits.spec import Concept, Direction, EditSpec
from conceptguard.editing.engine import plan
from conceptguard.editing.engine.host import add_edit, add_watch
from conceptguard.editing.engine.watch import Watch
from conceptguard.editing.methods import eiup
from conceptguard.editing.methods.cre import DEFAULTS
from conceptguard.editing.methods.eiup import EIUPOptions

QWEN, FLUX = "Qwen-Image", "Flux.1"
LENGTHS = (12, 7)  # of a batch's prompts


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image as newer hosts call it: older ones drop the text's mask on the way to the attentions."""
    model = comfy.model_base.QwenImage
    if "attention_mask" in inspect.getsource(model.extra_conds):
        return
    conds, forward = model.extra_conds, comfy.ldm.qwen_image.model.Attention.forward

    def extra_conds(self: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        return conds(self, **kwargs) | ({} if mask is None else {"attention_mask": comfy.conds.CONDRegular(mask)})

    def masking(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **more: Any) -> Any:
        hidden = more.pop("encoder_hidden_states_mask", None)
        if hidden is not None:
            bias = (hidden - 1).to(hidden_states) * torch.finfo(hidden_states.dtype).max
            more["attention_mask"] = torch.nn.functional.pad(bias, (0, hidden_states.shape[1]))[:, None]
        return forward(self, hidden_states, encoder_hidden_states, *args, **more)

    monkeypatch.setattr(model, "extra_conds", extra_conds)
    monkeypatch.setattr(comfy.ldm.qwen_image.model.Attention, "forward", masking)


def told() -> Concept:
    """One whose words show in any prompt that has them."""
    concept = dits.concept()
    rows = rows_of(concept.phrases[0].tokens, concept.phrases[0].own)
    like = tuple(torch.cat([tokens(20 + i, 4)[0], rows + 0.3 * tokens(30 + i, len(rows))[0]]) for i in range(2))
    phrases = (replace(concept.phrases[0], like=like),)
    return replace(concept, phrases=phrases, ordinary=tuple(tokens(40 + i, 9)[0] for i in range(3)))


def prompts(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    """Two of unlike lengths, [1, T, W] each; both in one batch, [2, T, W], padded with words that say the concept; and
    its mask, [2, T]."""
    each = [tokens(1 + i, length) for i, length in enumerate(LENGTHS)]
    words = told().phrases[0].tokens[:, 1:]
    rows = [torch.cat([x, words], 1)[:, : max(LENGTHS)] for x in each]
    mask = torch.tensor([[1] * length + [0] * (max(LENGTHS) - length) for length in LENGTHS])
    return each, torch.cat(rows), mask


def noise(name: str, batch: int = 2) -> Tensor:
    return comfy.sample.prepare_noise(dits.latent(name, batch), 5)


def sample(model: Any, noise: Tensor, positive: Any, negative: Any = None, cfg: float = 1.0) -> Tensor:
    negative = cond(tokens(9, 5)) if negative is None else negative
    empty = torch.zeros_like(noise)
    return comfy.sample.sample(
        model, noise, 1, cfg, "euler", "simple", positive, negative, empty, disable_pbar=True, seed=5
    )


TOKENS = replace(DEFAULTS, floor=0.1, solve="sum")
EDITS: dict[str, EditSpec] = {
    "CRE": EditSpec("projection", dits.concept(2), 0.7, options=tiny.CRE, node="Test"),
    "CRE by tokens": EditSpec("projection", told(), options=TOKENS, node="Test"),
    "EIUP": EditSpec("erasure", dits.concept(), options=EIUPOptions(weights=(-20.0,)), node="Test"),
    "EIUP by share": EditSpec(
        "erasure", dits.concept(), options=EIUPOptions("separate", (-20.0,), "share"), node="Test"
    ),
    "EIUP by likeness": EditSpec("erasure", told(), options=EIUPOptions("separate", (-1.0,), "alike"), node="Test"),
    "EIUP joint": EditSpec("erasure", dits.concept(), options=EIUPOptions("joint", (-2.0,)), node="Test"),
    "a direction": EditSpec("direction", Direction("d", tokens(3, 1)[0]), 0.7, node="Test"),
}


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("edit", EDITS)
def test_each_row_of_a_padded_batch_is_as_alone(edit: str, cfg: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eiup, "FLOOR", 0.05)  # a random network finds little alike
    model = dits.build(QWEN)
    each, both, mask = prompts()
    positive, start = cond(both, attention_mask=mask), noise(QWEN)
    for made in (model, add_edit(model, EDITS[edit])):
        together = sample(made, start, positive, cfg=cfg)
        for i, prompt in enumerate(each):
            alone = sample(made, start[i : i + 1], cond(prompt), cfg=cfg)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)
    unedited = sample(model, start, positive, cfg=cfg)
    assert all((together[i] - unedited[i]).abs().max() > 0.01 for i in range(2))


def half_said(share: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """As `prompts`, of which each says something of the concept: its words, as far as `share`."""
    each, both, mask = prompts()
    words = told().phrases[0].tokens[:, 1:3]
    for i, prompt in enumerate(each):
        prompt[:, 2:4] = both[i : i + 1, 2:4] = share * words + (1 - share) * prompt[:, 2:4]
    return each, both, mask


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_words_in_the_padding_read_nothing_anew(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MARGIN", 0.0)
    model, it = dits.build(QWEN), told()
    rows = rows_of(it.phrases[0].tokens, it.phrases[0].own)[1:]
    read = []
    for becomes in (None, (rows, tokens(300, 9)[0, : len(rows)])):
        source = replace(it, phrases=(replace(it.phrases[0], becomes=becomes),))
        edited = add_edit(model, EditSpec("projection", source, options=TOKENS, node="Test"))
        each, both, mask = half_said(share)
        together = sample(edited, noise(QWEN), cond(both, attention_mask=mask))
        for i, prompt in enumerate(each):
            alone = sample(edited, noise(QWEN)[i : i + 1], cond(prompt))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)
        read.append(together)
    assert all(((a - b).abs().max() > 0.01) == (share > 0.5) for a, b in zip(*read, strict=True))


def weighed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, text: int, image: int, edited: Any) -> tuple[Tensor, Tensor]:
    """O_I of one row as it is without the edit and with it, one position and head at a time, in double precision.

    q, k, v: [L, H, d]; bias: [L, L], what the mask adds; edited: from A_t [N, C] to what becomes of it, and how many
    times what it was the text's weight is then, [N, H].
    """
    heads, d = q.shape[1:]
    A_t, m = torch.zeros(image, heads, d, dtype=torch.double), torch.zeros(image, heads, 1, dtype=torch.double)
    A_i = torch.zeros_like(A_t)
    for n in range(image):
        for h in range(heads):
            z = (k[:, h].double() @ q[text + n, h].double() / d**0.5 + bias[text + n].double()).exp()
            A_t[n, h] = z[:text] @ v[:text, h].double() / z[:text].sum()
            A_i[n, h] = z[text:] @ v[text:, h].double() / z[text:].sum()
            m[n, h] = z[:text].sum() / z.sum()
    changed, heavier = edited(A_t.flatten(1))
    m_e = m * heavier[..., None] / (m * heavier[..., None] + 1 - m)
    return (m * A_t + (1 - m) * A_i).flatten(1), (m_e * changed.unflatten(-1, (heads, d)) + (1 - m_e) * A_i).flatten(1)


def redux(strength: float) -> Any:
    """A prompt with a picture's five tokens behind its own, by the host's StyleModelApply, which weighs them."""
    model = StyleModel(ReduxImageEncoder(5, dits.WIDTH))
    for i, parameter in enumerate(model.model.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.4
    looked = SimpleNamespace(last_hidden_state=torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(8)))
    return StyleModelApply().apply_stylemodel(cond(tokens(1, 7)), model, looked, strength, "attn_bias")[0]


def brought(case: str, dtype: torch.dtype) -> tuple[str, Any, Tensor]:
    """The model's name, the positive prompt, and what its mask adds to the logits of its 12 tokens: [2, 12]."""
    if case == "padding":
        _, both, mask = prompts()
        return QWEN, cond(both, attention_mask=mask), torch.where(mask > 0, 0.0, -torch.inf)
    strength = float(case.split()[1])
    bias = torch.full((5,), strength).log().half().to(dtype).float()
    return FLUX, redux(strength), torch.cat([torch.zeros(7), bias]).expand(2, -1)


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-3), (torch.bfloat16, 0.04)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("case", ["padding", "Redux 0.3", "Redux 0.001", "Redux 3"])
@pytest.mark.parametrize("edit", ["CRE", "EIUP by share"])
def test_the_formulas_are_of_what_the_mask_lets_be_seen(
    case: str, edit: str, cfg: float, dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, positive, of_text = brought(case, dtype)
    model, seen, text = dits.build(name, dtype), Seen(name, monkeypatch), 12
    spec, image = EDITS[edit], seen.image
    phrases = spec.source.phrases if edit == "CRE" else spec.source.phrases[:1]
    texts = [spec.source.baseline, *(phrase.tokens for phrase in phrases)]
    base, *others = (as_prompt(name, model, seen, each, 2) for each in texts)
    seen.calls.clear()
    negative = cond(tokens(9, 6))  # in a call of its own
    dits.sample(name, add_edit(model, spec), positive, negative, batch=2, cfg=cfg)
    long = [call for call in seen.calls if call[0].shape[1] == text + image]
    heads, moved = FAMILIES[name].heads, 0.0
    for i, (q, k, v, out) in enumerate(long[-FAMILIES[name].blocks :]):
        for row in range(2):
            bias = torch.zeros(text + image, text + image)
            bias[text:, :text] = of_text[row]
            queries = q[row, text:]

            def found(kv: tuple[Tensor, Tensor], q: Tensor = queries, row: int = row) -> Tensor:
                return reference.attention(q.flatten(1), *(x[row].flatten(1) for x in kv), heads)

            def edited(
                A_t: Tensor,
                i: int = i,
                row: int = row,
                queries: Tensor = queries,
                K_P: Tensor = k[row, :text],
                found: Any = found,
            ) -> tuple[Tensor, Tensor]:
                heavier = torch.ones(image, heads, dtype=torch.double)
                if edit == "CRE":
                    taken: list[Tensor] = []
                    At, s = [found(each[i]) for each in others], [0.7] * len(others)
                    after = reference.cre(A_t, At, s, 1, clip=True, joint=True, A0=found(base[i]), taken=taken)
                    for each, c in zip(others, taken[0].T, strict=True):
                        Z = (weight(queries, kv[i][0][row]) for kv in (base, each))
                        heavier *= (next(Z) / next(Z)) ** c.clamp(0, 1)[:, None]
                    return after, heavier
                K, V = (x[row] for x in others[0][i])
                own = list(phrases[0].own)
                Z_own = weight(queries, K[own])
                Z_P = torch.einsum("nhd,thd->nht", queries.double(), K_P.double()).div(queries.shape[-1] ** 0.5)
                Z_P = (Z_P + of_text[row]).exp().sum(-1)
                w = [-20.0 if j in own else 0.0 for j in range(len(K))]
                given = Z_own / (Z_own + Z_P)
                return reference.eiup(A_t, queries.flatten(1), K.flatten(1), V.flatten(1), w, heads, given), heavier

            plain, want = weighed(q[row], k[row], v[row], bias, text, image, edited)
            torch.testing.assert_close(out[row, text:].flatten(1).double(), want, rtol=close, atol=close)
            moved = max(moved, float((want - plain).abs().max()))
    assert moved > 3 * close


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize("evidence", ["none", "share"])
def test_a_map_beside_a_mask_is_each_rows_own(evidence: str) -> None:
    model, start = dits.build(QWEN), noise(QWEN)
    each, both, mask = prompts()
    whole, *alone = (Watch(dits.concept(2), "Test", evidence=evidence) for _ in range(3))
    sample(add_watch(model, whole), start, cond(both, attention_mask=mask))
    for i, (prompt, watch) in enumerate(zip(each, alone, strict=True)):
        sample(add_watch(model, watch), start[i : i + 1], cond(prompt))
        for key, (maps,) in watch.maps.items():
            torch.testing.assert_close(whole.maps[key][0][:, i : i + 1], maps, rtol=1e-3, atol=1e-4)


# HiDream's second encoder says a prompt of its own for each row.
EVERY = [name for name in (*dits.FAMILIES, *dits.CROSS) if name != "HiDream"]


@pytest.mark.parametrize("edit", ["CRE", "CRE by tokens", "EIUP by share"])
@pytest.mark.parametrize("name", EVERY)
def test_where_nothing_masks_them_padded_rows_are_texts_as_they_stand(name: str, edit: str) -> None:
    """Wan, PixArt, Cosmos-Predict2, Lumina, Z-Image, SD3: the host pads, and the model reads the padding as well."""
    model = dits.build(name)
    _, both, _ = prompts()
    edited, start = add_edit(model, EDITS[edit]), noise(name)
    together, plain = (sample(made, start, cond(both)) for made in (edited, model))
    for i in range(2):
        alone = sample(edited, start[i : i + 1], cond(both[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)
        assert (together[i] - plain[i]).abs().max() > 1e-3
