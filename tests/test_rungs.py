"""A test that starts what `make test` leaves out has to say so by a mark; the rest is run once, by one of two runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import halves
import pytest
import rungs

from conceptguard.benchmarks import shapes
from conceptguard.tools import host


def test_a_server_needs_its_mark(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="needs_its_mark starts a server: mark it with pytest.mark.server"):
        host.Host().__enter__()


def test_a_full_size_network_needs_its_mark() -> None:
    with pytest.raises(pytest.fail.Exception, match="starts a full-size network: mark it with pytest.mark.slow"):
        shapes.build("SD1.5")
    shapes.build("SD1.5", device="meta")


def test_a_browser_needs_its_mark() -> None:
    with pytest.raises(pytest.fail.Exception, match="starts a browser"):
        rungs.need("browser", "a browser")


@pytest.mark.server
def test_a_marked_test_may(tmp_path: Path) -> None:
    assert "--port" in host.server_command(tmp_path, 1)
    with pytest.raises(pytest.fail.Exception):
        rungs.need("browser", "a browser")


def test_each_file_is_run_by_one_of_two_runs(tmp_path: Path) -> None:
    """By the first that comes to it, with all of its tests."""
    items: list[Any] = [SimpleNamespace(path=tmp_path / f"test_{i}.py") for i in range(200) for _ in range(3)]
    items += [SimpleNamespace(path=tmp_path / "browser" / item.path.name) for item in items]  # of the same names
    folder = tmp_path / "share"
    folder.mkdir()
    runs = [halves.Half(folder), halves.Half(folder)]
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda run: [run.pytest_runtest_protocol(item) is None for item in items], runs)
    assert [a + b for a, b in zip(one, other, strict=True)] == [1] * len(items)
    assert one[::3] == one[1::3] == one[2::3]
