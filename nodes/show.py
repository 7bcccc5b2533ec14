"""Words on a node: what it found, for people to read."""

from __future__ import annotations

import sys
from typing import Any

from comfy_api.latest import io, ui


def show(node_id: str | None, text: str) -> None:
    """Put words on a node of the page, if there is a page."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def id_of(node: type[io.ComfyNode]) -> str | None:
    """The id of the node that runs now; its schema must ask for it (io.Hidden.unique_id)."""
    return getattr(node.hidden, "unique_id", None) if node.hidden else None


def told(node: type[io.ComfyNode], text: str, *values: Any, **page: list[Any]) -> io.NodeOutput:
    """A node's outputs, with words on the node and in the run's history; `page` is for the page's scripts."""
    show(id_of(node), text)
    return io.NodeOutput(*values, ui={**ui.PreviewText(text).as_dict(), **page})
