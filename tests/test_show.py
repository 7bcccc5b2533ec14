"""Words for the page: text that no frontend takes for more than its letters."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conceptguard.nodes import show
from conceptguard.nodes.show import JOINER, inert, offered

NODES = Path(show.__file__).parent
PIECES = ["<", ">", "/", "img", " onerror=x", "!--", "?", "[", "[[", "|", "]]", "_", "__LNK", "0__", "https", ":", "//"]
PIECES += ["www", ".", "a", " ", "\n", "&lt;", "&#60;", "javascript:", JOINER]


class Page(HTMLParser):
    """What a page that sets a text as HTML makes of it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.more = "", []  # type: ignore[var-annotated]
        self.feed(text)
        self.close()

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.more.append(tag)

    handle_endtag = handle_comment = handle_decl = handle_pi = unknown_decl = handle_starttag  # type: ignore[assignment]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@example("<img src=x onerror=alert(1)>")
@example("[[[mugs|https://example.invalid]]]")
def test_a_page_sees_letters_alone(text: str) -> None:
    shown = inert(text)
    assert Page(shown).more == []
    assert shown.replace(JOINER, "") == text.replace(JOINER, ""), "nothing but what cannot be seen is added"
    assert not re.search(r"\[\[|__LNK|://|\bwww\.", shown, re.IGNORECASE), "what frontends make links of"
    assert inert(shown) == shown


def test_plain_words_stay_as_they_are() -> None:
    text = 'saved as mine/sharp_00001.safetensors\n"owl", 2 of 3 & [1, 0.5] > 0.25 (A_0: 1) http, www'
    assert inert(text) == text


def of(tree: ast.AST, name: str) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if name in (getattr(node, "attr", None), getattr(node, "id", None)):
            yield node


def test_words_leave_by_one_door() -> None:
    """No other module sends words to a node, or puts them into what a page reads when a run has ended."""
    for path in NODES.parent.rglob("*.py"):
        if path.parent.name == "tests" or path == NODES / "show.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [*of(tree, "send_progress_text"), *of(tree, "PreviewText"), *of(tree, "PreviewMarkdown")], path
        ui = [
            word.value
            for call in ast.walk(tree)
            if isinstance(call, ast.Call)
            for word in call.keywords
            if word.arg == "ui"
        ]
        keys = [key for each in ui if isinstance(each, ast.Dict) for key in each.keys if isinstance(key, ast.Constant)]
        assert "text" not in [key.value for key in keys], path


def test_a_name_with_a_tag_is_in_no_menu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert offered("safe & sound [v1].safetensors") and not offered("<img src=x onerror=alert(2)>.safetensors")
        offered("<img src=x onerror=alert(2)>.safetensors")
    assert [record.message for record in caplog.records] == [
        "ConceptGuard: '<img src=x onerror=alert(2)>.safetensors' is left out of the menus, where a < may begin a tag; "
        "rename it"
    ]
