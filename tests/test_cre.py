"""Equation 4 of the CRE paper and our readings of it, on random tensors."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import reference
import torch
from torch import Tensor

from conceptguard.editing.methods.attention import attend, split_heads
from conceptguard.editing.methods.cre import CHOICES, DEFAULTS, CREOptions, project, projection
from conceptguard.editing.methods.found import Found, Kept, Weight

N, H, D = 5, 4, 12
PRINTED = CREOptions(width="full", tokens="all", baseline="none", negative="keep", solve="sum")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ours(
    A: Tensor, At: Tensor, s: list[float], options: CREOptions, A0: Tensor | None = None, kept: Kept | None = None
) -> Tensor:
    """project() for one row without heads. A, A0: [N, C]; At: [K, N, C]; kept.found: [M, N, C]."""
    A0 = None if A0 is None else split_heads(A0, H)
    kept = kept and replace(kept, found=split_heads(kept.found, H))
    strengths = torch.tensor(s)[:, None].expand(-1, len(A))
    return project(split_heads(A, H), split_heads(At, H), strengths, options, A0, kept).flatten(-2)


def readings() -> list[CREOptions]:
    names = [name for name in CHOICES if name != "tokens"]  # the choice of tokens is made before attention
    return [
        CREOptions(**dict(zip(names, values, strict=True)), tokens="all")
        for values in itertools.product(*(CHOICES[name] for name in names))
    ]


@pytest.mark.parametrize("options", readings(), ids=lambda o: "-".join((o.width, o.baseline, o.negative, o.solve)))
@pytest.mark.parametrize("concepts", [1, 2, 3])
def test_every_reading_equals_the_slow_reference(options: CREOptions, concepts: int) -> None:
    A, At, A0 = random(N, H * D), random(concepts, N, H * D, seed=1), random(N, H * D, seed=2)
    A = A + 0.7 * At.sum(0)  # so that coefficients of both signs occur
    s = [1.0, 0.5, 1.5][:concepts]
    baseline = A0 if options.baseline == "neutral" else None
    expected = reference.cre(
        A,
        list(At),
        s,
        H if options.width == "head" else 1,
        options.negative == "clip",
        options.solve == "joint",
        baseline,
    )
    ridge = 3e-4 if options.solve == "joint" else 1e-5  # nearly dependent concepts feel it
    torch.testing.assert_close(ours(A, At, s, options, baseline).double(), expected, rtol=1e-4, atol=ridge)


@pytest.mark.parametrize("solve", CHOICES["solve"])
@pytest.mark.parametrize("width", CHOICES["width"])
def test_below_the_floor_a_concept_is_left_alone(width: str, solve: str) -> None:
    At, A0 = random(3, N, H * D, seed=1), random(N, H * D, seed=2)
    A = random(N, H * D) + torch.tensor([0.0, 0.5, 2.0])[:, None, None].mul(At).sum(0)
    options = CREOptions(width, "all", "neutral", "clip", solve, floor=0.4)
    expected = reference.cre(A, list(At), [1.0, 0.5, 1.5], H if width == "head" else 1, True, solve == "joint", A0, 0.4)
    result = ours(A, At, [1.0, 0.5, 1.5], options, A0)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=3e-4)
    whole = ours(A, At, [1.0, 0.5, 1.5], replace(options, floor=0.0), A0)
    assert (result == A).all(-1).any() or (result != whole).any(), "the floor spared nothing"
    assert torch.equal(ours(A, At, [1.0] * 3, replace(options, floor=1.0), A0), A)


@pytest.mark.parametrize("solve", CHOICES["solve"])
@pytest.mark.parametrize("width", CHOICES["width"])
@pytest.mark.parametrize("baseline", CHOICES["baseline"])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_what_is_more_like_a_neighbour_is_left_alone(floor: float, baseline: str, width: str, solve: str) -> None:
    """Also above the floor, which spares what no neighbour does."""
    n = 40
    At, Ay = random(3, n, H * D, seed=1), random(2, n, H * D, seed=3)
    A0 = random(n, H * D, seed=2) if baseline == "neutral" else None
    A = random(n, H * D) + At.sum(0) + torch.rand(n, 1, generator=torch.Generator().manual_seed(4)) * 3 * Ay.sum(0)
    options = CREOptions(width, "all", baseline, "clip", solve, floor)
    of = torch.tensor([[True, False], [False, False], [True, True]])  # the second concept has no neighbours
    neighbours = [[y for y, own in zip(Ay, row, strict=True) if own] for row in of]
    heads = H if width == "head" else 1
    expected = reference.cre(A, list(At), [1.0] * 3, heads, True, solve == "joint", A0, floor, neighbours)
    result = ours(A, At, [1.0] * 3, options, A0, Kept(Ay, of))
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-3)
    unbounded = ours(A, At, [1.0] * 3, replace(options, floor=0.0), A0, Kept(Ay, of))
    assert torch.equal(result, unbounded) == (floor == 0), "the floor spared nothing beside the neighbours"
    changed = (result != ours(A, At, [1.0] * 3, options, A0)).any(-1)
    assert 0 < changed.sum() < n or width == "head", "all or nothing was spared"


@pytest.mark.parametrize("solve", CHOICES["solve"])
def test_a_neighbour_itself_loses_nothing_and_the_concept_all(solve: str) -> None:
    At, Ay = random(1, N, H * D, seed=1), random(1, N, H * D, seed=2)
    options, kept = CREOptions("full", "all", "none", "clip", solve), Kept(Ay, torch.ones(1, 1, dtype=torch.bool))
    assert torch.equal(ours(Ay[0], At, [1.0], options, None, kept), Ay[0])
    assert ours(At[0], At, [1.0], options, None, kept).abs().max() < 1e-4


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan")])
def test_a_floor_that_is_no_cosine_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match=r"floor is .*; give a cosine from 0"):
        replace(DEFAULTS, floor=floor)


def test_as_printed_the_result_is_orthogonal_to_the_steering_vector() -> None:
    A, At = random(N, H * D), random(1, N, H * D, seed=1)
    left = ours(A, At, [1.0], PRINTED)
    torch.testing.assert_close((left * At[0]).sum(-1), torch.zeros(N), atol=1e-5, rtol=0)


def test_projecting_twice_changes_nothing_more() -> None:
    A, At = random(N, H * D), random(3, N, H * D, seed=1)
    options = CREOptions("full", "all", "none", "keep", "joint")
    once = ours(A, At, [1.0] * 3, options)
    torch.testing.assert_close(ours(once, At, [1.0] * 3, options), once, atol=1e-4, rtol=0)


def test_an_output_that_is_the_concept_vanishes() -> None:
    At = random(2, N, H * D)
    joint = CREOptions("full", "all", "none", "clip", "joint")
    assert ours(At[0] + 2 * At[1], At, [1.0, 1.0], joint).abs().max() < 1e-3


@pytest.mark.parametrize("solve", CHOICES["solve"])
@pytest.mark.parametrize("concepts", [1, 2])
def test_a_concept_without_output_edits_nothing(solve: str, concepts: int) -> None:
    A = random(N, H * D)
    options = CREOptions("full", "all", "none", "keep", solve)
    assert torch.equal(ours(A, torch.zeros(concepts, N, H * D), [1.0] * concepts, options), A)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("copies", [2, 5, 12])
def test_the_same_concept_many_times_is_removed_once(copies: int, scale: float) -> None:
    A, At = random(N, H * D) * scale, random(1, N, H * D, seed=1) * scale
    options = CREOptions("full", "all", "none", "keep", "joint")
    many = ours(A, At.expand(copies, -1, -1), [1.0] * copies, options)
    torch.testing.assert_close(many, ours(A, At, [1.0], options), atol=1e-4 * scale, rtol=1e-3)


def test_concepts_that_are_not_there_do_not_weigh_in() -> None:
    """A closed gate must give the same as an edit that was never made: the joint solution has to leave it out."""
    A, At = random(N, H * D), random(3, N, H * D, seed=1)
    options = CREOptions("full", "all", "none", "keep", "joint")
    torch.testing.assert_close(
        ours(A, At, [1.0, 0.0, 0.7], options), ours(A, At[[0, 2]], [1.0, 0.7], options), atol=1e-5, rtol=1e-5
    )


def test_strength_scales_what_is_removed() -> None:
    A, At = random(N, H * D), random(2, N, H * D, seed=1)
    whole, half = (A - ours(A, At, [s, s], DEFAULTS, random(N, H * D, seed=3)) for s in (1.0, 0.5))
    torch.testing.assert_close(whole, 2 * half, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours(A, At, [0.0, 0.0], DEFAULTS, random(N, H * D, seed=3)), A)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out_but_not_between(dtype: torch.dtype) -> None:
    """Numbers whose squares overflow fp16, or vanish in it, are projected all the same."""
    for scale in (1e3, 1e-4):
        A, At = (random(N, H * D, seed=seed) * scale for seed in (0, 1))
        A, At = A.to(dtype), At.to(dtype)
        result = ours(A, At[None], [1.0], PRINTED)
        assert result.dtype == dtype
        expected = reference.cre(A, [At], [1.0], 1, clip=False, joint=False).to(dtype)
        torch.testing.assert_close(result, expected, rtol=1e-2, atol=2e-3 * scale)


def test_attend_gives_every_row_the_attention_to_every_prompt() -> None:
    R, M, T = 2, 3, 7
    q, K, V = random(R, N, H * D), random(M, T, H * D, seed=1), random(M, T, H * D, seed=2)
    At = attend(*(split_heads(x, H) for x in (q, K, V))).flatten(-2)
    assert At.shape == (M, R, N, H * D)
    for m, r in itertools.product(range(M), range(R)):
        expected = reference.attention(q[r], K[m], V[m], H)
        torch.testing.assert_close(At[m, r].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 'often'; choose one of"):
        CREOptions(**{**vars(DEFAULTS), name: "often"})


def test_a_prompt_that_says_the_concept_lowers_the_floor_and_not_that_of_weights() -> None:
    """A text's weight beside the picture follows only where the position itself finds the concept."""
    A0, x, other = (random(1, 60, H, D, seed=i) for i in range(3))
    share = torch.linspace(0, 1, 60)[:, None, None]
    A, options = A0 + share * x + (1 - share) * other, replace(DEFAULTS, floor=0.5)
    weight = Weight(random(1, 1, 60, H, 1, seed=3))
    found = Found(A, (A0 + x)[None], A0, said=torch.ones(1, 1, 1), weight=weight)
    taken = projection(found, torch.ones(1, 1, 1), options).flatten(-2).norm(dim=-1)
    a, x = (A - A0).flatten(-2), x.flatten(-2)
    cosine = torch.cosine_similarity(a, x, dim=-1)
    c = ((a * x).sum(-1) / (x * x).sum(-1)).clamp(0, 1)
    want = (c * (cosine >= 0.5))[..., None, None] * weight.more[0]
    assert weight.gained is not None and ((cosine > 0.25) & (cosine < 0.45)).any()
    torch.testing.assert_close(weight.gained, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(taken > 0, cosine >= 0.2)
