"""Words on a node: what it found, for people to read."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from comfy_api.latest import io

JOINER = "\u2060"  # U+2060, nothing to see: it only keeps what stands around it together
# What frontends read as more than letters, cut after its first sign: a tag, their links [[label|url]] and the places
# that they keep for them, addresses that become links.
MARKUP = re.compile(rf"<(?!{JOINER})|\[(?=\[)|_(?=_LNK)|:(?=//)|\bwww(?=\.)", re.IGNORECASE)


def inert(text: str) -> str:
    """Text that every frontend shows letter by letter.

    One sets what a node says as HTML, another escapes it first: entities would be right in the one and seen in the
    other. A < that no letter follows begins no tag in either.
    """
    return MARKUP.sub(lambda found: found[0] + JOINER, text)


@cache
def offered(name: str) -> bool:
    """Whether a menu may have a file's name: older frontends set the entries of theirs as HTML."""
    if "<" in name:
        logging.warning("ConceptGuard: %r is left out of the menus, where a < may begin a tag; rename it", name)
    return "<" not in name


def show(node_id: str | None, text: str) -> None:
    """Put words on a node of the page that asked for the run, if one did. Nothing else sends words there."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None and server.client_id is not None:
        server.send_progress_text(inert(text), node_id, server.client_id)


def said(*lines: str) -> dict[str, list[str]]:
    """The same for the run's history, which pages read as well."""
    return {"text": [inert(line) for line in lines]}


def id_of(node: type[io.ComfyNode]) -> str | None:
    """The id of the node that runs now; its schema must ask for it (io.Hidden.unique_id)."""
    return getattr(node.hidden, "unique_id", None) if node.hidden else None


def telling(node: type[io.ComfyNode]) -> Callable[[str], None]:
    """What puts words on the node that runs now, later: its schema must ask for its id."""
    return partial(show, id_of(node))


def told(node: type[io.ComfyNode], text: str, *values: Any, **page: list[Any]) -> io.NodeOutput:
    """A node's outputs, with words on the node and in the run's history; `page` is for the page's scripts."""
    show(id_of(node), text)
    return io.NodeOutput(*values, ui={**said(text), **page})
