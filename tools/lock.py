"""Write requirements.lock: every package of requirements.in and all it pulls in, each with its exact version.

Nothing is installed: pip only resolves. Run it by `make lock PYTHON=python3.11`, the oldest supported Python, whose
versions also serve the newer ones; the other way round is not so (numpy, scipy and others drop old Pythons).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .environment import LOCK_FILE, SetupError, check_venv, python_of, say

SOURCE = LOCK_FILE.with_suffix(".in")
OLDEST = (3, 11)

# torch asks for these on Linux alone; without the condition the lock could not be installed on macOS.
LINUX_ONLY = re.compile(r"nvidia-|cuda-|triton$")

HEADER = "# Made by `make lock` from requirements.in. The environment's folder is named by the hash of this file.\n"


def resolve() -> list[dict[str, str]]:
    """The name and version of everything pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        command = [str(python_of(Path(folder))), "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", "-", "--requirement", str(SOURCE)]
        report = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if report.returncode:
        raise SetupError("pip could not resolve requirements.in", "see its lines above")
    return [item["metadata"] for item in json.loads(report.stdout)["install"]]


def pin(package: dict[str, str]) -> str:
    name = re.sub(r"[-_.]+", "-", package["name"]).lower()
    version = package["version"].partition("+")[0]  # a local build's mark (torch+cpu) is not in the index
    return f"{name}=={version}" + ('; sys_platform == "linux"' if LINUX_ONLY.match(name) else "")


def main() -> None:
    if sys.version_info[:2] != OLDEST:
        raise SetupError("the lock is made with the oldest supported Python", "make lock PYTHON=python3.11")
    check_venv()
    say("resolving requirements.in, about a minute")
    pins = sorted(pin(package) for package in resolve())
    LOCK_FILE.write_text(HEADER + "\n".join(pins) + "\n", encoding="utf-8")
    say(f"{len(pins)} packages are in {LOCK_FILE.name}")


if __name__ == "__main__":
    main()
