"""Whoever takes a tensor says how it is shaped, and whoever takes a noise level in which unit.

In its docstring, its class's, its module's or its method's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = [f"editing/{path.name}" for path in sorted((ROOT / "editing").iterdir()) if any(path.glob("*.py"))] + ["jobs"]
SHAPE = re.compile(r"\[(?:[A-Za-z0-9_.,+ ]|, )+\]|Shapes as in")
UNIT = re.compile(r"in\s+units\s+of\s+the\s+clean\s+latent")
LEVEL = re.compile(r"(sigma|timestep)s?(_\w+)?")  # the names of parameters that are noise levels
OVERRIDES = {"taken", "apply", "scores"}  # told of where they are declared: Method, Judge


def functions(text: str) -> Iterator[tuple[ast.FunctionDef, str, str]]:
    """Each function of a module or of its classes, the class's name, and what the docstrings around it tell."""

    def look(body: list[ast.stmt], told: str, within: str) -> Iterator[tuple[ast.FunctionDef, str, str]]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from look(node.body, told + (ast.get_docstring(node) or ""), f"{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                yield node, within, told + (ast.get_docstring(node) or "")

    tree = ast.parse(text)
    yield from look(tree.body, ast.get_docstring(tree) or "", "")


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def unshaped(text: str, path: str = "x.py") -> Iterator[str]:
    """The public functions that take a Tensor, and name no shape."""
    for function, within, told in functions(text):
        takes = [each for each in parameters(function) if of_tensors(each)]
        overrides = within and function.name in OVERRIDES and not ast.get_docstring(function)
        if takes and not function.name.startswith("_") and not overrides and not SHAPE.search(told):
            yield f"{path}: {within}{function.name} ({', '.join(each.arg for each in takes)})"


def unitless(text: str, path: str = "x.py") -> Iterator[str]:
    """The functions that take a noise level, and name no unit."""
    for function, within, told in functions(text):
        takes = [each.arg for each in parameters(function) if LEVEL.fullmatch(each.arg)]
        if takes and not UNIT.search(told):
            yield f"{path}: {within}{function.name} ({', '.join(takes)})"


def of_tensors(argument: ast.arg) -> bool:
    """A tensor or some of them; a state dict's have names, and any shape."""
    kind = ast.unparse(argument.annotation) if argument.annotation else ""
    return bool(re.search(r"\bTensor\b", kind)) and not re.search(r"(dict|Mapping|Callable|list)\[", kind)


@pytest.mark.parametrize("room", ROOMS)
def test_shapes_are_told(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    missing = [each for p in files for each in unshaped(p.read_text(encoding="utf-8"), f"{room}/{p.name}")]
    assert files and not missing, f"say how these are shaped: {missing}"


@pytest.mark.parametrize("room", ROOMS)
def test_units_of_noise_levels_are_told(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    missing = [each for p in files for each in unitless(p.read_text(encoding="utf-8"), f"{room}/{p.name}")]
    assert files and not missing, f"say in which unit these noise levels are: {missing}"


def test_every_room_is_looked_at() -> None:
    rooms = ("edits", "engine", "files", "gates", "methods", "presets", "training", "weights")
    assert {f"editing/{room}" for room in rooms} <= set(ROOMS)


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


def test_the_reader_sees_whose_noise_level_has_no_unit() -> None:
    text = '''
def told(sigma: float) -> None:
    """sigma is in units of the clean latent."""
def silent(sigmas: Tensor) -> None:
    """sigmas: [S + 1]."""
class Some:
    """timestep: in units of
    the clean latent."""
    def heard(self, timestep: Tensor) -> None: ...
def other(percent_to_sigma: Callable) -> None: ...
def _private(x: Tensor, *, sigma_start: float) -> None: ...
'''
    assert list(unitless(text)) == ["x.py: silent (sigmas)", "x.py: _private (sigma_start)"]
