"""Edits in joint attentions, against the formulas of backbones/joint.py done slowly, in the host's own classes.

What the model's attentions get and give is taken down around the host's own functions, outside of all overrides; what a
concept becomes in each block is what the unedited model makes of it as its prompt.
"""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import comfy.ldm.lumina.model
import dits
import pytest
import reference
import tiny
import torch
from comfy.ldm.flux.redux import ReduxImageEncoder
from comfy.sd import StyleModel
from dits import APPENDED, FAMILIES, cond, tokens
from nodes import StyleModelApply
from torch import Tensor

from conceptguard.editing.edits.concept import concept_from_conditioning
from conceptguard.editing.edits.encode import rows_of
from conceptguard.editing.edits.families import TRANSFORMERS, UNETS
from conceptguard.editing.edits.spec import Concept, Direction, EditSpec, Gate, InFlight, Phrase, PromptTokens
from conceptguard.editing.engine import plan
from conceptguard.editing.engine.backbones import cross, joint, unet
from conceptguard.editing.engine.backbones.joint import Joint, sections
from conceptguard.editing.engine.host import accounts_of, add_edit, add_watch, of_model
from conceptguard.editing.engine.streams import ModelCall
from conceptguard.editing.engine.watch import Watch
from conceptguard.editing.methods import cre as cre_method
from conceptguard.editing.methods import said
from conceptguard.editing.methods.eiup import DEFAULTS as EIUP
from conceptguard.editing.methods.eiup import EIUPOptions
from conceptguard.editing.methods.eiup_weight import train
from conceptguard.editing.methods.said import CLEAR, COMMON, LEADS, MARGIN, SPREAD, SURE, UNKNOWN
from conceptguard.editing.presets.document import read, write
from conceptguard.nodes.preset import suits

IMAGE = (dits.SIZE // 2) ** 2
CRE_BY_TOKENS = replace(tiny.CRE, floor=0.1, evidence="tokens")


class Seen:
    """q, k, v and the output, [B, L, H, d], of every joint attention of the last call, in order."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.family, self.calls = FAMILIES[name], []
        module, attention = self.family.attention
        plain = getattr(module, attention)

        def watched(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **more: Any) -> Tensor:
            out = plain(q, k, v, heads, *args, **more)
            shapes = [self.by_token(x, heads) for x in (q, k, v)]
            found = out.unflatten(-1, (heads, -1)).clone()
            self.calls.append((*shapes, found if self.family.text_first else found.roll(-self.image, 1)))
            return out

        monkeypatch.setattr(module, attention, watched)

    def by_token(self, x: Tensor, heads: int) -> Tensor:
        """[B, L, H, d], the text first."""
        x = x.transpose(1, 2) if self.family.heads_first else x.reshape(*x.shape[:2], heads, -1)
        return x.clone() if self.family.text_first else x.roll(-self.image, 1)

    @property
    def image(self) -> int:
        return (dits.SIZE // self.family.patch) ** 2

    def text(self, prompt: int) -> int:
        text = max(self.family.least, -(-prompt // self.family.multiple) * self.family.multiple)
        return text + self.family.beside

    def last(self, prompt: int) -> list[tuple[Tensor, ...]]:
        """The joint attentions of the last model call, whose prompt had that many tokens."""
        long = [call for call in self.calls if call[0].shape[1] >= self.text(prompt) + self.image]
        return long[-self.family.blocks :]


def as_prompt(name: str, model: Any, seen: Seen, encoding: Tensor, batch: int) -> list[tuple[Tensor, Tensor]]:
    """The keys and values that each block makes of a text: [B, T, H, d]."""
    seen.calls.clear()
    dits.sample(name, model, cond(encoding), batch=batch)
    n = seen.text(encoding.shape[1])
    return [(k[:, :n], v[:, :n]) for _, k, v, _ in seen.last(encoding.shape[1])]


def expected(q: Tensor, k: Tensor, v: Tensor, text: int, image: int, edited: Any) -> tuple[Tensor, Tensor]:
    """O_I of one row as it is without the edit and with it; edited: from A_t, [N, C], to what becomes of it, and how
    many times what it was the text's weight is then, beside the picture's, [N, H]."""
    heads, d = q.shape[1:]
    q, k, v = (x.double() for x in (q[text : text + image], k, v))
    A_t = torch.zeros(image, heads, d, dtype=torch.double)
    A_i, m = torch.zeros_like(A_t), torch.zeros(image, heads, 1, dtype=torch.double)
    for n in range(image):
        for h in range(heads):
            z = (k[:, h] @ q[n, h] / d**0.5).exp()
            A_t[n, h] = z[:text] @ v[:text, h] / z[:text].sum()
            A_i[n, h] = z[text:] @ v[text:, h] / z[text:].sum()
            m[n, h] = z[:text].sum() / z.sum()
    changed, heavier = edited(A_t.flatten(1))
    m_e = m * heavier[..., None] / (m * heavier[..., None] + 1 - m)
    return (m * A_t + (1 - m) * A_i).flatten(1), (m_e * changed.unflatten(-1, (heads, d)) + (1 - m_e) * A_i).flatten(1)


def weight(q: Tensor, k: Tensor) -> Tensor:
    """sum_j exp(q k_j / sqrt d), [N, H]. q: [N, H, d]; k: [T, H, d]."""
    return torch.einsum("nhd,thd->nht", q.double(), k.double()).div(q.shape[-1] ** 0.5).exp().sum(-1)


every_form = pytest.mark.parametrize(
    ("name", "form"), [*((name, "beside") for name in FAMILIES), *((name, "appended") for name in APPENDED)]
)


def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every concept in a model call of its own."""
    monkeypatch.setattr(Joint, "appends", lambda *_: False)


def cut(call: tuple[Tensor, ...], text: int, others: list[int]) -> list[tuple[Tensor, ...]]:
    """An attention of a prompt with other texts behind it: the prompt's and the picture's part, then each text's."""
    pieces = [x.split([text, *others, x.shape[1] - text - sum(others)], 1) for x in call]
    return [tuple(torch.cat([x[0], x[-1]], 1) for x in pieces)] + [
        tuple(x[i] for x in pieces) for i in range(1, 1 + len(others))
    ]


def check_cre(
    name: str,
    model: Any,
    concept: Concept,
    monkeypatch: Any,
    prompt: int,
    batch: int,
    cfg: float,
    close: float,
    form: str = "beside",
) -> None:
    strength = 0.7
    positive, negative = cond(tokens(1, prompt)), cond(tokens(2, prompt))
    seen = Seen(name, monkeypatch)
    texts = [concept.baseline, *(phrase.tokens for phrase in concept.phrases)]
    lengths = [seen.text(each.shape[1]) for each in texts]
    if form == "beside":
        beside(monkeypatch)
        streams = [as_prompt(name, model, seen, each, batch) for each in texts]
    spec = EditSpec("projection", concept, strength, options=tiny.CRE, node="Test")
    seen.calls.clear()
    dits.sample(name, add_edit(model, spec), positive, negative, batch=batch, cfg=cfg)
    text, image = seen.text(prompt), seen.image
    moved, heads = 0.0, FAMILIES[name].heads
    for i, call in enumerate(seen.last(prompt)):
        if form == "beside":
            q, k, v, out = call
            others = [stream[i] for stream in streams]
        else:
            (q, k, v, out), *apart = cut(call, text, lengths)
            first = len(q) - batch  # conditional rows are the last
            others = [(each[1][first:], each[2][first:]) for each in apart]
            for q_e, k_e, v_e, out_e in apart:  # reads itself and the picture
                for row in range(first, len(q)):
                    K, V = (torch.cat([own[row], x[row, text:]]).flatten(1) for own, x in ((k_e, k), (v_e, v)))
                    want = reference.attention(q_e[row].flatten(1), K, V, q.shape[2])
                    torch.testing.assert_close(out_e[row].flatten(1).double(), want, rtol=close, atol=close)
        base, *phrases = others
        for row in range(len(q)):
            picture, conditional = row % batch, len(q) == batch or row >= batch

            def found(kv: tuple[Tensor, Tensor], q: Tensor = q[row], picture: int = picture) -> Tensor:
                rows = (x[picture].flatten(1) for x in kv)
                return reference.attention(q[text : text + image].flatten(1), *rows, q.shape[1])

            def found_weight(kv: tuple[Tensor, Tensor], q: Tensor = q[row], picture: int = picture) -> Tensor:
                return weight(q[text : text + image], kv[0][picture])

            def edited(
                A_t: Tensor,
                found: Any = found,
                conditional: bool = conditional,
                base: Any = base,
                phrases: Any = phrases,
                weight: Any = found_weight,
            ) -> tuple[Tensor, Tensor]:
                if not conditional:
                    return A_t, torch.ones(image, heads)
                At, s, taken = [found(each) for each in phrases], [strength] * len(phrases), []
                out = reference.cre(A_t, At, s, 1, clip=True, joint=True, A0=found(base), taken=taken)
                heavier = torch.ones(image, heads, dtype=torch.double)
                for each, c in zip(phrases, taken[0].T, strict=True):
                    heavier *= (weight(base) / weight(each)) ** c.clamp(0, 1)[:, None]
                return out, heavier

            plain, want = expected(q[row], k[row], v[row], text, image, edited)
            got = out[row, text : text + image].flatten(1).double()
            torch.testing.assert_close(got, want, rtol=close, atol=close)
            of_text = reference.attention(q[row, :text].flatten(1), k[row].flatten(1), v[row].flatten(1), q.shape[2])
            torch.testing.assert_close(out[row, :text].flatten(1).double(), of_text, rtol=close, atol=close)
            if conditional:
                moved = max(moved, float((want - plain).abs().max()))
    assert moved > 3 * close


@every_form
@pytest.mark.parametrize(("batch", "cfg", "prompt"), [(1, 1.0, 9), (3, 5.0, 4), (2, 5.0, 12)], ids=str)
def test_cre_takes_the_concept_from_what_the_picture_finds_in_the_text(
    name: str, form: str, batch: int, cfg: float, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_cre(name, dits.build(name), dits.concept(2), monkeypatch, prompt, batch, cfg, 2e-4, form)


@every_form
def test_in_bf16(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dits.build(name, torch.bfloat16)
    check_cre(name, model, dits.concept(), monkeypatch, 9, 2, 5.0, 0.03, form)


@pytest.mark.parametrize("name", APPENDED)
@pytest.mark.parametrize("strength", [1e-12, 1.0])
def test_a_text_behind_the_prompt_is_what_the_prompt_would_be(
    name: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt's own words, behind others of another length: the same keys and values as the prompt's, wherever they
    stand, in every block of a picture that is edited as it goes; and at no strength the picture without an edit."""
    model, seen = dits.build(name), Seen(name, monkeypatch)
    if name == "Z-Image":  # 16 tokens of picture are filled up to 32, by tokens that stand at 0, wherever a text is
        monkeypatch.setattr(dits, "SIZE", 16)
    words = tokens(1, 9)
    same = replace(dits.concept(1, 7), phrases=(Phrase("it", words, (1,)), *dits.concept(1, 40).phrases))
    plain = dits.sample(name, model, cond(words))
    seen.calls.clear()
    edited = add_edit(model, EditSpec("projection", same, strength, options=tiny.CRE, node="Test"))
    made = dits.sample(name, edited, cond(words))
    if strength < 1:
        torch.testing.assert_close(made, plain, rtol=1e-3, atol=1e-3)
    else:
        assert not torch.allclose(made, plain, atol=1e-2)
    n = seen.text(9)
    for call in seen.last(9):
        (_, k, v, _), _, (_, k_e, v_e, _), _ = cut(call, n, [seen.text(5), n, seen.text(40)])
        torch.testing.assert_close((k_e, v_e), (k[:, :n], v[:, :n]), rtol=1e-3, atol=1e-3)
        if name != "SD3":  # in others the text's keys say where they stand
            assert (k_e - k_e[:, :1]).abs().max() > 0.1


@pytest.mark.parametrize("name", APPENDED)
@pytest.mark.parametrize("behind", [False, True])
def test_a_prompt_that_is_the_concept_draws_what_the_replacements_prompt_does(
    name: str, behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the concept is left, and what is drawn instead has its own weight beside the picture; behind:
    another pack's attention, where the picture's is not computed in parts."""
    if name == "Z-Image":  # 16 tokens of picture are filled up to 32, and what fills them up is not edited
        monkeypatch.setattr(dits, "SIZE", 16)
    words, other = tokens(1, 9), tokens(2, 9)
    concept = Concept("it", (Phrase("it", words, (1,), pooled=dits.pooled(1)),), tokens(7, 5), instead=other)
    concept = replace(concept, pooled=torch.zeros(1, dits.POOLED), pooled_instead=dits.pooled(2))
    model = dits.build(name)
    edited = add_edit(model, EditSpec("projection", concept, options=tiny.CRE, node="Test"))
    if behind:
        theirs = {"optimized_attention_override": lambda plain, *args, **more: plain(*args, **more)}
        edited.model_options["transformer_options"].update(theirs)
    made, unedited = (dits.sample(name, each, cond(words), steps=2) for each in (edited, model))
    want = dits.sample(name, model, cond(other, dits.pooled(2)), steps=2)
    assert (made - want).abs().max() < 0.02 * (unedited - want).abs().max()


def test_a_concept_in_an_example_picture_that_flux_redux_reads() -> None:
    """The host's StyleModelApply puts a picture's tokens behind the prompt's: they are text, and are edited as text."""
    redux = StyleModel(ReduxImageEncoder(5, dits.WIDTH))
    for i, parameter in enumerate(redux.model.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.4

    def showing(picture: int) -> Any:
        looked = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(picture))
        seen = SimpleNamespace(last_hidden_state=looked)
        return StyleModelApply().apply_stylemodel(cond(tokens(1, 9)), redux, seen, 1.0, "multiply")[0]

    given = {"neutral": [*showing(3), *showing(4)], "instead": showing(2)}
    concept = concept_from_conditioning(showing(1), "it", **given)
    model = dits.build("Flux.1")
    edited = add_edit(model, EditSpec("projection", concept, options=tiny.CRE, node="Test"))
    made, unedited = (dits.sample("Flux.1", each, showing(1), steps=2) for each in (edited, model))
    want = dits.sample("Flux.1", model, showing(2), steps=2)
    assert (made - want).abs().max() < 0.02 * (unedited - want).abs().max()


@pytest.mark.parametrize("name", APPENDED)
@pytest.mark.parametrize("gate", [Gate(), Gate((0.0, 1.0, 0.5))], ids=["open", "one shut"])
def test_prompts_without_an_edit_carry_no_texts(name: str, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the texts would weigh little, or weights are brought to the device in each call, all rows are one call."""
    model, lengths = dits.build(name), []
    edited = cre(model, gate=gate)
    more = {"batch": 3, "cfg": 5.0, "steps": 2, "negative": cond(tokens(2, 9))}
    monkeypatch.setattr(joint, "WORTH", 1.0)
    one = dits.sample(name, edited, cond(tokens(1, 9)), **more)
    monkeypatch.setattr(joint, "WORTH", 0.0)
    plain = joint.Parted.through

    def looked(self: Any, executor: Any) -> Tensor:
        whole = self.call.served
        lengths.append((len(self.x), self.context.shape[1], len(self.edited.x), self.edited.context.shape[1]))
        out = plain(self, executor)
        assert self.call.served == whole
        return out

    monkeypatch.setattr(joint.Parted, "through", looked)
    two = dits.sample(name, edited, cond(tokens(1, 9)), **more)
    text = max(9, FAMILIES[name].least)
    assert len(lengths) == 2 and all(each[:3] == (3, text, 3) and each[3] > text for each in lengths)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(two, dits.sample(name, model, cond(tokens(1, 9)), **more), atol=1e-2)
    lengths.clear()
    streamed = property(lambda self: True, lambda self, loaded: None)
    monkeypatch.setattr(type(model.model), "model_lowvram", streamed, raising=False)
    torch.testing.assert_close(dits.sample(name, edited, cond(tokens(1, 9)), **more), one, rtol=1e-4, atol=1e-4)
    assert not lengths


def test_a_patch_that_holds_prompts_against_each_other_has_them_in_one_call() -> None:
    """As a guidance within the blocks does, and newer hosts' NAG within the attentions."""
    model, seen = dits.build("Qwen-Image"), []

    def guided(given: dict[str, Any]) -> dict[str, Any]:
        parts, img = given["transformer_options"]["cond_or_uncond"], given["img"]
        seen.append(sorted(parts))
        if len(parts) > 1:
            positive, negative = (img.chunk(len(parts))[parts.index(i)] for i in (0, 1))
            given["img"] = torch.cat([positive + 0.5 * (positive - negative), negative][:: 1 - 2 * parts.index(0)])
        return given

    patched = model.clone()
    patched.set_model_patch(guided, "double_block")
    both, edited, plain = (dits.sample("Qwen-Image", each, cfg=4.0) for each in (cre(patched), cre(model), patched))
    assert seen == [[0, 1]] * 4
    assert not torch.allclose(both, edited, atol=1e-2) and not torch.allclose(both, plain, atol=1e-2)


@pytest.mark.skipif("Krea 2" not in FAMILIES, reason="this host has no NAG")
@pytest.mark.parametrize("name", ["Flux.1", "Krea 2"])
def test_beside_newer_hosts_nag(name: str) -> None:
    NAGuidance = importlib.import_module("comfy_extras.nodes_nag").NAGuidance
    model = dits.build(name)
    guided = NAGuidance.execute(model, 5.0, 0.5, 1.5).args[0]
    both, edited, plain = (dits.sample(name, each, cfg=1.0) for each in (cre(guided), cre(model), guided))
    assert not torch.allclose(both, edited, atol=1e-2) and not torch.allclose(both, plain, atol=1e-2)


def cre(model: Any, **changes: Any) -> Any:
    return add_edit(model, EditSpec("projection", dits.concept(), options=tiny.CRE, node="Test", **changes))


@pytest.mark.parametrize("name", FAMILIES)
def test_off_is_bit_identical(name: str) -> None:
    model = dits.build(name)
    plain = dits.sample(name, model, batch=2, cfg=5.0, steps=2)
    for off in ({"strength": 0.0}, {"gate": Gate((0.0,))}, {"start_percent": 0.5, "end_percent": 0.5}):
        assert torch.equal(dits.sample(name, cre(model, **off), batch=2, cfg=5.0, steps=2), plain)
    one = dits.sample(name, cre(model, gate=Gate((0.0, 1.0))), batch=2, steps=2)
    unedited, both = dits.sample(name, model, batch=2, steps=2), dits.sample(name, cre(model), batch=2, steps=2)
    torch.testing.assert_close(one[0], unedited[0], rtol=0, atol=1e-5)  # other rows beside it, another order of sums
    torch.testing.assert_close(one[1], both[1], rtol=0, atol=1e-5)
    assert not torch.allclose(one[1], unedited[1], atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_other_lengths_have_calls_of_their_own(name: str) -> None:
    model = dits.build(name)
    both = dits.sample(name, cre(model), negative=cond(tokens(2, 6)), cfg=5.0)
    positive = dits.sample(name, cre(model), cfg=1.0)
    negative = dits.sample(name, model, cond(tokens(2, 6)), cfg=1.0)
    torch.testing.assert_close(both, negative + 5.0 * (positive - negative), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image", "Z-Image", "SD3"])
def test_a_gate_in_flight_sees_the_clean_picture_that_the_flow_predicts(name: str) -> None:
    """After the first step of two: what a run of one step would end with."""
    model, seen = dits.build(name), []

    def look(latents: Tensor, _: Any) -> list[float]:
        seen.append(latents.clone())
        return [0.0, 1.0]

    gate = Gate(inflight=InFlight("told", look, 0.0))
    made, plain = (dits.sample(name, each, batch=2, steps=2) for each in (cre(model, gate=gate), model))
    torch.testing.assert_close(seen[0], dits.sample(name, model, batch=2, steps=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made[0], plain[0], rtol=0, atol=1e-4)
    assert len(seen) == 1 and not torch.allclose(made[1], plain[1], atol=1e-3)


def test_blocks_are_chosen_by_their_names() -> None:
    model = dits.build("Flux.1")
    everywhere, one = (dits.sample("Flux.1", cre(model, blocks=text)) for text in ("all", "single.1"))
    assert torch.equal(dits.sample("Flux.1", cre(model, blocks="double,single")), everywhere)
    assert not torch.equal(one, everywhere) and not torch.equal(one, dits.sample("Flux.1", model))
    with pytest.raises(
        ValueError, match=r'Test: blocks "middle": this model has .*; it has double.0, double.1, single'
    ):
        cre(model, blocks="middle")


def test_a_block_behind_one_that_is_left_out_keeps_its_name() -> None:
    """As Skip Layer Guidance leaves it out of SD3."""
    model = dits.build("SD3")
    model.set_model_patch_replace(lambda args, _: args, "dit", "double_block", 0)
    assert not torch.equal(dits.sample("SD3", cre(model, blocks="joint.1")), dits.sample("SD3", model))
    with pytest.raises(ValueError, match="reached none of 1 blocks"):
        dits.sample("SD3", cre(model, blocks="joint.0"))


def test_a_block_that_is_called_twice_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    beside(monkeypatch)  # as next to any block that another pack replaces
    model = dits.build("SD3")
    plain = dits.sample("SD3", cre(model, blocks="joint.1"), steps=2)

    def twice(given: Any, others: Any) -> Any:
        others["original_block"](dict(given))
        return others["original_block"](given)

    model.set_model_patch_replace(twice, "dit", "double_block", 0)
    assert torch.equal(dits.sample("SD3", cre(model, blocks="joint.1"), steps=2), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_packs_attention_is_kept(name: str) -> None:
    model, calls = dits.build(name), []

    def theirs(plain: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(args[0]))
        return plain(*args, **kwargs)

    both = cre(model)
    both.model_options["transformer_options"]["optimized_attention_override"] = theirs
    made, alone = dits.sample(name, both), dits.sample(name, cre(model))
    torch.testing.assert_close(made, alone, rtol=1e-3, atol=1e-3)  # alone, the picture's attention is computed in parts
    assert len(calls) >= 3 * FAMILIES[name].blocks  # the prompt's, the phrase's and the baseline's


def test_a_concept_without_what_a_second_text_encoder_says_is_refused() -> None:
    bare = replace(dits.concept(), beside={})
    with pytest.raises(
        ValueError, match='Test: concept "knife" lacks what HiDream .* reads of a prompt beside its enc'
    ):
        add_edit(dits.build("HiDream"), EditSpec("projection", bare, options=tiny.CRE, node="Test"))
    picture = torch.zeros(1, 16, dits.SIZE, dits.SIZE)
    with pytest.raises(ValueError, match="Test: HiDream .* is given a picture beside the one that it draws"):
        dits.sample("HiDream", cre(dits.build("HiDream")), cond(tokens(1, 9), concat_latent_image=picture))


def test_what_a_second_text_encoder_says_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the concept: with another one's the picture is another."""
    model, concept = dits.build("HiDream"), dits.concept()
    other = replace(concept, beside={name: (dits.llama([tokens(55, 3)]),) for name in concept.beside})
    specs = [EditSpec("projection", each, options=tiny.CRE, node="Test") for each in (concept, other)]
    assert specs[0].key != specs[1].key
    one, two = (dits.sample("HiDream", add_edit(model, spec)) for spec in specs)
    assert not torch.allclose(one, two, atol=1e-3)


def test_attention_that_no_override_reaches_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of loaders whose blocks call kernels of their own."""
    from comfy.ldm.flux import math
    from comfy.ldm.modules.attention import attention_pytorch

    def own(q: Tensor, k: Tensor, v: Tensor, heads: int, transformer_options: Any = None, **more: Any) -> Tensor:
        return attention_pytorch(q, k, v, heads, **more)

    monkeypatch.setattr(math, "optimized_attention", own)
    with pytest.raises(ValueError, match="Test: .*attention of its own .*; load the model with the host's own loader"):
        dits.sample("Flux.1", cre(dits.build("Flux.1")))


def test_all_layers_of_a_picture_are_edited() -> None:
    """Newer hosts draw several at once with Qwen-Image, one behind the other in its attentions."""
    backbone = of_model(dits.build("Qwen-Image"), "Test")
    assert isinstance(backbone, Joint)
    layers = torch.zeros(2, 16, 3, dits.SIZE, dits.SIZE)
    place = backbone.place(ModelCall(layers, torch.ones(2), {"c_crossattn": tokens(1, 9)}))
    assert sections(backbone.kind, place, 9 + 4 * IMAGE) == (slice(0, 9), slice(9, 9 + 3 * IMAGE))


def test_reference_pictures_in_front_of_the_prompt_are_refused() -> None:
    """Older hosts leave them away."""
    edited = add_edit(dits.build("Z-Image"), EditSpec("projection", dits.concept(), options=tiny.CRE, node="Test"))
    positive = cond(tokens(1, 9), reference_latents=[dits.latent("Z-Image")])
    if "ref_latents" in inspect.signature(comfy.ldm.lumina.model.NextDiT._forward).parameters:
        with pytest.raises(ValueError, match="Test: .* reads reference pictures.*take them out"):
            dits.sample("Z-Image", edited, positive)
    else:
        assert torch.equal(dits.sample("Z-Image", edited, positive), dits.sample("Z-Image", edited))


@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image"])
def test_reference_pictures_are_read_as_they_are_and_the_account_says_so(name: str) -> None:
    """Of Kontext and Qwen-Image-Edit: an edit changes the picture that goes by one, and still says what it left."""
    model = dits.build(name)
    edited = add_edit(model, EditSpec("projection", dits.concept(), options=tiny.CRE, node="Test"))
    for references in ({}, {"reference_latents": [dits.latent(name)]}):
        positive = cond(tokens(1, 9), **references)
        made, unedited = (dits.sample(name, each, positive) for each in (edited, model))
        assert not torch.allclose(made, unedited, atol=1e-4)
        accounts = accounts_of(edited)
        assert accounts is not None and (account := accounts.of("")) is not None
        ((_, line),) = account.lines()
        assert ("what the reference pictures show is read as it is" in line) == bool(references)


@pytest.mark.parametrize("name", ["Flux.1", "Z-Image", "SD3"])
@pytest.mark.parametrize("evidence", ["none", "share"])
def test_a_map_is_the_attention_of_the_concepts_own_tokens_in_its_stream(
    name: str, evidence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, concept, batch = dits.build(name), dits.concept(2), 2
    seen = Seen(name, monkeypatch)
    text, image = seen.text(9), seen.image
    streams = [as_prompt(name, model, seen, phrase.tokens, batch) for phrase in concept.phrases]
    plain = dits.sample(name, model, batch=batch, cfg=5.0)
    watch = Watch(concept, "Test", evidence=evidence)
    seen.calls.clear()
    assert torch.equal(dits.sample(name, add_watch(model, watch), batch=batch, cfg=5.0), plain)
    assert len(watch.maps) == FAMILIES[name].blocks
    for i, (call, (maps,)) in enumerate(zip(seen.last(9), watch.maps.values(), strict=True)):
        assert maps.shape == (2, batch, image**0.5, image**0.5)
        for p, phrase in enumerate(concept.phrases):
            for picture in range(batch):
                q, k, K = call[0][batch + picture], call[1][batch + picture, :text], streams[p][i][0][picture]
                q, own = q[text : text + image], list(phrase.own)
                A_e = torch.einsum("nhd,thd->nht", q.double(), K.double()).div(q.shape[-1] ** 0.5).softmax(-1)
                A_e = A_e[..., own].sum(-1)
                if evidence == "share":
                    A_e = A_e * reference.share(q.flatten(1), k.flatten(1), K[own].flatten(1), q.shape[1], 1)
                torch.testing.assert_close(maps[p, picture].flatten().double(), A_e.mean(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["Flux.1", "Z-Image"])
def test_a_weight_is_found_by_a_first_look_at_what_the_watch_sees(name: str) -> None:
    """One for each phrase and picture, by the model's own attentions, in one more model call."""
    model, concept, batch = dits.build(name), dits.concept(2), 2
    watch = Watch(concept, "Test")
    dits.sample(name, add_watch(model, watch), batch=batch)
    x = watch.features(watch.maps)
    blocks = Joint.of(model.model.diffusion_model, name).block_names
    apart = torch.linspace(-2, 2, 16)[:, None] * x.flatten(0, 1).std(0) + x.mean((0, 1))
    auto = train(apart, torch.linspace(-20, -5, 16), blocks, steps=300)
    found = dits.sample(name, eiup(model, concept, auto=auto), batch=batch)
    w = auto.weights(x)
    assert w.std() > 0.1
    for picture in range(batch):
        given = eiup(model, concept, weights=tuple(w[:, picture].tolist()))
        torch.testing.assert_close(found[picture], dits.sample(name, given, batch=batch)[picture], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, dits.sample(name, model, batch=batch), atol=1e-2)
    with pytest.raises(ValueError, match="Test: auto: .* was trained on another model, of 2 cross-attentions"):
        eiup(model, concept, auto=train(x[..., :2].flatten(0, 1), torch.zeros(4), ["a", "b"], steps=1))


def eiup(model: Any, concept: Concept, **options: Any) -> Any:
    return add_edit(model, EditSpec("erasure", concept, options=replace(EIUP, **options), node="Test"))


@pytest.mark.parametrize("name", ["Flux.1", "Z-Image", "SD3"])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("margin", [MARGIN, 2.0])
def test_a_prompts_encoding_says_a_concept_and_raises_no_floor_where_it_cannot_tell(
    name: str, share: float, margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the positive prompt, which other words stand in as well; with the concept's own rows, as far as `share`."""
    monkeypatch.setattr(plan, "MARGIN", margin)
    concept = dits.concept()
    rows = rows_of(concept.phrases[0].tokens, concept.phrases[0].own)
    like = tuple(torch.cat([tokens(20 + i, 4)[0], rows + 0.3 * tokens(30 + i, len(rows))[0]]) for i in range(2))
    phrase, ordinary = replace(concept.phrases[0], like=like), tuple(tokens(40 + i, 9)[0] for i in range(3))
    concept = replace(concept, phrases=(phrase,), ordinary=ordinary[:2], further=ordinary[2:])
    prompt = tokens(1, 12)
    prompt[0, 3 : 3 + len(rows)] = share * rows + (1 - share) * prompt[0, 3 : 3 + len(rows)]
    asked: list[Tensor] = []
    plain = cre_method.floors
    monkeypatch.setattr(cre_method, "floors", lambda floor, said, peak: asked.append(said) or plain(floor, said, peak))
    tested, call = [], said.Said.__call__
    monkeypatch.setattr(said.Said, "__call__", lambda self, v: tested.append(v) or call(self, v))
    options = replace(tiny.CRE, floor=0.1, evidence="tokens")
    model = add_edit(dits.build(name), EditSpec("projection", concept, options=options, node="Test"))
    dits.sample(name, model, cond(prompt), cond(tokens(2, 12)), batch=2, cfg=5.0)
    assert len(tested) == 1  # in the one call of the one step, whatever the number of its blocks
    want = reference.said(prompt[0], rows[1:], like, ordinary, COMMON, SURE)
    assert len(asked) == FAMILIES[name].blocks and (want > 0.9) == (share > 0.5)
    for found in asked:
        assert found.shape == (1, 2, 1)
        least = UNKNOWN if margin > 1 else 0.0
        assert found.flatten().tolist() == pytest.approx([max(want, least)] * 2, abs=1e-3)


class Texts:
    """The texts of all model calls, [B, T, W]."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Tensor] = []
        through = ModelCall.through

        def told(made: ModelCall, executor: Any) -> Tensor:
            self.seen.append(made.context.clone())
            return through(made, executor)

        monkeypatch.setattr(ModelCall, "through", told)


def becoming(share: float) -> tuple[Concept, Tensor]:
    """A concept that other prompts say as well, with what its rows become there, and a prompt of other words that holds
    its rows as far as `share`."""
    concept = dits.concept()
    rows = rows_of(concept.phrases[0].tokens, concept.phrases[0].own)
    like = tuple(torch.cat([tokens(20 + i, 4)[0], rows + 0.3 * tokens(30 + i, len(rows))[0]]) for i in range(2))
    becomes = rows[1:], tokens(50, len(rows))[0, 1:]
    phrase, ordinary = (
        replace(concept.phrases[0], like=like, becomes=becomes),
        tuple(tokens(40 + i, 9)[0] for i in range(3)),
    )
    prompt = tokens(1, 12)
    prompt[0, 3 : 3 + len(rows)] = share * rows + (1 - share) * prompt[0, 3 : 3 + len(rows)]
    return replace(concept, phrases=(phrase,), ordinary=ordinary), prompt


@every_form
@pytest.mark.parametrize(("share", "strength"), [(1.0, 1.0), (0.85, 0.6), (0.0, 1.0)])
def test_a_text_is_read_anew_before_the_first_block(
    name: str, form: str, share: float, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it says the concept, in the positive prompt alone; and what it says then is what lowers the floor."""
    if form == "beside":
        beside(monkeypatch)
    monkeypatch.setattr(plan, "MARGIN", 0.0)
    concept, prompt = becoming(share)
    asked: list[Tensor] = []
    plain = cre_method.floors
    monkeypatch.setattr(cre_method, "floors", lambda floor, said, peak: asked.append(said) or plain(floor, said, peak))
    spec = EditSpec("projection", concept, strength, options=CRE_BY_TOKENS, node="Test")
    texts, negative = Texts(monkeypatch), tokens(2, 12)
    dits.sample(name, add_edit(dits.build(name), spec), cond(prompt), cond(negative), batch=2, cfg=5.0)
    T, G = concept.phrases[0].becomes  # type: ignore[misc]
    P, own = torch.cat(concept.ordinary), rows_of(concept.phrases[0].tokens, (1, 2))[1:]

    def said_by(x: Tensor, sure: tuple[float, float] = SURE, spread: float = 0.0) -> float:
        return reference.said(x, own, concept.phrases[0].like, concept.ordinary, COMMON, sure, spread)

    sure = said_by(prompt[0], CLEAR, SPREAD)
    assert (sure > 0) == (share > 0)
    anew = prompt[0] + strength * sure * reference.reread(prompt[0], prompt[0], (T, T), (G, G), P)[1]
    if FAMILIES[name].beside:  # what stands beside the text would say it still
        anew = prompt[0].double()
    front = max(0, FAMILIES[name].least - 12)
    edited = next(x for x in reversed(texts.seen) if len(x) in (2, 4) and x.shape[1] >= front + 12)[-2:, : front + 12]
    assert not edited[:, :front].any()
    for row in edited[:, front:]:
        torch.testing.assert_close(row.double(), anew, rtol=1e-3, atol=1e-3)
        if not share:
            assert torch.equal(row, prompt[0])
    if not FAMILIES[name].beside:
        assert {round(float(x.flatten()[0]), 2) for x in asked} == {round(said_by(anew), 2)}
    others = [x[:2, front : front + 12] for x in texts.seen if len(x) == 4]
    assert all(torch.equal(row, negative[0]) for x in others for row in x)


@pytest.mark.parametrize("form", ["appended", "beside"])
@pytest.mark.parametrize("name", ["Flux.1", "Z-Image"])
def test_what_is_read_anew_by_half_still_says_the_concept(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As surely as what is left of it did; and as far as it only leads to it, nothing is drawn instead."""
    if form == "beside":
        beside(monkeypatch)
    monkeypatch.setattr(plan, "MARGIN", 0.0)
    asked: list[Tensor] = []
    plain = cre_method.floors
    monkeypatch.setattr(cre_method, "floors", lambda floor, said, peak: asked.append(said) or plain(floor, said, peak))
    drawn: list[tuple[Tensor, Tensor, Tensor]] = []
    replaced = plan.Steering.replaced

    def watched(self: Any, otherwise: Tensor, instead: Tensor, text: Any) -> Tensor:
        drawn.append((otherwise, instead, replaced(self, otherwise, instead, text)))
        return drawn[-1][-1]

    monkeypatch.setattr(plan.Steering, "replaced", watched)

    def said_by(x: Tensor, sure: tuple[float, float], spread: float = 0.0) -> float:
        own = rows_of(concept.phrases[0].tokens, (1, 2))[1:]
        return reference.said(x, own, concept.phrases[0].like, concept.ordinary, COMMON, sure, spread)

    for share in torch.linspace(0.4, 0.9, 26).tolist():
        concept, prompt = becoming(share)
        if 0.2 < (sure := said_by(prompt[0], CLEAR, SPREAD)) < 0.8:
            break
    concept = replace(concept, instead=tokens(300, 9))
    spec = EditSpec("projection", concept, options=CRE_BY_TOKENS, node="Test")
    dits.sample(name, add_edit(dits.build(name), spec), cond(prompt), cond(tokens(2, 12)), batch=2, cfg=5.0)
    T, G = concept.phrases[0].becomes  # type: ignore[misc]
    anew = prompt[0] + sure * reference.reread(prompt[0], prompt[0], (T, T), (G, G), torch.cat(concept.ordinary))[1]
    want = max(said_by(anew, SURE), (1 - sure) * said_by(prompt[0], SURE))
    assert want > said_by(anew, SURE)
    for each in asked:
        assert each.flatten().tolist() == pytest.approx([want] * 2, abs=1e-3)
    leads = said_by(prompt[0], LEADS) * (1 - said_by(prompt[0], CLEAR))
    for otherwise, instead, found in drawn:
        torch.testing.assert_close(found, instead + leads * (otherwise - instead), rtol=1e-3, atol=1e-3)
    assert drawn and 0 < leads < 0.8


def test_a_concept_whose_gate_is_closed_leaves_the_evidence_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt that says both, in the image where nothing is read anew for the one that is said clearly."""
    monkeypatch.setattr(plan, "MARGIN", 0.0)
    half, prompt = becoming(0.4)
    other = dits.concept(seed=400)
    own = rows_of(other.phrases[0].tokens, other.phrases[0].own)
    like = tuple(torch.cat([tokens(820 + i, 4)[0], own + 0.3 * tokens(830 + i, len(own))[0]]) for i in range(2))
    phrase = replace(other.phrases[0], like=like, becomes=(own[1:], tokens(850, len(own))[0, 1:]))
    other = replace(other, name="other", phrases=(phrase,), ordinary=half.ordinary)
    texts: list[tuple[Any, Any]] = []
    reread = plan.Plan.reread
    monkeypatch.setattr(
        plan.Plan, "reread", lambda self, *given: texts.append((self, reread(self, *given))) or texts[-1][1]
    )
    a, b = (
        EditSpec("projection", concept, options=CRE_BY_TOKENS, gate=gate, node=concept.name)
        for concept, gate in ((other, Gate((1.0, 0.0))), (half, Gate()))
    )
    for specs in ((b,), (a, b)):
        model = dits.build("Flux.1")
        for spec in specs:
            model = add_edit(model, spec)
        positive = cond(torch.cat([prompt, own[None]], 1))
        dits.sample("Flux.1", model, positive, cond(tokens(2, 12 + len(own))), batch=2, cfg=5.0, steps=1)
    of = [text.unread[made.specs.index(b)].flatten() for made, text in (texts[0], texts[-1])]
    assert 0.2 < float(of[0][-1]) < 0.8 and torch.equal(of[0][-2], of[0][-1])
    assert not of[1][-2]  # all is read anew there
    torch.testing.assert_close(of[1][-1], of[0][-1])


@pytest.mark.parametrize("baseline", ["neutral", "none"])
def test_what_only_leads_to_a_concept_in_bf16(baseline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MARGIN", 0.0)
    concept, prompt = becoming(0.6)
    concept = replace(concept, instead=tokens(300, 9))
    spec = EditSpec("projection", concept, options=replace(CRE_BY_TOKENS, baseline=baseline), node="Test")
    drawn = [
        dits.sample("Flux.1", add_edit(dits.build("Flux.1", dtype), spec), cond(prompt)).float()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert torch.isfinite(drawn[1]).all() and (drawn[0] - drawn[1]).norm() < 0.1 * drawn[0].norm()


def test_a_text_is_read_anew_for_edits_of_all_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks read the one text."""
    monkeypatch.setattr(plan, "MARGIN", 0.0)
    concept, prompt = becoming(1.0)
    spec = EditSpec("projection", concept, options=CRE_BY_TOKENS, blocks="double", node="Test")
    texts = Texts(monkeypatch)
    dits.sample("Flux.1", add_edit(dits.build("Flux.1"), spec), cond(prompt))
    assert torch.equal(texts.seen[-1][0, :12], prompt[0])


@pytest.mark.parametrize("name", ["Flux.1", "Z-Image"])
@pytest.mark.parametrize("numbers", [2**21, 2**9])  # all positions at once, and in pieces
def test_a_lowered_floor_is_a_share_of_the_most_alike_position(
    name: str, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the prompt says the concept; the same in all pieces, told by every n-th position of n pieces."""
    concept = dits.concept()
    rows = rows_of(concept.phrases[0].tokens, concept.phrases[0].own)
    ordinary = tuple(tokens(40 + i, 9)[0] for i in range(3))
    concept = replace(concept, phrases=(replace(concept.phrases[0], like=(rows, rows)),), ordinary=ordinary)
    monkeypatch.setattr(plan, "PIECE", {"cpu": numbers, "other": numbers})
    monkeypatch.setattr(said, "PEAK", share := 0.999)  # of random weights all positions find nearly the same
    seen: list[tuple[Any, Tensor]] = []
    taken = cre_method.METHOD.taken

    def watched(found: Any, s: Tensor, options: Any, note: Any) -> Tensor:
        where: list[Tensor] = []
        out = taken(found, s, options, where.append)
        seen.append((found, where[0]))
        return out

    monkeypatch.setattr(cre_method.METHOD, "taken", watched, raising=False)
    prompt = torch.cat([tokens(1, 4), rows[None]], 1)
    options = replace(tiny.CRE, floor=0.1, evidence="tokens", baseline="neutral")
    model = add_edit(dits.build(name), EditSpec("projection", concept, options=options, node="Test"))
    dits.sample(name, model, cond(prompt), cond(tokens(2, 12)), cfg=5.0, steps=1)
    pieces = len(seen) // FAMILIES[name].blocks
    assert pieces > 1 if numbers < 2**21 else pieces == 1
    for first in range(0, len(seen), pieces):
        block = seen[first : first + pieces]
        a, x = (torch.cat([each(found).double() for found, _ in block], -3) for each in (without_a, without_x))
        cosines = (a * x).flatten(-2).sum(-1) / (a.flatten(-2).norm(dim=-1) * x.flatten(-2).norm(dim=-1))  # [1, R, N]
        peak = cosines[..., ::pieces].amax(-1)
        for found, _ in block:
            torch.testing.assert_close(found.peak.flatten().double(), peak.flatten(), rtol=1e-3, atol=1e-4)
        floor = torch.clamp(share * peak, min=said.SAID * 0.1)[..., None]
        where = torch.cat([each for _, each in block], 2).flatten(2)
        sure = (cosines - floor).abs() > 1e-5
        assert torch.equal(where[sure] > 0, (cosines >= floor)[sure]) and where.mean() < 1


def without_a(found: Any) -> Tensor:
    return found.A - found.A0


def without_x(found: Any) -> Tensor:
    return found.At - found.A0


def test_presets_name_every_family_and_a_preset_for_one_is_not_for_others() -> None:
    known = {family.name for family in (*joint.FAMILIES, *cross.FAMILIES)}
    assert known == set(TRANSFORMERS) and set(unet.FAMILIES.values()) == set(UNETS)
    words = {"name": "owl", "phrases": ["an owl"]}
    document: dict[str, Any] = {
        "schema_version": 4,
        "needs": ["models that are transformers"],
        "kind": "concept-guard preset",
        "name": "No owls",
        "base_models": ["Flux", "Qwen-Image"],
        "edits": [{"method": "CRE", "concept": words}],
    }
    preset = read(json.dumps(document))
    assert json.loads(write(preset))["schema_version"] == 4
    flux, sd3, sd1 = (family_of(model) for model in (dits.build("Flux.1"), dits.build("SD3"), tiny.sd1()))
    suits(preset, flux)
    with pytest.raises(ValueError, match='"No owls" was made for Flux, Qwen-Image models, and this is one of SD3;'):
        suits(preset, sd3)
    for_unets = read(json.dumps({**document, "schema_version": 1, "needs": [], "base_models": ["SD1.x"]}))
    with pytest.raises(ValueError, match='"No owls" was made for SD1.x models, and this is one of Flux;'):
        suits(for_unets, flux)
    assert json.loads(write(for_unets))["schema_version"] == 1 and preset.made_for(sd1) and not preset.made_for("SDXL")


def family_of(model: Any) -> str:
    return of_model(model, "Test").family


def test_what_has_no_meaning_there_is_refused() -> None:
    model, k = dits.build("Flux.1"), tokens(3, 2)
    with pytest.raises(ValueError, match="Test: .* learned for a cross-attention, and Flux .* has none"):
        add_edit(model, EditSpec("prompt", PromptTokens("soft", k, k), blocks="all", node="Test"))
    with pytest.raises(
        ValueError, match="Test: HiDream .* reads more of each prompt than its encoding, which this edit"
    ):
        add_edit(dits.build("HiDream"), EditSpec("direction", Direction("d", k[0, :1]), node="Test"))
    with pytest.raises(ValueError, match='Test: blocks is "single", but .* reads its text once'):
        add_edit(model, EditSpec("direction", Direction("d", k[0, :1]), blocks="single", node="Test"))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "HiDream"])
def test_a_direction_is_added_to_the_positive_prompt(name: str) -> None:
    model, d = dits.build(name), tokens(3, 1)[0]
    shifted = cond(tokens(1, 9) + 0.7 * d)
    edited = add_edit(model, EditSpec("direction", Direction("d", d), 0.7, node="Test"))
    expected = dits.sample(name, model, shifted, cfg=5.0, steps=2)
    torch.testing.assert_close(dits.sample(name, edited, cfg=5.0, steps=2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Flux.1", "Flux.2", "Z-Image", "SD3"])
@pytest.mark.parametrize("evidence", ["none", "share"])
def test_eiup_reweights_what_the_picture_finds_in_the_text(
    name: str, evidence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the concept's own tokens, wherever the host puts them: Flux.2 fills its text up in front, Z-Image behind."""
    beside(monkeypatch)
    concept = dits.concept()
    model, seen = dits.build(name), Seen(name, monkeypatch)
    text, image = seen.text(9), seen.image
    first = seen.text(7) - 7 if name == "Flux.2" else 0
    own = [first + j for j in concept.phrases[0].own]
    phrase = as_prompt(name, model, seen, concept.phrases[0].tokens, 1)
    w = [-30.0 if j in own else 0.0 for j in range(seen.text(7))]  # two among 512 tokens are little
    options = EIUPOptions(weights=(-30.0,), evidence=evidence)
    seen.calls.clear()
    dits.sample(name, add_edit(model, EditSpec("erasure", concept, options=options, node="Test")))
    moved = 0.0
    for i, (q, k, v, out) in enumerate(seen.last(9)):
        queries = q[0, text : text + image].flatten(1)
        K, V = (x[0].flatten(1) for x in phrase[i])
        given = reference.share(queries, k[0, :text].flatten(1), K[own], q.shape[2], 1) if evidence == "share" else None

        def edited(A_t: Tensor, queries: Tensor = queries, K: Tensor = K, V: Tensor = V, given: Any = given) -> Any:
            out = reference.eiup(A_t, queries, K, V, w, FAMILIES[name].heads, given)
            return out, torch.ones(image, FAMILIES[name].heads)

        plain, want = expected(q[0], k[0], v[0], text, image, edited)
        got = out[0, text : text + image].flatten(1).double()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        moved = max(moved, float((want - plain).abs().max()))
    assert moved > 0.01
