"""The name of the pack's own folder: under some, the host serves no script and no help, and the log says so."""

from __future__ import annotations

import logging
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

import conceptguard
from conceptguard.tools import host
from conceptguard.tools.host import Host

SERVED = ("ConceptGuard", "concept-guard-1.0", "ComfyUI_(mine)+you@home")
NOT_SERVED = ("Concept Guard", "Küchenmesser", "100%", "pack#1", "[pack]", "包")


@pytest.mark.parametrize("name", [*SERVED, *NOT_SERVED])
def test_a_line_in_the_log(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        conceptguard.check_name(name)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (name in NOT_SERVED) and all(repr(name) in line and "rename it" in line for line in lines)


@pytest.mark.slow
@pytest.mark.server
def test_the_host_serves_what_no_line_is_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One server with the pack under every name; the links are real ComfyUI folders to it."""
    names = (*SERVED, *NOT_SERVED)
    prepare = host.prepare_base

    def linked(base: Path) -> Path:
        prepared = prepare(base)
        for name in names:
            host.link(prepared / "custom_nodes" / name, host.ROOT)
        return prepared

    monkeypatch.setattr(host, "prepare_base", linked)
    with Host() as running:
        for name in names:
            url = f"{running.url}/extensions/{urllib.parse.quote(name)}/words.mjs"
            try:
                served = urllib.request.urlopen(url).status == 200
            except urllib.error.HTTPError:
                served = False
            assert served == (name in SERVED), name
            line = f"from a folder called {name!r}; rename it"
            assert (line in running.log()) == (name in NOT_SERVED)
