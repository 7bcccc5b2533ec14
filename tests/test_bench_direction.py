"""The direction and fairness tables, as short as they can be: that they run, and what their figures mean."""

from __future__ import annotations

import pytest
import torch

from conceptguard.benchmarks import direction
from conceptguard.demo import world


def test_total_variation_is_the_distance_from_uniform() -> None:
    assert direction.total_variation(["man"] * 8, ("man", "woman")) == 0.5
    assert direction.total_variation(["man", "woman"] * 4, ("man", "woman")) == 0
    assert direction.total_variation(["light"] * 5, tuple(world.TONES)) == pytest.approx(0.8)
    assert 0.1 < direction.floor(8, 2) < 0.2 < direction.floor(8, 5) < 0.4


def test_what_is_measured_was_not_trained() -> None:
    for members, unseen in direction.FAMILIES.values():
        assert not set(members) & set(unseen) and {*members, *unseen} <= set(world.OBJECTS)
    assert {*direction.LEARNED_ON, *direction.MEASURED_ON} == set(world.ROLES)
    assert all(world.ROLES[role][1] != 0.5 for role in direction.MEASURED_ON)
    assert [p.objects for p in direction.scenes_with(("beer mug",), 2, 0)] == [("beer mug",)] * 2
    assert direction.scenes_with(("scissors",), 2, 0) == []


@pytest.mark.slow
def test_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    from conceptguard.benchmarks.sampling import Demo

    demo = Demo.ready()
    demo.steps = 2
    with torch.no_grad():
        rows = direction.compare(demo, 1, 1, 1, (1.0,), concepts=("drinks",), examples=12)
        assert [row["edit"] for row in rows] == [
            "unedited",
            *(f"{name}, strength 1{gated}" for gated in ("", ", gated") for name in ("direction", "random")),
        ]
        assert all({"named", "implied", "never trained", "others"} <= row.keys() for row in rows)
        monkeypatch.setattr(direction, "ATTRIBUTES", {"gender": tuple(world.GENDERS)})
        rows = list(direction.fairness(demo, 1, 1, 1, named=1))
        assert [row["edit"] for row in rows[:3]] == ["unedited", "fair", "random"] and len(rows) == 7
        assert all(0 <= row["gender"] <= 0.5 and row["beer mug left"].n == 1 for row in rows)


@pytest.mark.slow
def test_combinations_stand_beside_each_alone() -> None:
    rows = list(direction.combined(("skull",), 1, 1, 1))
    others = ("SLD, medium", "SLD, max", "ESD-x")
    both = [name for other in others for name in (other, f"direction and {other}")]
    assert [row["edit"] for row in rows] == ["unedited", "direction", *both]
    assert all(row["named"].n == row["others"].n == 1 for row in rows)
