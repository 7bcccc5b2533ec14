"""The account of a run in the metadata of its pictures, beside the host's own: its save nodes write what the prompt's
extra_pnginfo holds when they run, and nothing where the host runs with --disable-metadata."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any
from uuid import uuid4

from ..editing.engine.account import LISTENERS, Account

KEY = "concept_guard"  # in the metadata: the accounts of all runs of the prompt
KEPT = 64  # prompts that wait or run

_metadata: OrderedDict[str, dict[str, Any]] = OrderedDict()  # of each prompt, the dict that its save nodes will read


def remember(prompt: dict[str, Any]) -> dict[str, Any]:
    """A handler of the host's: a prompt has arrived. Gives it an id and metadata if it came without."""
    if "prompt" in prompt:
        extra = prompt.setdefault("extra_data", {})
        if extra.get("extra_pnginfo") is None:
            extra["extra_pnginfo"] = {}
        _metadata[prompt.setdefault("prompt_id", str(uuid4()))] = extra["extra_pnginfo"]
        while len(_metadata) > KEPT:
            _metadata.popitem(last=False)
    return prompt


def write(account: Account) -> None:
    """A run has ended: its account goes into the metadata of the prompt that is being executed."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    metadata = None if context is None else _metadata.get(context.prompt_id)
    if isinstance(metadata, dict):
        metadata.setdefault(KEY, []).append(account.document())


def listen() -> None:
    """Nothing outside a running server."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None:
        server.add_on_prompt_handler(remember)
        LISTENERS.append(write)
