"""Bring what the browser tests need beside the rest: chromium, Playwright, and a newer frontend than ComfyUI's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .environment import SetupError, cache_root, explain, fresh, locked, pip

PLAYWRIGHT = "playwright==1.65.2"
NEWER = "comfyui-frontend-package==1.58.1"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
# A user's settings, so that nothing but the graph is on the page.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False, "Comfy.EnableTooltips": False}


def chromium() -> str | None:
    """The browser to test with: `$CONCEPT_GUARD_CHROMIUM`, or the one that is installed."""
    known = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CONCEPT_GUARD_CHROMIUM") or next(filter(None, map(shutil.which, known)), None)


def settle(base: Path, settings: Mapping[str, Any]) -> None:
    """Give the user of the server on `base` these settings; a page takes them when it is loaded."""
    file = base / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings), encoding="utf-8")


def frontend_folder() -> Path:
    return cache_root() / NEWER.replace("==", "-")


def newer_frontend() -> Path:
    """The static folder of the other frontend to test with: `$CONCEPT_GUARD_FRONTEND`, or the one in the cache."""
    own = os.environ.get("CONCEPT_GUARD_FRONTEND")
    return Path(own) if own else frontend_folder() / "comfyui_frontend_package" / "static"


def bring_chromium() -> None:
    if chromium():
        return
    if not shutil.which("apt-get"):
        raise SetupError("there is no chromium here", "install chromium or Chrome, or name one: CONCEPT_GUARD_CHROMIUM")
    as_root = ["sudo"] if os.geteuid() else []
    apt = [*as_root, "apt-get", "-qq", "-y", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3"]
    install = [*apt, "--no-install-recommends", "install", "chromium"]
    settings = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(install, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        return
    subprocess.run([*apt, "update"], env=settings)  # the lists were missing or old
    if subprocess.run(install, env=settings, stdout=subprocess.DEVNULL).returncode:
        raise SetupError("chromium could not be installed", "see apt-get's own words above")


def bring_packages() -> None:
    python, log = Path(sys.executable), cache_root() / "browser.log"
    with locked(cache_root() / "browser.lock"), fresh(cache_root() / "browser.tmp") as scratch:
        unpacked = scratch / "package"
        for arguments in ([PLAYWRIGHT], ["--no-deps", "--target", str(unpacked), NEWER]):
            if NEWER in arguments and frontend_folder().exists():
                continue
            result = pip(python, ["install", *arguments], log, scratch, 1)
            if result.code:
                raise explain(result.output, log)
        if unpacked.exists():
            unpacked.rename(frontend_folder())  # in one step: the folder is there whole, or not at all


def main() -> None:
    bring_chromium()
    bring_packages()


if __name__ == "__main__":
    main()
