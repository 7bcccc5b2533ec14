"""The table of erasers: what it draws and counts, and a run of a part of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch

from conceptguard.benchmarks import attack, instead, memory, peers
from conceptguard.benchmarks.table import Rate, Record, Row, Table, run
from conceptguard.demo import world
from conceptguard.editing.edits.spec import EditSpec
from conceptguard.editing.engine.host import add_edit


def rows(methods: tuple[str, ...] = ("a", "b", "c"), count: int = 1) -> Iterator[Row]:
    for method in methods:
        yield {"architecture": "unet", "method": method, "found": count}


def last(table: Table, **how: Any) -> Record:
    return list(run(table, False, **how))[-1]


def test_a_part_of_a_table_leaves_its_other_rows_as_they_were() -> None:
    table = Table("t", "T", "about", rows, rows, ("architecture", "method"))
    before = last(table)
    assert [row["found"] for row in before.rows] == [1, 1, 1]
    after = last(table, part={"methods": ("b", "d"), "count": 5}, held=before.rows)
    assert {row["method"]: row["found"] for row in after.rows} == {"a": 1, "b": 5, "c": 1, "d": 5}
    again = last(Table("t", "T", "about", rows, rows), held=before.rows)
    assert len(again.rows) == 6  # rows without a key are all kept


def test_a_total_is_of_all_rows_whenever_they_were_measured() -> None:
    def some(concepts: tuple[str, ...] = ("a", "b"), count: int = 2) -> Iterator[Row]:
        for concept in concepts:
            yield {"concept": concept, "left": Rate(1, count)}

    table = Table("t", "T", "about", some, some, ("concept",), instead.summed)
    before = last(table)
    assert [(row["concept"], row["left"]) for row in before.rows] == [
        ("a", Rate(1, 2)),
        ("b", Rate(1, 2)),
        ("all", Rate(2, 4)),
    ]
    after = last(table, part={"concepts": ("b",), "count": 8}, held=before.rows)
    assert {row["concept"]: row["left"] for row in after.rows} == {"a": Rate(1, 2), "b": Rate(1, 8), "all": Rate(2, 10)}


def test_the_prompt_without_the_word() -> None:
    caption = "a drawing of a kitchen knife in the style of noto on a red background"
    assert peers.unsaid(caption, ["kitchen knife"]) == "a drawing of something in the style of noto on a red background"
    assert peers.unsaid(caption, ["noto"]) == "a drawing of a kitchen knife on a red background"


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_concept_has_a_scene_and_a_neighbour_of_its_own(name: str) -> None:
    word, near = peers.SCENE[name], world.NEIGHBOURS[name]
    assert world.SCENES[word][1] == name and near in world.OBJECTS and near != name
    assert all(name in line for line in peers.phrasings(name).splitlines())


def test_what_a_model_carries() -> None:
    model, concept = tiny.sd1(), tiny.concept(phrases=2)
    assert peers.carried(model, model, [concept]) == 0
    edited = add_edit(model, EditSpec("projection", concept, options=tiny.CRE, node="Test"))
    assert peers.carried(edited, model, [concept]) == 2 * 77 * tiny.WIDTH * 4
    assert peers.carried(lambda prompts: edited, model, [concept]) == 2 * 77 * tiny.WIDTH * 4


def test_every_row_has_a_method_of_each_kind() -> None:
    assert peers.METHODS.keys() >= {
        "unedited",
        "negative prompt",
        "CRE",
        "EIUP",
        "UCE",
        "RECE",
        "SAFREE",
        *peers.TRAINED,
    }
    assert peers.METHODS["negative prompt"].negative and peers.METHODS["prompt without the word"].unsaid


def test_the_peak_is_of_what_is_there_at_once_and_was_made_in_the_run() -> None:
    before = torch.zeros(1000)
    with memory.Peak() as peak:
        a = before + 1  # 4000 bytes
        for _ in range(3):
            a = a + 1  # two of them at once
        view = a[:500].view(50, 10)
        view += 1
        before.mul_(2)
    assert peak.most == 8000 and peak.now == 4000
    del a, view
    assert peak.now == 0


def test_every_eraser_that_is_attacked_is_one_of_the_table() -> None:
    assert set(attack.PEERS) <= set(peers.METHODS)
    assert memory.eraser("CRE") is peers.METHODS["CRE"]
