"""A policy's file: what it may hold, and that a damaged one leaves nothing to be sampled by."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from conceptguard.editing.policy.document import Policy, read
from conceptguard.editing.policy.file import PolicyFile, Refused, chosen

SHIPPED = Path(__file__).resolve().parent.parent / "presets"
TEXT = """
on = true
[[rules]]
families = ["SD1.x"]
presets = ["no-weapons"]
strength = 0.5
[[rules]]
presets = ["no-gore", "classroom"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(TEXT)
    return path


def test_both_forms_say_the_same() -> None:
    rules = [{"families": ["SD1.x"], "presets": ["no-weapons"], "strength": 0.5}, {"presets": ["no-gore", "classroom"]}]
    policy = read(TEXT.encode(), ".toml")
    assert policy == read(json.dumps({"on": True, "rules": rules}).encode(), ".json")
    assert (policy.others, policy.pictures, policy.prompts) == ("refuse", "edit", False)


def test_the_first_rule_that_covers_a_family_has_it() -> None:
    policy = read(TEXT.encode(), ".toml")
    assert policy.rule("SD1.x") == policy.rules[0] and policy.rule("SDXL") == policy.rules[1]
    assert Policy(on=True, rules=policy.rules[:1]).rule("SDXL") is None


BAD = [
    ("on = ", "it is not TOML: Invalid value .at end of document"),
    ("on = true", "rules: Field required"),
    ("on = 1\n" + TEXT.replace("on = true", ""), "on: Input should be a valid boolean"),
    (TEXT + "path = 'x'", "rules.1.path: Extra inputs are not permitted"),
    (TEXT.replace("0.5", "nan"), "rules.0.strength: Input should be a finite number"),
    (TEXT.replace("0.5", "0"), "rules.0.strength: Input should be greater than 0"),
    (TEXT.replace("0.5", "2026-01-01"), "rules.0.strength: Input should be a valid number"),
    (TEXT.replace('families = ["SD1.x"]', ""), "rule 1 covers every family"),
    (TEXT.replace('["no-weapons"]', "[]"), "rules.0.presets: Tuple should have at least 1 item"),
    ("others = 'allow'\n" + TEXT, "others: Input should be 'refuse' or 'pass'"),
    ("#" * 300_000, "larger than 256 KB"),
]


@pytest.mark.parametrize("text, why", BAD)
def test_a_damaged_one_refuses_by_its_name_with_the_mend(path: Path, text: str, why: str) -> None:
    path.write_text(text)
    with pytest.raises(Refused, match='"policy.toml" is damaged: .*' + why) as refused:
        PolicyFile(path, SHIPPED).now()
    assert "mends it" in str(refused.value) and str(path.parent) not in str(refused.value)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"", b"{", b'{"on": true, "on": false}', b"[" * 100_000, b"null"])
def test_whatever_json_holds_it_is_a_refusal(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(data)
    with pytest.raises(Refused, match="is damaged"):
        PolicyFile(path, SHIPPED).now()


def test_a_preset_that_is_not_there_or_damaged_is_named(path: Path) -> None:
    file = PolicyFile(path, SHIPPED)
    path.write_text(TEXT.replace("no-gore", "mine.json"))
    with pytest.raises(Refused, match='preset "mine.json" is neither'):
        file.now()
    mine = path.with_name("mine.json")
    mine.write_text("{}")
    with pytest.raises(Refused, match='preset "mine.json": preset: schema_version: Field required'):
        file.now()
    mine.write_text((SHIPPED / "no-nudity.json").read_text())
    assert file.now().presets["mine.json"].name == "No nudity"


def test_it_is_read_again_when_it_changes_and_only_then(path: Path) -> None:
    file = PolicyFile(path, SHIPPED)
    first = file.now()
    assert file.now() is first
    path.write_text(TEXT.replace("0.5", "0.25"))
    assert file.now().policy.rules[0].strength == 0.25
    path.write_text("damaged")
    with pytest.raises(Refused):
        file.now()
    os.remove(path)
    with pytest.raises(Refused, match="it is not there"):
        file.now()
    path.write_text(TEXT)
    assert file.now() == first


def test_where_it_is_looked_for(path: Path, tmp_path: Path) -> None:
    assert chosen(None, tmp_path / "nowhere", SHIPPED) is None
    found = chosen(None, tmp_path, SHIPPED)
    assert found is not None and found.path == path
    named = chosen(str(tmp_path / "gone.toml"), tmp_path, SHIPPED)
    assert named is not None
    with pytest.raises(Refused, match='"gone.toml" is damaged: it is not there'):
        named.now()


def test_what_it_governs_in_a_line(path: Path) -> None:
    assert PolicyFile(path, SHIPPED).now().governs() == (
        "SD1.x: No weapons; all other models: No gore, Classroom; models that it cannot edit are refused"
    )
