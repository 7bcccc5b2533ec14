"""Closed-form edits of the weights: each formula against the minimum it is the solution of, and through the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.supported_models
import pytest
import tiny
import torch
from torch import Tensor

from conceptguard.editing.edits.spec import Concept, EditSpec, Phrase
from conceptguard.editing.engine import weights
from conceptguard.editing.engine.host import add_edit, edits_of
from conceptguard.editing.weights.closed_form import METHODS, rece, speed, time, uce
from conceptguard.editing.weights.edit import Projections, erasure
from conceptguard.editing.weights.rows import erased, said
from conceptguard.nodes.concept import ConceptGuardConcept
from conceptguard.nodes.edit_weights import ConceptGuardEditWeights

D, d, n, m = 6, 10, 3, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


W, C, G, P = random(D, d), random(n, d, seed=1), random(n, d, seed=2), random(m, d, seed=3)


def least(W: Tensor, wanted: list[tuple[float, Tensor, Tensor]], lam: float) -> Tensor:
    """argmin_X lam |X - W|^2 + sum w |X c - y|^2 over all (w, c, y), one row of X after the other, by least squares."""
    rows = []
    for i in range(len(W)):
        A = [lam**0.5 * torch.eye(W.shape[1], dtype=torch.double)]
        b = [lam**0.5 * W[i]]
        for w, c, y in wanted:
            A.append(w**0.5 * c[None])
            b.append(w**0.5 * y[i][None])
        rows.append(torch.linalg.lstsq(torch.cat(A), torch.cat(b)[:, None], driver="gelsd").solution[:, 0])
    return torch.stack(rows)


def slow_uce(W: Tensor, C: Tensor, G: Tensor, P: Tensor, lam: float, preserve: float) -> Tensor:
    wanted = [(1.0, c, W @ g) for c, g in zip(C, G, strict=True)] + [(preserve, p, W @ p) for p in P]
    return least(W, wanted, lam)


def edited(change: Any, W: Tensor = W) -> Tensor:
    return W + W @ change.A @ change.B


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("lam", "preserve"), [(0.5, 1.0), (0.1, 0.3)])
def test_uce_is_the_minimum_that_it_claims(lam: float, preserve: float) -> None:
    close(edited(uce(C, G, P, lam, preserve)), slow_uce(W, C, G, P, lam, preserve))


def test_time_preserves_nothing() -> None:
    close(edited(time(C, G)), slow_uce(W, C, G, P[:0], 0.1, 1.0))


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_rece_erases_what_still_says_the_concept(rounds: int) -> None:
    more = [W, random(D + 2, d, seed=5)]  # c' is found over all projections
    slow = [slow_uce(w, C, G, P, 0.1, 0.1) for w in more]
    for _ in range(rounds):
        again = []
        for c in C:  # argmin_x sum |W x - W_old c|^2 + .1 |x|^2
            A = torch.cat([*slow, 0.1**0.5 * torch.eye(d, dtype=torch.double)])
            b = torch.cat([*(old @ c for old in more), torch.zeros(d, dtype=torch.double)])
            again.append(torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0])
        slow = [slow_uce(w, torch.stack(again), G, P, 0.1, 0.1) for w in slow]
    change = rece(C, G, P, sum(w.T @ w for w in more), rounds)
    for w, expected in zip(more, slow, strict=True):
        close(edited(change, w), expected)


def test_speed_is_the_constrained_minimum_in_the_null_space() -> None:
    """|W' C - W G|^2 + |W' - W|^2 over changes that read nothing of P, with W' = W at the fixed rows."""
    fixed = random(2, d, seed=6)[[0, 1, 0]]  # one of them twice
    basis = torch.linalg.svd(P)[2][m:]  # [d - m, d], orthonormal, of what P does not reach
    free = basis.T @ torch.linalg.svd(fixed[:2] @ basis.T)[2][2:].T  # and what leaves the fixed rows alone
    X = []
    for i in range(D):
        A = torch.cat([C @ free, torch.eye(free.shape[1], dtype=torch.double)])
        b = torch.cat([G @ W[i] - C @ W[i], torch.zeros(free.shape[1], dtype=torch.double)])
        X.append(W[i] + free @ torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0])
    result = edited(speed(C, G, P, fixed))
    close(result, torch.stack(X))
    close(result @ torch.cat([P, fixed]).T, W @ torch.cat([P, fixed]).T)


def test_a_change_is_kept_in_as_few_columns_as_it_needs() -> None:
    change = uce(torch.cat([C, C]), torch.cat([G, G]), P)
    few = change.compact()
    assert few.A.shape[1] == n < change.A.shape[1]
    close(edited(few), edited(change))
    assert uce(C, C, P).compact().A.shape[1] == 0


def test_rows_begin_at_the_last_own_token_and_the_guide_behind_its_start() -> None:
    phrases = tiny.concept(phrases=2, own=(1, 2, 3)).phrases
    rows, guide = erased(phrases, tiny.tokens(7))
    assert torch.equal(rows, torch.cat([phrase.tokens[0, 3:] for phrase in phrases]).double())
    assert torch.equal(guide[:74], tiny.tokens(7)[0, 1:75].double()) and torch.equal(guide[:74], guide[74:])
    longer = Phrase("long", tiny.tokens(8, 154), (1, 40))
    guide = erased([longer], tiny.tokens(7))[1]
    instead = erased(phrases, tiny.tokens(7), tiny.tokens(9))[1]
    assert torch.equal(instead, tiny.tokens(9)[0, 3:].double().repeat(2, 1))
    assert len(said(longer)) == 114 and torch.equal(guide[76:], tiny.tokens(7)[0, -1:].double().expand(38, -1))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_reads_the_concept_as_the_guide_and_what_is_preserved_as_before(method: str) -> None:
    """In a space with room for both, of random encodings; SPEED leaves the empty prompt as it is to the bit."""
    empty, knife, cat = (torch.randn(1, 8, 60, generator=torch.Generator().manual_seed(i)) for i in range(3))
    concept = Concept("knife", (Phrase("knife", knife, (1,)),), empty)
    w = random(80, 60, seed=4)
    lora = erasure(concept, empty, [Phrase("cat", cat, (1, 2))], method, Projections({"v": w.float()}), rounds=1)
    C, G = erased(concept.phrases, empty)
    after = w + (lora["v.lora_up.weight"] @ lora["v.lora_down.weight"]).double()
    assert (C @ after.T - G @ w.T).norm() < 0.25 * ((C - G) @ w.T).norm()
    stays = cat[0, 2:].double()
    if method != "TIME":
        assert (stays @ (after - w).T).norm() < 0.1 * (stays @ w.T).norm()
    if method == "SPEED":
        torch.testing.assert_close(empty[0].double() @ after.T, empty[0].double() @ w.T, rtol=0, atol=1e-5)  # of fp32


# --- through the host ------------------------------------------------------------------------------------------------


def lines(clip: Any, text: str = "knife\na knife") -> Concept:
    return ConceptGuardConcept.execute(clip, text).args[0]


def run(model: Any, clip: Any, concept: Concept | None = None, **inputs: Any) -> tuple[Any, Any]:
    made = ConceptGuardEditWeights.execute(model, clip, concept or lines(clip), **{"preserve": "a cat", **inputs})
    return made.args[0], made.args[1]


def held(model: Any) -> dict[str, Tensor]:
    """The weights that the host loads for sampling, by their names."""
    comfy.model_management.load_models_gpu([model])
    return {name: w.double().clone() for name, w in model.model.diffusion_model.named_parameters()}


def conditioning(clip: Any, text: str) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@pytest.fixture(params=["sd1", "sdxl"])
def pair(request: Any) -> tuple[Any, Any]:
    if request.param == "sd1":
        return tiny.sd1(), tiny.clip()
    return wide(), tiny.clip(comfy.supported_models.SDXL)


def wide() -> Any:
    """SDXL's shape for the width of the tiny encoder of SDXL's kind."""
    shape = {**tiny._SDXL, "context_dim": 2 * tiny.WIDTH}
    return tiny._patcher(comfy.supported_models.SDXL, shape, torch.float32, 0)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["values", "keys and values"])
def test_the_hosts_weights_are_the_minimum_and_no_others_change(pair: tuple[Any, Any], which: str) -> None:
    model, clip = pair
    before, after = held(model), held(run(model, clip, projections=which)[0])
    concept, cat = lines(clip), lines(clip, "a cat")
    rows, guide = erased(concept.phrases, concept.empty)
    names = ("to_v",) if which == "values" else ("to_k", "to_v")
    for name, w in before.items():
        if any(f"attn2.{each}.weight" in name for each in names):
            expected = slow_uce(w, rows, guide, said(cat.phrases[0]), 0.5, 1.0)
            torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-4)
            assert not torch.equal(after[name], w)
        else:
            assert torch.equal(after[name], w), name


def test_a_lora_before_it_is_part_of_what_is_edited(model: Any, clip: Any) -> None:
    """And the order in which MODELs of the same weights were loaded makes no difference."""
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    patched = model.clone()
    patched.add_patches(
        {key: ("diff", (torch.randn(64, tiny.WIDTH, generator=torch.Generator().manual_seed(9)),))}, 0.8
    )
    whole = held(patched)[key.removeprefix("diffusion_model.")]
    concept, cat = lines(clip), lines(clip, "a cat")
    rows, guide = erased(concept.phrases, concept.empty)
    expected = slow_uce(whole, rows, guide, said(cat.phrases[0]), 0.5, 1.0)
    for loaded in (None, model, patched):
        if loaded is not None:
            tiny.sample(loaded, steps=1)
        edit = run(patched, clip)[0]
        torch.testing.assert_close(held(edit)[key.removeprefix("diffusion_model.")], expected, rtol=1e-4, atol=1e-4)
    assert not patched.model.diffusion_model.training and len(patched.patches) == 1


@pytest.mark.parametrize("method", ["UCE", "RECE", "TIME"])
def test_strength_scales_and_0_is_bit_identical(model: Any, clip: Any, method: str) -> None:
    off, _ = run(model, clip, method=method, strength=0.0)
    knife = conditioning(clip, "knife")
    assert torch.equal(tiny.sample(off, knife), tiny.sample(model, knife))
    before, half, whole = (held(run(model, clip, method=method, strength=s)[0]) for s in (0.0, 0.5, 1.0))
    name = "middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    assert not torch.allclose(before[name], whole[name])
    torch.testing.assert_close(half[name], (before[name] + whole[name]) / 2, rtol=1e-4, atol=1e-5)
    assert not model.patches


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("length", [77, 154])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_any_batch_prompt_and_cfg(model: Any, clip: Any, batch: int, length: int, cfg: float) -> None:
    edited, _ = run(model, clip)
    edit, plain = (tiny.sample(m, tiny.cond(1, length), batch=batch, cfg=cfg) for m in (edited, model))
    assert torch.isfinite(edit).all() and not torch.equal(edit, plain)
    alone = tiny.sample(edited, tiny.cond(1, length), cfg=cfg)
    torch.testing.assert_close(edit[:1], alone, rtol=1e-3, atol=1e-3)


def test_the_lora_that_is_saved_makes_the_same_pictures(model: Any, clip: Any, tmp_path: Path) -> None:
    from comfy.utils import load_torch_file
    from safetensors.torch import save_file

    edited, lora = run(model, clip)
    save_file(lora.checked(), tmp_path / "lora.safetensors")
    loaded, _ = comfy.sd.load_lora_for_models(
        model, None, load_torch_file(str(tmp_path / "lora.safetensors")), 1.0, 0.0
    )
    knife = conditioning(clip, "knife")
    a, b, plain = (tiny.sample(each, knife) for each in (edited, loaded, model))
    assert (a - b).norm() < 0.02 * (a - plain).norm()


def test_several_concepts_follow_each_other(model: Any, clip: Any) -> None:
    """The second is solved on the weights that the first left."""
    one, _ = run(model, clip)
    two, _ = run(one, clip, lines(clip, "a bomb"))
    name = "middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    bomb, cat = lines(clip, "a bomb"), lines(clip, "a cat")
    rows, guide = erased(bomb.phrases, bomb.empty)
    expected = slow_uce(held(one)[name], rows, guide, said(cat.phrases[0]), 0.5, 1.0)
    torch.testing.assert_close(held(two)[name], expected, rtol=1e-4, atol=1e-4)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"method": "ESD"}, "method is 'ESD'; choose one of UCE, RECE, TIME, SPEED"),
        ({"projections": "all"}, "projections is 'all'; choose one of values, keys and values"),
        ({"strength": float("nan")}, "strength is nan; give a number from 0 to 4"),
        ({"preserve": "()"}, r'preserve: the text encoder finds no word in "\(\)"'),
    ],
)
def test_bad_inputs_name_node_input_and_mend(model: Any, clip: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ConceptGuardEditWeights: {message}"):
        run(model, clip, **inputs)


def test_what_does_not_fit_is_refused(model: Any, clip: Any) -> None:
    other = tiny.clip(comfy.supported_models.SDXL)
    with pytest.raises(ValueError, match="ConceptGuardEditWeights: concept is a str; connect the output of a Concept"):
        ConceptGuardEditWeights.execute(model, clip, "knife")
    with pytest.raises(ValueError, match='concept "knife" was made with a text encoder of width 32, but'):
        run(model, clip, lines(other))
    with pytest.raises(ValueError, match="clip is another text encoder than the concept's; connect the one that"):
        run(model, other, lines(clip))
    with pytest.raises(ValueError, match="ConceptGuardEditWeights: cannot edit AuraFlow"):
        run(tiny.auraflow(), clip, lines(clip))
    nothing = tiny.tokens(7)
    same = Concept("nothing", (Phrase("nothing", torch.cat([nothing[:, :1], nothing[:, 1:]], 1), (1,)),), nothing)
    with pytest.raises(ValueError, match='concept "nothing" is read like the empty prompt already, or'):
        run(model, clip, same)
    with pytest.raises(ValueError, match="what is preserved leaves no room; preserve less"):
        run(model, clip, method="SPEED")  # sixteen numbers a token, all of them spoken for


def test_weights_that_are_no_projections_are_refused(model: Any) -> None:
    """A model whose keys and values are made of picture and text together."""
    block = next(iter(weights.of_model(model, "Test").blocks.values()))
    kept, block.to_v = block.to_v, torch.nn.Sequential(block.to_v)
    try:
        with pytest.raises(ValueError, match="Test: .* has no keys and values of its own for the text"):
            weights.projections(model, tiny.concept(), "values", "Test")
    finally:
        block.to_v = kept


def test_behind_an_edit_that_acts_while_sampling(model: Any, clip: Any) -> None:
    """Both act: the weights are this node's to read, whatever a merge may not."""
    cre = add_edit(model, EditSpec("projection", lines(clip, "cat"), options=tiny.CRE, node="Test"))
    both, _ = run(cre, clip)
    assert edits_of(both) == edits_of(cre)
    assert held(both).keys() == held(run(model, clip)[0]).keys()
    assert not torch.equal(tiny.sample(both), tiny.sample(cre))
