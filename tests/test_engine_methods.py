"""The other three kinds of edit: text direction, appended tokens, erasure prompt; their maths, then the host."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import reference
import tiny
import torch
from torch import Tensor

from conceptguard.editing.edits.spec import Concept, Direction, EditSpec, Gate, PromptTokens
from conceptguard.editing.engine.host import add_edit
from conceptguard.editing.methods.attention import split_heads
from conceptguard.editing.methods.eiup import EIUPOptions, reweighted
from conceptguard.editing.methods.kpop import append
from conceptguard.editing.methods.safe_region import shift

H, D = 4, 12
N, L, T = 6, 77, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(split_heads(x, H) for x in tensors)


# --- the maths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("pieces", [1, 2])
def test_appending_is_one_softmax_over_all_tokens(pieces: int, times: int) -> None:
    """In proportion: as many copies of the appended tokens as the context has of the prompt, be that short or long."""
    q = random(2, N, H * D)
    k, v = (random(2, L * pieces, H * D, seed=seed).repeat(1, times, 1) for seed in (1, 2))
    k_e, v_e = random(1, T, H * D, seed=3), random(1, T, H * D, seed=4)
    A = torch.stack([reference.attention(q[r], k[r], v[r], H) for r in range(2)])
    change = append(*heads(A, q, k), [(*heads(k_e, v_e), torch.ones(2))]).flatten(-2)
    for r in range(2):
        expected = reference.appended(q[r], k[r], v[r], k_e[0], v_e[0], times, H)
        torch.testing.assert_close((A[r] + change[r].double()), expected, rtol=1e-5, atol=1e-6)


def test_several_sets_share_the_softmax() -> None:
    q, k, v = random(1, N, H * D), random(1, L, H * D, seed=1), random(1, L, H * D, seed=2)
    k_1, v_1, k_2, v_2 = (random(1, T + i, H * D, seed=3 + i) for i in (0, 0, 1, 1))
    A = reference.attention(q[0], k[0], v[0], H)[None]
    sets = [(*heads(k_1, v_1), torch.ones(1)), (*heads(k_2, v_2), torch.full((1,), 2.0))]
    expected = reference.attention(
        q[0], torch.cat([k[0], k_1[0], k_2[0], k_2[0]]), torch.cat([v[0], v_1[0], v_2[0], v_2[0]]), H
    )
    torch.testing.assert_close(
        (A + append(*heads(A, q, k), sets).flatten(-2).double())[0], expected, rtol=1e-5, atol=1e-6
    )


def test_tokens_appended_no_times_change_nothing() -> None:
    q, k, A = random(2, N, H * D), random(2, L, H * D, seed=1), random(2, N, H * D, seed=2)
    k_e, v_e = random(1, T, H * D, seed=3), random(1, T, H * D, seed=4)
    change = append(*heads(A, q, k), [(*heads(k_e, v_e), torch.tensor([0.0, 1.0]))])
    assert not change[0].any() and change[1].any()


def test_the_erasure_prompt_adds_its_weighted_features() -> None:
    A, q = random(2, N, H * D), random(2, N, H * D, seed=1)
    k_e, v_e = random(3, T, H * D, seed=3), random(3, T, H * D, seed=4)
    w = random(3, T, seed=5)
    s = torch.tensor([[1.0, 0.0], [0.5, 1.0], [2.0, 1.0]])
    change = reweighted(*heads(q, k_e, v_e * w[..., None]), s).flatten(-2)
    for r in range(2):
        expected = A[r].double()
        for m in range(3):
            expected = reference.eiup(expected, q[r], k_e[m], v_e[m], (w[m] * s[m, r]).tolist(), H)
        torch.testing.assert_close((A[r] + change[r]).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_direction_is_added_at_every_piece_of_the_prompt() -> None:
    d, beta = random(L, 16, seed=1), torch.tensor([1.0, 0.5])
    for pieces in (1, 2, 3):
        c = random(2, L * pieces, 16)
        for r, piece in itertools.product(range(2), range(pieces)):
            part = slice(piece * L, (piece + 1) * L)
            torch.testing.assert_close(shift(c, d, beta)[r, part], c[r, part] + beta[r] * d)
    short = random(2, 9, 16)
    torch.testing.assert_close(shift(short, d, beta)[1], short[1] + 0.5 * d[:9])
    torch.testing.assert_close(shift(short, d[:1], beta)[0], short[0] + d[0])


# --- through the host ------------------------------------------------------------------------------------------------

TARGET = tiny.concept("knife", 100, phrases=2)


def spec(kind: str, seed: int = 50, **inputs: Any) -> EditSpec:
    """An edit of each kind; `prompt` in all blocks, as its paper's "inmidout" mode."""
    w = tiny.WIDTH
    if kind == "direction":
        return EditSpec("direction", Direction(f"d{seed}", tiny.tokens(seed)[0]), node="Test", **inputs)
    if kind == "prompt":
        prompt = PromptTokens(f"p{seed}", random(1, 10, w, seed=seed), random(1, 10, w, seed=seed + 1))
        return EditSpec("prompt", prompt, node="Test", **inputs)
    if kind == "projection":
        return EditSpec("projection", tiny.concept("c", seed), options=tiny.CRE, node="Test", **inputs)
    options = EIUPOptions(form=kind, weights=(-1.0, -0.5))
    return EditSpec("erasure", tiny.concept("e", seed, phrases=2), options=options, node="Test", **inputs)


KINDS = ["direction", "prompt", "separate", "joint", "projection"]


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def model(request: pytest.FixtureRequest) -> Any:
    return getattr(tiny, request.param)()


def expected(seen: tiny.Recorder, key: Any, call: dict[str, Tensor], edit: EditSpec) -> Tensor:
    """One row after an edit of a kind that works on the attention's output, by the slow reference."""
    h = seen.heads(key)
    q, k, v = (call[name][-1] for name in "qkv")
    A = reference.attention(q, k, v, h)
    source, options = edit.source, edit.options
    if isinstance(source, PromptTokens):
        k_e, v_e = seen.project(key, "k", source.k[0]), seen.project(key, "v", source.v[0])
        return reference.appended(q, k, v, k_e, v_e, 1, h)
    assert isinstance(source, Concept) and isinstance(options, EIUPOptions)
    ks, vs = [], []
    for phrase, weight in zip(source.phrases, options.weights, strict=True):
        if options.form == "separate":
            k_e, v_e = (seen.project(key, name, phrase.tokens[0]) for name in "kv")
            A = reference.eiup(A, q, k_e, v_e, [weight * (j in phrase.own) for j in range(77)], h)
        else:
            own = phrase.tokens[0, list(phrase.own)]
            ks.append(seen.project(key, "k", own))
            vs.append(weight * seen.project(key, "v", own))
    return A if options.form == "separate" else reference.appended(q, k, v, torch.cat(ks), torch.cat(vs), 1, h)


@pytest.mark.parametrize("kind", ["prompt", "separate", "joint"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_every_block_follows_the_formula(model: Any, kind: str, pieces: int) -> None:
    edit = spec(kind)
    with tiny.Recorder(model) as seen:
        tiny.sample(add_edit(model, edit), tiny.cond(1, 77 * pieces), tiny.cond(2, 77 * pieces), steps=1)
    for key, (call,) in seen.calls.items():
        torch.testing.assert_close(call["out"][-1].double(), expected(seen, key, call, edit), rtol=1e-3, atol=1e-4)
        untouched = reference.attention(*(call[name][0] for name in "qkv"), seen.heads(key))
        torch.testing.assert_close(call["out"][0].double(), untouched, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("blocks", ["all", "output"])
def test_a_direction_reaches_keys_and_values(model: Any, blocks: str) -> None:
    edit = spec("direction", blocks=blocks, strength=0.5)
    with tiny.Recorder(model) as seen:
        tiny.sample(add_edit(model, edit), steps=1)
    for key, (call,) in seen.calls.items():
        beta = 0.5 if blocks == "all" or key[0] == blocks else 0.0
        for name in "kv":
            row = tiny.tokens(1)[0] + beta * edit.source.d  # type: ignore[union-attr]
            torch.testing.assert_close(call[name][1].double(), seen.project(key, name, row), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(
                call[name][0].double(), seen.project(key, name, tiny.tokens(2)[0]), rtol=1e-3, atol=1e-4
            )


def test_a_direction_is_the_same_as_an_edited_prompt(model: Any) -> None:
    edit = spec("direction")
    shifted = [[tiny.tokens(1) + edit.source.d, tiny.cond(1)[0][1]]]  # type: ignore[union-attr]
    torch.testing.assert_close(tiny.sample(add_edit(model, edit)), tiny.sample(model, shifted), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [{"strength": 0.0}, {"end_percent": 0.0}, {"gate": Gate((0.0,))}], ids=str)
def test_inactive_is_bit_identical(model: Any, kind: str, inputs: dict[str, Any]) -> None:
    assert torch.equal(tiny.sample(add_edit(model, spec(kind, **inputs))), tiny.sample(model))


def test_an_erasure_weight_of_zero_is_off_only_with_a_softmax_of_its_own(model: Any) -> None:
    def zero(form: str) -> Tensor:
        options = EIUPOptions(form=form, weights=(0.0,))
        return tiny.sample(add_edit(model, EditSpec("erasure", tiny.concept(), options=options)))

    assert torch.equal(zero("separate"), tiny.sample(model))
    assert not torch.equal(zero("joint"), tiny.sample(model))


@pytest.mark.parametrize("kind", KINDS)
def test_unconditional_rows_and_closed_gates_keep_every_bit(model: Any, kind: str) -> None:
    def outputs(m: Any) -> dict[Any, Tensor]:
        with tiny.Recorder(model) as seen:
            tiny.sample(m, batch=3, steps=1)
        return {key: calls[0]["out"] for key, calls in seen.calls.items()}

    before, after = outputs(model), outputs(add_edit(model, spec(kind, gate=Gate((1.0, 0.0, 1.0)))))
    for key in before:
        for row in range(6):
            assert torch.equal(before[key][row], after[key][row]) == (row not in (3, 5)), (key, row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negative", [154, 231])
def test_a_longer_negative_prompt_changes_nothing_for_the_positive(model: Any, kind: str, negative: int) -> None:
    """The host repeats the shorter prompt; the weight of appended tokens must not depend on it."""
    edited = add_edit(model, spec(kind))
    first = next(iter(tiny.Recorder(model).blocks))

    def positive(length: int) -> Tensor:
        with tiny.Recorder(model) as seen:
            tiny.sample(edited, negative=tiny.cond(2, length), steps=1)
        (call,) = seen.calls[first]
        assert call["k"].shape[1] == length
        return call["out"][1]

    torch.testing.assert_close(positive(negative), positive(77), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_kinds_at_once_in_half_precision(dtype: torch.dtype) -> None:
    edited = tiny.sd1(dtype)
    for kind in KINDS:
        edited = add_edit(edited, spec(kind))
    with tiny.Recorder(edited) as seen:
        result = tiny.sample(edited, batch=2)
    assert torch.isfinite(result).all()
    assert all(call["out"].dtype == dtype for calls in seen.calls.values() for call in calls)


@pytest.mark.parametrize(
    "kinds", [KINDS, ["joint", "prompt", "prompt"], ["direction", "direction", "separate"]], ids=str
)
def test_the_order_of_nodes_changes_no_bit(kinds: list[str]) -> None:
    model = tiny.sd1()
    edits = [spec(kind, seed=50 + 10 * i, gate=Gate((1.0, 0.5))) for i, kind in enumerate(kinds)]
    pictures = []
    for order in [edits, edits[::-1], edits[1:] + edits[:1], edits[2:] + edits[:2]]:
        edited = model
        for edit in order:
            edited = add_edit(edited, edit)
        pictures.append(tiny.sample(edited, batch=2))
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)


@pytest.mark.parametrize(
    ("method", "options"),
    [("projection", None), ("erasure", tiny.CRE), ("prompt", None), ("direction", None)],
)
def test_a_method_without_what_it_needs_is_refused(method: str, options: Any) -> None:
    """An edit that does nothing must not pass for one that protects."""
    with pytest.raises(ValueError, match=f"Test: the method '{method}' cannot do anything with Concept and"):
        EditSpec(method, tiny.concept(), options=options, node="Test")


def test_a_method_that_there_is_not_is_refused() -> None:
    with pytest.raises(
        ValueError, match="Test: there is no method 'x'; the methods are .*direction, .*erasure, projection"
    ):
        EditSpec("x", tiny.concept(), node="Test")


def test_a_negative_number_of_appended_tokens_is_refused() -> None:
    with pytest.raises(
        ValueError, match="Test: strength is -1.0, but tokens cannot be appended a negative number of times"
    ):
        spec("prompt", strength=-1.0)
