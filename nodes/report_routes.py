"""What the browser asks the server about reports: which there are in the output folder, and their pages.

The host would hand a page over as a file to keep, for pages may hold anything; here it is shown, with no right to run,
fetch or send a thing. The page says so itself, too: hosts without API nodes set a header of their own. Nothing here
writes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import folder_paths

from ..jobs.report.work import read_json
from .policy import running_server

FOLDER = "concept_guard_reports"  # of the output folder
PAGE, CARD = "report.html", "report.json"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,59}")  # of a report's folder
MOST = 20  # reports that the panel lists
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox",
    "X-Content-Type-Options": "nosniff",
}


def reports_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER


def page_of(name: str) -> Path | None:
    """The page of the report of this name, if there is one."""
    page = reports_folder() / name / PAGE
    return page if NAME.fullmatch(name) and page.is_file() else None


def reports() -> list[dict[str, Any]]:
    """The newest, with their verdicts; a damaged one is left out."""
    pages = [page for each in reports_folder().glob("*") if (page := page_of(each.name))]
    out = []
    for page in sorted(pages, key=lambda page: -page.stat().st_mtime)[:MOST]:
        try:
            card = read_json(page.with_name(CARD))
            about = {key: str(card[key]) for key in ("preset", "checkpoint")}
            out.append({"name": page.parent.name, **about, "verdict": [str(line) for line in card["verdict"]]})
        except (ValueError, KeyError, TypeError):
            continue
    return out


def add_routes() -> None:
    """Nothing outside a running server."""
    server = running_server()
    if server is None:
        return
    from aiohttp import web

    @server.routes.get("/concept_guard/reports")
    async def listed(_: web.Request) -> web.Response:
        return web.json_response(reports())

    @server.routes.get("/concept_guard/reports/{name}")
    async def page(request: web.Request) -> web.Response:
        if (found := page_of(request.match_info["name"])) is None:
            return web.Response(status=404, text="there is no report of that name")
        return web.Response(body=found.read_bytes(), content_type="text/html", charset="utf-8", headers=HEADERS)
