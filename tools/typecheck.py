"""Check the types of the checkout's packages with mypy, as configured in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys

from .environment import ROOT
from .host import link

PACKAGES = ("editing", "jobs", "nodes", "demo", "benchmarks", "tools")


def main() -> int:
    # mypy names modules by their folders, and a checkout's folder can have any name: it looks through a link that has
    # the package's.
    view = ROOT / "output" / "types"
    view.mkdir(parents=True, exist_ok=True)
    link(view / "conceptguard", ROOT)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    for name in PACKAGES:
        if any((ROOT / name).glob("*.py")):
            command += ["-p", f"conceptguard.{name}"]
    print("ConceptGuard: checking types, longest the first time", file=sys.stderr, flush=True)
    return subprocess.run(command, cwd=view, env={**os.environ, "MYPYPATH": ""}).returncode


if __name__ == "__main__":
    sys.exit(main())
