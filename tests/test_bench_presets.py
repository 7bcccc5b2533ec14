"""Which concepts of the shipped presets the demo world has, and that a preset's table is what its edits do."""

from __future__ import annotations

import pytest

from conceptguard.benchmarks import presets
from conceptguard.benchmarks.sampling import Demo
from conceptguard.editing.engine.host import edits_of
from conceptguard.editing.presets.document import Preset, read

NAMED = {
    "artist-style-opt-out": {"style noto"},
    "classroom": {"kitchen knife", "bomb", "cigarette", "wine glass", "beer mug", "skull"},
    "fair-faces": {"man, unasked", "light, unasked"},
    "no-gore": {"skull"},
    "no-nudity": set(),
    "no-weapons": {"kitchen knife", "bomb", "crossed swords", "dagger"},
}


def shipped(name: str) -> Preset:
    (path,) = [path for path in presets.SHIPPED if path.stem == name]
    return read(path.read_text(encoding="utf-8"))


def test_every_shipped_preset_is_measured() -> None:
    assert [path.stem for path in presets.SHIPPED] == sorted(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_the_concepts_that_the_demo_world_has_are_looked_for(name: str) -> None:
    looks = presets.erased(shipped(name), 2, 0)
    assert {label for label in looks if "unnamed" not in label} == NAMED[name]
    assert all(len(pictures) == 2 for pictures, _ in looks.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_every_shipped_preset_goes_on_the_demo_model(name: str) -> None:
    """Its text encoder knows its world's words alone: phrases that differ in others are one to it."""
    demo, preset = Demo.ready(), shipped(name)
    assert len(edits_of(presets.applied(demo, preset))) == len(preset.edits)


def test_what_is_to_stay_is_neither_erased_nor_its_neighbour() -> None:
    looks = presets.kept(shipped("no-weapons"), 4, 0)
    assert {p.objects[0] for p in looks["neighbours"][0]} == {"hammer", "soccer ball", "spoon"}
    others = {p.objects[0] for p in looks["other things"][0]}
    assert len(others) == 4 and not others & {*NAMED["no-weapons"], "hammer", "soccer ball", "spoon"}
    assert all(p.style != "noto" for p in presets.kept(shipped("artist-style-opt-out"), 8, 0)["other things"][0])
