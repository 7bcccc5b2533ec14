"""Tokens that an edit adds to a prompt's count once, be the prompt short, long, or repeated by the host because the
one that it is batched with is longer."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import tiny
import torch
from foreign import couple, longer_context
from foreign_rows import AttentionCouple
from torch import Tensor

from conceptguard.editing.edits.spec import EditSpec, PromptTokens
from conceptguard.editing.engine.host import add_edit
from conceptguard.editing.methods.attention import repetitions
from conceptguard.editing.methods.eiup import EIUPOptions

LENGTHS = [77, 154, 231]
K_E, V_E = tiny.tokens(60, 10), tiny.tokens(61, 10)


def kpop(model: Any) -> Any:
    return add_edit(model, EditSpec("prompt", PromptTokens("p", K_E, V_E), node="Test"))


def eiup(model: Any, options: EIUPOptions) -> Any:
    return add_edit(model, EditSpec("erasure", tiny.concept(), options=options, node="Test"))


def positive_rows(model: Any, edited: Any, one: int, two: int, **inputs: Any) -> tuple[tiny.Recorder, list[Any]]:
    """For each cross-attention that the positive prompt of length `one` passes beside a negative of length `two`: its
    block, its row's q and output, and that prompt's keys and values, once."""
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, tiny.cond(1, one), tiny.cond(2, two), steps=1, **inputs)
    found = []
    for key, calls in seen.calls.items():
        k, v = (seen.project(key, which, tiny.tokens(1, one)[0]) for which in "kv")
        for call in calls:
            rows = [r for r in range(len(call["k"])) if torch.allclose(call["k"][r, :one].double(), k, atol=1e-4)]
            found += [(key, call["q"][r], k, v, call["out"][r]) for r in rows]
    return seen, found


@pytest.mark.parametrize("positive", LENGTHS)
@pytest.mark.parametrize("negative", LENGTHS)
def test_kpop_appends_once(model: Any, positive: int, negative: int) -> None:
    seen, rows = positive_rows(model, kpop(model), positive, negative)
    assert {row[0] for row in rows} == set(seen.blocks)
    for key, q, k, v, out in rows:
        k_e, v_e = seen.project(key, "k", K_E[0]), seen.project(key, "v", V_E[0])
        expected = reference.appended(q, k, v, k_e, v_e, 1, seen.heads(key))
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)


def own(seen: tiny.Recorder, key: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of the concept's own tokens."""
    phrase = tiny.concept().phrases[0]
    tokens = phrase.tokens[0, list(phrase.own)]
    return seen.project(key, "k", tokens), seen.project(key, "v", tokens)


@pytest.mark.parametrize("positive", LENGTHS)
@pytest.mark.parametrize("negative", LENGTHS)
def test_a_joint_softmax_counts_the_concept_once(model: Any, positive: int, negative: int) -> None:
    seen, rows = positive_rows(model, eiup(model, EIUPOptions("joint", (-2.0,))), positive, negative)
    assert {row[0] for row in rows} == set(seen.blocks)
    for key, q, k, v, out in rows:
        k_e, v_e = own(seen, key)
        expected = reference.appended(q, k, v, k_e, -2.0 * v_e, 1, seen.heads(key))
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("positive", LENGTHS)
@pytest.mark.parametrize("negative", LENGTHS)
def test_the_share_is_that_beside_the_whole_prompt(model: Any, positive: int, negative: int) -> None:
    seen, rows = positive_rows(model, eiup(model, EIUPOptions("separate", (-2.0,), "share")), positive, negative)
    phrase = tiny.concept().phrases[0]
    w = [-2.0 if j in phrase.own else 0.0 for j in range(phrase.tokens.shape[1])]
    assert {row[0] for row in rows} == set(seen.blocks)
    for key, q, k, v, out in rows:
        h = seen.heads(key)
        share = reference.share(q, k, own(seen, key)[0], h, 1)
        k_e, v_e = (seen.project(key, which, phrase.tokens[0]) for which in "kv")
        expected = reference.eiup(reference.attention(q, k, v, h), q, k_e, v_e, w, h, share)
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [couple, AttentionCouple(2).attention_couple_simple])
def test_regions_of_other_lengths_than_the_prompts(model: Any, make: Any) -> None:
    """The base prompt is long and its regions short, and repeated by the couple: each counts the tokens once."""
    with tiny.Recorder(model) as seen:
        tiny.sample(make(kpop(model)), tiny.cond(1, 154), tiny.cond(2), steps=1)
    key = ("input", 1, 0)
    region = tiny.tokens(70)[0]
    call = seen.calls[key][0]
    k, v = (seen.project(key, which, region) for which in "kv")
    rows = [r for r in range(len(call["k"])) if torch.allclose(call["k"][r, :77].double(), k, atol=1e-4)]
    assert rows
    for r in rows:
        k_e, v_e = seen.project(key, "k", K_E[0]), seen.project(key, "v", V_E[0])
        expected = reference.appended(call["q"][r], k, v, k_e, v_e, 1, seen.heads(key))
        torch.testing.assert_close(call["out"][r].double(), expected, rtol=1e-3, atol=1e-4)


def test_tokens_of_other_packs_are_part_of_the_prompt(model: Any) -> None:
    with tiny.Recorder(model) as seen:
        tiny.sample(kpop(longer_context(model)), cfg=1.0, steps=1)
    for key, (call,) in seen.calls.items():
        k_e, v_e = seen.project(key, "k", K_E[0]), seen.project(key, "v", V_E[0])
        expected = reference.appended(call["q"][0], call["k"][0], call["v"][0], k_e, v_e, 1, seen.heads(key))
        torch.testing.assert_close(call["out"][0].double(), expected, rtol=1e-3, atol=1e-4)


def test_repetitions_of_each_row() -> None:
    """k: [R, L, H, d] of one copy, two, three, of a long prompt, and of one whose parts differ in one number."""
    short, long, longer = (torch.randn(1, n, 4, 8, generator=torch.Generator().manual_seed(n)) for n in (77, 154, 462))
    nearly = short.repeat(1, 6, 1, 1)
    nearly[0, 300, 2, 3] += 0.5
    rows = [short.repeat(1, 6, 1, 1), long.repeat(1, 3, 1, 1), torch.cat([long, short], 1).repeat(1, 2, 1, 1)]
    assert repetitions(torch.cat([*rows, longer, nearly])).tolist() == [6.0, 3.0, 2.0, 1.0, 1.0]
    assert repetitions(short).tolist() == [1.0]
    assert repetitions(torch.cat([short, short[:, :8]], 1)).tolist() == [1.0]  # 85 tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_repetitions_in_half_precision(dtype: torch.dtype) -> None:
    """Equal tokens give equal keys but for rounding; other tokens do not."""
    linear = torch.nn.Linear(16, 32, bias=False)
    tokens = torch.cat([tiny.tokens(1).repeat(1, 2, 1), tiny.tokens(2, 154)])
    k = (linear.to(dtype)(tokens.to(dtype)) * (1 + torch.finfo(dtype).eps)).unflatten(-1, (4, 8))
    assert repetitions(k).tolist() == [2.0, 1.0]
