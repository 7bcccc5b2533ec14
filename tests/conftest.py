"""What every test needs: the checkout importable as `conceptguard`, ComfyUI importable on the CPU, a live server."""

from __future__ import annotations

import gc
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from conceptguard.tools.host import Host

ROOT = Path(__file__).resolve().parent.parent

# ComfyUI reads its options when its modules are first imported, so all of this comes before any test module.
_run = runpy.run_path(str(ROOT / "tools" / "run.py"))
_run["register"]()

from conceptguard.tools.environment import comfyui_path  # noqa: E402  (only importable from here on)

# What in-process tests save must not land in ComfyUI's own folder, which other checkouts share.
_base = Path(tempfile.mkdtemp(prefix="concept-guard-tests-"))
for _name in ("input", "models", "output", "temp", "user"):
    (_base / _name).mkdir()
_run["use_comfyui"](comfyui_path(), cpu=True, base_directory=_base)

import halves  # noqa: E402
import rungs  # noqa: E402

rungs.guard()


# A busy machine is no reason for a property test to fail.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    if folder := os.environ.get("CONCEPT_GUARD_SHARE"):
        config.pluginmanager.register(halves.Half(Path(folder)))


def pytest_collection_finish() -> None:
    """What the imports made stays to the end: the host's many `gc.collect()` need not walk through it each time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    rungs.entered(item)
    if "host" in getattr(item, "fixturenames", ()):  # a session's server is started once, whoever asks first
        rungs.need("server", "a server")


def pytest_unconfigure() -> None:
    shutil.rmtree(_base, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    """The models of the tests are too small for more threads than asked for to pay."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    """One ComfyUI server with this pack, for the whole session."""
    from conceptguard.tools.host import Host

    with Host() as running:
        yield running


@pytest.fixture(scope="module")
def as_a_node() -> Iterator[None]:
    """As the host runs nodes, which also load their models there: in inference mode."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    """A MODEL of SD1's kind, with few and random weights."""
    import tiny

    return tiny.sd1()


@pytest.fixture(scope="module")
def clip() -> Any:
    """A CLIP for it."""
    import tiny

    return tiny.clip()
