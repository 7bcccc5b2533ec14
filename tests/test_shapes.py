"""Whoever takes a tensor says how it is shaped: in its docstring, its class's, its module's or its method's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "editing"
ROOMS = ("gates", "methods", "pictures", "causal", "converters")
SHAPE = re.compile(r"\[(?:[A-Za-z0-9_.,+ ]|, )+\]|Shapes as in")
OVERRIDES = {"taken", "apply", "scores"}  # told of where they are declared: Method, Judge


def unshaped(text: str, path: str = "x.py") -> Iterator[str]:
    """The public functions that take a Tensor, and name no shape."""
    tree = ast.parse(text)

    def look(body: list[ast.stmt], told: str, within: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from look(node.body, told + (ast.get_docstring(node) or ""), f"{node.name}.")
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                takes = [each for each in (*node.args.args, *node.args.kwonlyargs) if of_tensors(each)]
                overrides = within and node.name in OVERRIDES and not ast.get_docstring(node)
                if takes and not overrides and not SHAPE.search(told + (ast.get_docstring(node) or "")):
                    yield f"{path}: {within}{node.name} ({', '.join(each.arg for each in takes)})"

    yield from look(tree.body, ast.get_docstring(tree) or "", "")


def of_tensors(argument: ast.arg) -> bool:
    """A tensor or some of them; a state dict's have names, and any shape."""
    kind = ast.unparse(argument.annotation) if argument.annotation else ""
    return bool(re.search(r"\bTensor\b", kind)) and not re.search(r"(dict|Mapping|Callable|list)\[", kind)


@pytest.mark.parametrize("room", ROOMS)
def test_shapes_are_told(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    missing = [each for p in files for each in unshaped(p.read_text(encoding="utf-8"), f"{room}/{p.name}")]
    assert files and not missing, f"say how these are shaped: {missing}"


def test_the_reader_sees_who_says_nothing() -> None:
    text = '''
def told(x: Tensor) -> Tensor:
    """x: [B, h, w]."""
def silent(x: Tensor, *, y: Tensor | None = None) -> Tensor:
    """Does things."""
class Some:
    """All x are [n, F]."""
    def heard(self, x: Tensor) -> None: ...
def named(weights: Mapping[str, Tensor]) -> None: ...
def _private(x: Tensor) -> None: ...
'''
    assert list(unshaped(text)) == ["x.py: silent (x, y)"]
