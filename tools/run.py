"""Run a module of this checkout as the package `conceptguard`: `python tools/run.py demo.train --steps 20`.

`python tools/run.py -m pytest tests` runs an installed module instead. The make commands come through here, with
everything prepared by environment.py; tests/conftest.py borrows the functions.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "conceptguard"


def register() -> None:
    """Make the checkout importable as `conceptguard`, whatever its folder is called.

    The folder itself stays off sys.path: its `nodes` would hide ComfyUI's module of that name.
    """
    if PACKAGE in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


def has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def use_comfyui(folder: Path, cpu: bool, base_directory: Path | None = None) -> None:
    """Make ComfyUI's modules importable in this process, with the options its server would be started with.

    Call it before anything imports comfy.model_management or folder_paths: they read the options once. Models are
    looked for, and files written, in `base_directory`, which is ComfyUI's own folder unless given.
    """
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args

    args.cpu = cpu
    # ComfyUI's own choice on a CPU is some fifty times slower on small models.
    args.use_pytorch_cross_attention = True
    if base_directory is not None:
        args.base_directory = str(base_directory)


def main(arguments: list[str]) -> None:
    if not arguments:
        sys.exit(f"usage: run.py MODULE [ARGUMENT...] runs {PACKAGE}.MODULE; run.py -m MODULE ... an installed one")
    # Python put this folder first on the path; its files are not modules of their own.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "tools"]
    register()
    if arguments[0] == "-m":
        name, rest = arguments[1], arguments[2:]
        if importlib.util.find_spec(name) is None:
            mend = "install it there, or unset COMFYUI_PYTHON"
            sys.exit(f"ConceptGuard: {sys.executable} has no module {name}\n  mend: {mend}")
    else:
        name, rest = f"{PACKAGE}.{arguments[0]}", arguments[1:]
    from conceptguard.tools.environment import SetupError, comfyui_path
    from conceptguard.tools.host import SERVE_BASE, prepare_base

    try:
        if not name.startswith(f"{PACKAGE}.tools.") and arguments[0] != "-m":
            use_comfyui(comfyui_path(), cpu=not has_accelerator(), base_directory=prepare_base(SERVE_BASE))
        sys.argv[1:] = rest
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SetupError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
