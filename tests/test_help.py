"""Help pages and locales: complete, and about nodes and inputs that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conceptguard.nodes import NODES

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in NODES}
LOCALES = sorted((ROOT / "locales").glob("*"))


def strings(folder: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("node_id", SCHEMAS)
def test_a_node_has_a_page_of_help(node_id: str) -> None:
    page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    assert page.startswith("# ") and len(page) > 200


def test_a_page_of_help_belongs_to_a_node() -> None:
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} <= set(SCHEMAS)


@pytest.mark.parametrize("folder", LOCALES, ids=lambda folder: folder.name)
def test_a_locale_translates_every_node_and_input(folder: Path) -> None:
    translated = strings(folder, "nodeDefs")
    assert set(translated) == set(SCHEMAS)
    for node_id, texts in translated.items():
        schema = SCHEMAS[node_id]
        assert texts["display_name"] and texts["description"]
        assert set(texts["inputs"]) == {each.id for each in schema.inputs}, node_id
        assert set(texts["outputs"]) == {str(i) for i in range(len(schema.outputs))}, node_id
        assert all(each["name"] and each["tooltip"] for each in texts["inputs"].values()), node_id


@pytest.mark.parametrize("folder", LOCALES, ids=lambda folder: folder.name)
def test_a_locale_translates_every_setting_and_command(folder: Path) -> None:
    scripts = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "web").glob("*.*js")))
    ids = {found.replace(".", "_") for found in re.findall(r'"(ConceptGuard\.[A-Za-z]+\.[A-Za-z]+)"', scripts)}
    assert set(strings(folder, "settings")) | set(strings(folder, "commands")) == ids
