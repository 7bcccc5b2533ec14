"""Help pages and locales: complete, and about nodes and inputs that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conceptguard.nodes import NODES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "web" / "docs"
SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in NODES}
LOCALES = sorted((ROOT / "locales").glob("*"))
SCRIPTS = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "web").glob("*.*js")))


def strings(folder: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("node_id", SCHEMAS)
def test_a_node_has_a_page_of_help(node_id: str) -> None:
    page = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
    assert page.startswith("# ") and len(page) > 200
    assert [each.id for each in SCHEMAS[node_id].inputs if f"`{each.id}`" not in page] == [], "each input has its line"


@pytest.mark.parametrize("node_id", SCHEMAS)
def test_a_page_of_help_has_pictures_that_are_there(node_id: str) -> None:
    """Beside the page, for the page names them as the host resolves them: relative to web/docs/."""
    pictures = pictures_of(node_id)
    assert f"{node_id}.webp" in pictures
    for name in pictures:
        with Image.open(DOCS / name) as picture:
            picture.load()
        assert "/" not in name and (DOCS / name).stat().st_size <= 25 * 1024, name


def test_no_picture_is_left_over_and_all_are_small() -> None:
    """Those of the pages and no others."""
    files = [path for path in DOCS.iterdir() if path.suffix != ".md"]
    assert {path.name for path in files} == {name for node_id in SCHEMAS for name in pictures_of(node_id)}
    assert sum(path.stat().st_size for path in files) <= 600 * 1024


def pictures_of(node_id: str) -> list[str]:
    return re.findall(r"!\[[^]]+\]\(([^)]+)\)", (DOCS / f"{node_id}.md").read_text(encoding="utf-8"))


def test_a_page_of_help_belongs_to_a_node() -> None:
    assert {path.stem for path in DOCS.glob("*.md")} <= set(SCHEMAS)


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
    ids = {found.replace(".", "_") for found in re.findall(r'"(ConceptGuard\.[A-Za-z]+\.[A-Za-z]+)"', SCRIPTS)}
    assert set(strings(folder, "settings")) | set(strings(folder, "commands")) == ids


@pytest.mark.parametrize("folder", LOCALES, ids=lambda folder: folder.name)
def test_a_locale_translates_every_word_of_the_page(folder: Path) -> None:
    words = strings(folder, "main")["conceptGuard"]
    assert set(words) == set(re.findall(r'\bt\("([^"]+)"', SCRIPTS))
    for english, translated in words.items():
        assert translated != english and sorted(holes(english)) == sorted(holes(translated)), english


def holes(text: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", text)


def test_the_page_says_nothing_that_no_locale_can_translate() -> None:
    """Texts of elements, their titles and errors go through `t`; settings and commands have files of their own."""
    spoken = r'\b(?:text|title|placeholder|ariaLabel|alt|error): ["`][A-Za-z]|(?:button|Error)\(["`]|return ["`][A-Z]'
    assert re.findall(f"(?m)^.*(?:{spoken}).*$", SCRIPTS.replace('title: "ConceptGuard"', "")) == []
