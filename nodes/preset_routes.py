"""What the browser asks the server about presets: those that came with the pack, and what a document will do.

Own presets are stored through the host's per-user files (/userdata), which the panel uses itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..editing.preset import MAX_BYTES, described, read

SHIPPED = Path(__file__).resolve().parent.parent / "presets"


def report(document: str | bytes) -> dict[str, Any]:
    """What a document is and will do, or what is wrong with it."""
    try:
        preset = read(document)
    except ValueError as error:
        return {"ok": False, "error": str(error)}
    about = {name: getattr(preset, name) for name in ("name", "description", "author", "licence")}
    reasons = [edit.why for edit in preset.edits]
    return {"ok": True, **about, "base_models": preset.base_models, "does": described(preset), "why": reasons}


def shipped() -> list[dict[str, Any]]:
    """The presets that came with the pack, each with its text."""
    out = []
    for path in sorted(SHIPPED.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        out.append({"id": path.stem, "text": text, **report(text)})
    return out


def add_routes() -> None:
    """Nothing outside a running server."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web

    @server.routes.get("/concept_guard/presets")
    async def presets(_: web.Request) -> web.Response:
        return web.json_response(shipped())

    @server.routes.post("/concept_guard/presets/check")
    async def check(request: web.Request) -> web.Response:
        data = bytearray()
        async for chunk in request.content.iter_chunked(65536):
            data += chunk
            if len(data) > MAX_BYTES:
                break
        return web.json_response(report(bytes(data)))
