"""A test that starts what `make test` leaves out has to say so by a mark."""

from __future__ import annotations

from pathlib import Path

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
