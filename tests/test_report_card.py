"""A preset carries what a report found, by the checkpoint's hash, and says it in plain words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conceptguard.editing.presets.document import read
from conceptguard.editing.presets.words import measured as told
from conceptguard.jobs.report.card import carried
from conceptguard.nodes.preset_routes import report

PRESET = (Path(__file__).resolve().parent.parent / "presets" / "no-weapons.json").read_text(encoding="utf-8")


def card(*figures: tuple[str, float, int], sha256: str = "ab" * 32) -> dict[str, Any]:
    found = [{"name": name, "side": "edited", "value": value, "n": n} for name, value, n in figures]
    return {"checkpoint": "sdxl.safetensors", "checkpoint_sha256": sha256, "figures": found}


LEFT, KEPT = ("flagged, of what is to go", 0.008, 500), ("preservation", 0.97, 400)


def test_a_preset_carries_its_report() -> None:
    text = carried(read(PRESET), card(LEFT, KEPT))
    assert read(text).unmeasured == read(PRESET)
    assert json.loads(text)["schema_version"] == 3 and "what it was measured to do" in json.loads(text)["needs"]
    words = f"Measured on sdxl.safetensors (sha256 {'ab' * 6}..): 0.8 % left (n = 500), 97 % kept (n = 400)."
    assert told(read(text)) == report(text)["measured"] == [words]
    assert told(read(PRESET)) == [] and json.loads(PRESET)["schema_version"] == 2


def test_a_newer_report_of_a_checkpoint_takes_the_older_ones_place() -> None:
    once = carried(read(PRESET), card(LEFT, KEPT))
    again = carried(read(once), card(LEFT, ("newly flagged, of what is to stay", 0.25, 4)))
    other = read(carried(read(again), card(LEFT, KEPT, sha256="cd" * 32)))
    assert [(each.sha256[:2], each.kept) for each in other.measured] == [("ab", 0.75), ("cd", 0.97)]


def test_what_counts_nothing_is_not_carried() -> None:
    for figures in ([LEFT], [KEPT], []):
        with pytest.raises(ValueError, match="counts nothing that a preset could carry"):
            carried(read(PRESET), card(*figures))


@pytest.mark.parametrize("wrong", [{"left": 1.5}, {"sha256": "ab"}, {"kept_of": 0}, {"checkpoint": "a\u202eb"}])
def test_a_report_from_anybody_is_checked(wrong: dict[str, Any]) -> None:
    document = json.loads(carried(read(PRESET), card(LEFT, KEPT)))
    document["measured"][0] |= wrong
    with pytest.raises(ValueError, match="measured"):
        read(json.dumps(document))
