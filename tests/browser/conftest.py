"""The pack in a real browser: Debian's chromium, driven by Playwright, on the live server, with two frontends.

`make browser` brings them, and `make test-all` first of all; without them these tests are skipped, or fail where
CONCEPT_GUARD_BROWSER=required.
CONCEPT_GUARD_FRONTEND names the static folder of another frontend to try in the newer one's place;
CONCEPT_GUARD_SCREENSHOTS a folder for pictures of what was seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from page import PATIENCE, Browser
from rungs import need as marked

from conceptguard.demo import lora
from conceptguard.tools.browser import ARGUMENTS, newer_frontend
from conceptguard.tools.browser import chromium as chromium_here
from conceptguard.tools.host import Host


def need(what: object, name: str) -> None:
    if not what:
        leave = pytest.fail if os.environ.get("CONCEPT_GUARD_BROWSER") == "required" else pytest.skip
        leave(f"no {name} here: `make browser` brings it")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "playwright" in getattr(item, "fixturenames", ()):
        marked("browser", "a browser")


@pytest.fixture(scope="session")
def playwright() -> Any:
    try:
        from playwright import sync_api
    except ImportError:
        sync_api = None
    need(sync_api, "Playwright")
    need(chromium_here(), "chromium")
    return sync_api


# Playwright keeps an event loop running, which later tests could not bear: nothing of it outlives this folder.
@pytest.fixture(scope="package")
def chromium(playwright: Any) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium_here(), args=ARGUMENTS, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="package", params=["own", "newer"])
def server(request: pytest.FixtureRequest, playwright: Any) -> Iterator[Host]:
    """A server with the frontend that ComfyUI brings, which is the session's, or with a newer one."""
    if request.param == "own":
        running = request.getfixturevalue("host")
        lora.write(running.base / "models" / "loras")
        yield running
        return
    need(newer_frontend().is_dir(), "newer frontend")
    with Host(arguments=("--front-end-root", str(newer_frontend()))) as running:
        lora.write(running.base / "models" / "loras")
        yield running


@pytest.fixture(scope="package", params=["canvas", "nodes2"])
def browser(request: pytest.FixtureRequest, chromium: Any, server: Host) -> Iterator[Browser]:
    """A page in each of the frontend's two renderers."""
    context = chromium.new_context(viewport={"width": 1360, "height": 860})
    context.set_default_timeout(PATIENCE)
    opened = Browser(context.new_page(), server)
    opened.newer = bool(server.arguments)
    opened.open(**{"Comfy.VueNodes.Enabled": request.param == "nodes2"})
    yield opened
    context.close()
    assert opened.errors == [], "a script of the page failed"
