"""Which rows of a batch are whose: tiles, regions, prompts sampled one after the other, and what nobody can read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.hooks
import pytest
import tiny
import torch
from foreign import couple, hooked_couple
from foreign_rows import AttentionCouple, one_after_the_other, tiled, windows_of_attention
from torch import Tensor

from conceptguard.editing.edits.spec import EditSpec, Gate
from conceptguard.editing.engine.host import add_edit
from conceptguard.editing.engine.rows import window_of

FIRST = ("input", 1, 0)


def cre(model: Any, seed: int = 100, **inputs: Any) -> Any:
    return add_edit(model, EditSpec("projection", tiny.concept("c", seed), options=tiny.CRE, node="Test", **inputs))


def rows_edited(model: Any, change: Any, batch: int, **inputs: Any) -> list[list[bool]]:
    """For each call of the first block, which rows the edit changed; `change` is the other pack's node."""
    with tiny.Recorder(model) as before:
        tiny.sample(change(model), batch=batch, steps=1)
    with tiny.Recorder(model) as after:
        tiny.sample(change(cre(model, **inputs)), batch=batch, steps=1)
    pairs = zip(before.calls[FIRST], after.calls[FIRST], strict=True)
    return [[not torch.equal(*rows) for rows in zip(old["out"], new["out"], strict=True)] for old, new in pairs]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_every_tile_is_edited(model: Any, tiles: int, batch: int) -> None:
    """ComfyUI-TiledDiffusion: in each tile the negative's images, then the positive's."""
    calls = rows_edited(model, lambda m: tiled(m, tiles), batch)
    one = [False] * batch + [True] * batch
    assert calls == [one * tiles] * (4 // tiles)


def test_a_gate_finds_its_image_in_every_tile(model: Any) -> None:
    calls = rows_edited(model, lambda m: tiled(m, 2), 2, gate=Gate((0.0, 1.0)))
    assert calls == [[False, False, False, True] * 2] * 2


def test_the_order_of_tiles_and_edit_changes_no_bit(model: Any) -> None:
    assert torch.equal(tiny.sample(cre(tiled(model, 2))), tiny.sample(tiled(cre(model), 2)))


def cgem(regions: int) -> Any:
    return AttentionCouple(regions).attention_couple_simple


@pytest.mark.parametrize(("batch", "regions"), [(1, 2), (1, 3), (2, 2), (2, 3)])
def test_every_region_is_edited(model: Any, batch: int, regions: int) -> None:
    """cgem156's couple does not say how it enlarged the batch."""
    assert rows_edited(model, cgem(regions), batch) == [[False] * batch + [True] * batch * regions]


def test_a_gate_finds_its_image_in_every_region(model: Any) -> None:
    assert rows_edited(model, cgem(2), 2, gate=Gate((0.0, 1.0))) == [[False, False, False, True, False, True]]


def test_the_order_of_couple_and_edit_changes_no_bit(model: Any) -> None:
    assert torch.equal(tiny.sample(cre(cgem(2)(model)), batch=2), tiny.sample(cgem(2)(cre(model)), batch=2))


@pytest.mark.parametrize("batch", [1, 2])
def test_regions_that_a_conditioning_brings(model: Any, batch: int) -> None:
    """comfyui-prompt-control's couple: the host calls the model for its prompt apart from the others."""
    regional = comfy.hooks.set_hooks_for_conditioning(tiny.cond(1), hooked_couple())

    def calls(m: Any) -> list[Tensor]:
        with tiny.Recorder(model) as seen:
            tiny.sample(m, regional, batch=batch, steps=1)
        return sorted((call["out"] for call in seen.calls[FIRST]), key=len)

    pairs = zip(calls(model), calls(cre(model)), strict=True)
    changed = [[not torch.equal(*rows) for rows in zip(*pair, strict=True)] for pair in pairs]
    assert changed == [[False] * batch, [True] * 2 * batch]


@pytest.mark.parametrize("make", [couple, cgem(2)])
def test_regions_beside_a_guider_with_the_negative_first(model: Any, make: Any) -> None:
    """The couples call everything conditional whose number is not 1; which of it is, only the guider knows."""
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG
    from test_conditional import guided

    def rows(m: Any) -> list[Tensor]:
        guider = Guider_DualCFG(m)
        guider.set_conds(tiny.cond(1), tiny.cond(3), tiny.cond(2))
        guider.set_cfg(5.0, 5.0)
        with tiny.Recorder(model) as seen:
            guided(guider)
        return list(seen.calls[FIRST][0]["out"])

    changed = [not torch.equal(*pair) for pair in zip(rows(make(model)), rows(make(cre(model))), strict=True)]
    # the host's parts: positive (2), middle (1), negative (0); regions are made of the positive and of the negative
    assert changed == [True, True, True, False, False]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_prompts_one_after_the_other_are_an_error(model: Any, batch: int) -> None:
    """Half of the rows that the host announced: nobody can say which half."""
    with pytest.raises(ValueError, match="Test: cannot tell which of .* rows .*one_after_the_other"):
        tiny.sample(one_after_the_other(cre(model)), batch=batch)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("parts", [2, 4])
def test_rows_that_are_regrouped_unseen_are_an_error(model: Any, parts: int, batch: int) -> None:
    with pytest.raises(ValueError, match="Test: cannot tell which of .* rows .*windows_of_attention"):
        tiny.sample(windows_of_attention(cre(model), parts), batch=batch)


def test_without_an_edit_nobody_asks(model: Any) -> None:
    plain = tiny.sample(windows_of_attention(model))
    assert torch.equal(tiny.sample(windows_of_attention(cre(model, strength=0.0))), plain)


@pytest.mark.parametrize(("anchor", "shown"), [(None, (2, 3)), (-1, (2, 3)), (1, (1, 2, 3))])
def test_a_window_may_have_the_picture_before_it_in_front(anchor: int | None, shown: tuple[int, ...]) -> None:
    """Newer hosts' `causal_window_fix`, which takes it out of the answer again."""
    window = SimpleNamespace(dim=0, index_list=[2, 3], causal_anchor_index=anchor)
    assert window_of({"context_window": window}) == shown
