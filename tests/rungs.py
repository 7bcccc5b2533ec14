"""The two rungs of the tests: what only a marked test may start.

`make test` leaves out the tests marked `server`, `browser` or `slow`; here a test fails that starts a server, a browser
or a full-size network without saying so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest

_now: list[pytest.Item] = []  # the test that runs, or whose fixtures are made


def entered(test: pytest.Item) -> None:
    _now[:] = [test]


def need(mark: str, what: str) -> None:
    """Fail the test that runs, unless it has this mark."""
    if _now and not any(_now[0].iter_markers(mark)):
        pytest.fail(f"{_now[0].nodeid} starts {what}: mark it with pytest.mark.{mark}, or `make test` runs it")


def guarded(start: Callable[..., Any], mark: str, what: str, when: Callable[..., bool]) -> Callable[..., Any]:
    """`start`, for marked tests alone where `when` says so of its arguments."""

    @wraps(start)
    def called(*arguments: Any, **named: Any) -> Any:
        if when(*arguments, **named):
            need(mark, what)
        return start(*arguments, **named)

    return called


def guard() -> None:
    from conceptguard.benchmarks import shapes
    from conceptguard.tools import host

    def real(name: str, dtype: Any = None, device: str = "cpu") -> bool:
        return device != "meta"

    host.server_command = guarded(host.server_command, "server", "a server", lambda *_: True)  # type: ignore[assignment]
    shapes.build = guarded(shapes.build, "slow", "a full-size network", real)  # type: ignore[assignment]
