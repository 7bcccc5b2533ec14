"""What the browser asks the server about presets: those that came with the pack, and what a document will do.

Own presets are stored through the host's per-user files (/userdata), which the panel uses itself. Nothing here writes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..editing.files import artefacts
from ..editing.presets.document import MAX_FILE, LearnedFile, Preset, learned_files, packed, read, write
from ..editing.presets.packed import is_packed
from ..editing.presets.words import brought, described, measured
from .files import known_by

SHIPPED = Path(__file__).resolve().parent.parent / "presets"


def read_file(file: LearnedFile, kind: str) -> artefacts.Artefact:
    """One that does not travel along, from the models folder."""
    return artefacts.read(known_by(file.file, file.sha256, kind), kind)


def missing(preset: Preset) -> list[str]:
    """What is wrong with the learned files that it needs from the models folder."""
    along, found = {file.sha256 for file in preset.files}, []
    for file, kind in dict(learned_files(preset)).items():
        try:
            if file.sha256 not in along:
                known_by(file.file, file.sha256, kind)
        except ValueError as error:
            found.append(str(error))
    return found


def report(document: str | bytes) -> dict[str, Any]:
    """What a document is and will do, or what is wrong with it. text: of a .safetensors form, as nodes take it."""
    try:
        preset = read(document)
    except ValueError as error:
        return {"ok": False, "error": str(error)}
    about = {name: getattr(preset, name) for name in ("name", "description", "author", "licence")}
    reasons = [edit.why for edit in preset.edits]
    if isinstance(document, bytes) and is_packed(document):
        about["text"] = write(preset)
    return {
        "ok": True,
        **about,
        "base_models": preset.base_models,
        "does": described(preset),
        "why": reasons,
        "files": brought(preset),
        "measured": measured(preset),
        "missing": missing(preset),
    }


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

    async def sent(request: web.Request) -> bytes:
        """At most a byte more than a preset may have."""
        data = bytearray()
        async for chunk in request.content.iter_chunked(65536):
            data += chunk
            if len(data) > MAX_FILE:
                break
        return bytes(data)

    @server.routes.get("/concept_guard/presets")
    async def presets(_: web.Request) -> web.Response:
        return web.json_response(shipped())

    @server.routes.post("/concept_guard/presets/check")
    async def check(request: web.Request) -> web.Response:
        return web.json_response(report(await sent(request)))

    @server.routes.post("/concept_guard/presets/pack")
    async def pack(request: web.Request) -> web.Response:
        """The .safetensors form of a document."""
        try:
            data = packed(read(await sent(request)))
        except ValueError as error:
            return web.json_response({"ok": False, "error": str(error)}, status=400)
        return web.Response(body=data, content_type="application/octet-stream")
