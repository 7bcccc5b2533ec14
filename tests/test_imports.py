"""Which folder may import which: the maths must stay usable, and testable, without nodes, demo or server."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ALLOWED = {
    "editing": {"editing"},
    "jobs": {"jobs", "editing"},
    "nodes": {"nodes", "jobs", "editing"},
    "demo": {"demo", "jobs", "editing", "tools"},
    "tools": {"tools"},
    "benchmarks": {"benchmarks", "jobs", "editing", "demo", "tools"},
}
# The one node that loads the demo model has to know it.
EXCEPTIONS = {"nodes/demo.py": {"demo"}}

# Modules of editing/ that may import the host: the binding, what trains through a MODEL, and a policy's enforcement.
HOST_USERS = {
    "editing/engine/host.py",
    "editing/engine/weights.py",
    "editing/engine/backbones/unet.py",
    "editing/policy/enforce.py",
    "editing/training/changes.py",
    "editing/training/harness.py",
}
JOBS_MAY = {"comfy"}  # and neither nodes nor a server: benchmarks and reports run jobs, too
HOST_MODULES = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes", "server", "execution"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Absolute names of the modules a file imports, also inside functions; `conceptguard.x` for this pack's own."""
    package = ("conceptguard", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from .. import nodes` names its target only in the aliases
            yield from (f"{module}.{alias.name}" for alias in node.names)


def own_folders(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(path)]
    return {name[1] for name in parts if name[0] == "conceptguard" and len(name) > 1}


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_import_only_what_lies_below_them(folder: str) -> None:
    for path in sources(folder):
        name = path.relative_to(ROOT).as_posix()
        beyond = own_folders(path) - ALLOWED[folder] - EXCEPTIONS.get(name, set())
        assert not beyond, f"{name} imports {sorted(beyond)}; {folder}/ may import {sorted(ALLOWED[folder])}"


def test_only_the_binding_of_editing_imports_the_host() -> None:
    for path in sources("editing"):
        name = path.relative_to(ROOT).as_posix()
        used = {module.split(".")[0] for module in imported(path)} & HOST_MODULES
        assert not used or name in HOST_USERS, f"{name} imports {sorted(used)}: only {sorted(HOST_USERS)} may"


def test_there_is_one_way_out_of_inference_mode() -> None:
    """What the host made in it is refused by autograd, unless it is copied: training/mode.py sees to both."""
    own = "editing/training/mode.py", "editing/training/harness.py"  # the latter thaws the host's weights within it
    for path in (path for folder in ("editing", "jobs", "nodes") for path in sources(folder)):
        text = path.read_text(encoding="utf-8")
        found = [word for word in ("inference_mode", "enable_grad", "set_grad_enabled") if word in text]
        assert not found or path.relative_to(ROOT).as_posix() in own, f"{path.name} has {found}; use training/mode.py"


def test_jobs_need_no_graph_and_no_server() -> None:
    for path in sources("jobs"):
        used = {module.split(".")[0] for module in imported(path)} & HOST_MODULES
        assert used <= JOBS_MAY, f"{path.name} imports {sorted(used)}"


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "editing").mkdir()
    path = tmp_path / "editing" / "example.py"
    path.write_text(
        "import comfy.model_patcher as p\nfrom .engine import host\nfrom ..nodes.cre import CRE\n"
        "def late():\n    from .. import demo\n    from comfy import ops\n"
    )
    assert set(imported(path)) == {
        "comfy.model_patcher",
        "conceptguard.editing.engine.host",
        "conceptguard.nodes.cre.CRE",
        "conceptguard.demo",
        "comfy.ops",
    }


def test_importing_the_pack_needs_neither_torch_nor_the_host() -> None:
    script = (
        "import runpy, sys; runpy.run_path('tools/run.py')['register'](); import conceptguard; "
        "print({'torch', 'comfy', 'comfy_api'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True) == "set()\n"
