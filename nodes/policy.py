"""The operator's policy on this server: where its file is, who asks for a run, and what the page and monitors may ask.

Off unless a file is there when the server starts: the one that the environment variable names, or policy.toml (or
.json) of a folder of the host's user folder that none of its routes leads to. No request ever names a file.
"""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from comfy_execution.utils import get_executing_context

from ..editing.policy.enforce import Enforcement, Told
from ..editing.policy.file import Refused, chosen
from ..editing.policy.govern import Files
from ..editing.policy.record import Record
from .discriminator import encoder_of
from .policy_early import Problem, answer, problems
from .preset_routes import SHIPPED, read_file
from .show import show

VARIABLE = "CONCEPT_GUARD_POLICY"
FOLDER = "__concept_guard"  # the host takes names that begin so for its own, and gives them to no user
RECORD = "record"
USER = "concept_guard_user"  # in a prompt's extra_data, written by us whatever the client sent
SHOWN = ("time", "verdict", "why", "model", "family", "seconds")  # of an entry, to everybody: nothing of who or what
METRICS = "text/plain; version=0.0.4; charset=utf-8"

asking: ContextVar[str | None] = ContextVar("asking", default=None)  # the user of the request that is answered now
refusing: ContextVar[list[Problem] | None] = ContextVar("refusing", default=None)  # what is wrong with its prompt


def running_server() -> Any:
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def asked() -> Told:
    """Who asks for the run that goes on."""
    context = get_executing_context()
    if context is None:
        return Told()
    who = {"prompt_id": context.prompt_id, "node_id": context.node_id}
    if (user := user_of(context.prompt_id)) is not None:
        who["user"] = user
    return Told(who, lambda text: show(context.node_id, text))


def user_of(prompt_id: str) -> str | None:
    """The user of a prompt in the queue's hands, where the host has users."""
    server = running_server()
    for item in () if server is None else list(server.prompt_queue.currently_running.values()):
        if item[1] == prompt_id and isinstance(item[3], dict):
            user: str | None = item[3].get(USER)
            return user
    return None


def enforcement() -> Enforcement | None:
    folder = Path(folder_paths.get_user_directory()) / FOLDER
    file = chosen(os.environ.get(VARIABLE), folder, SHIPPED)
    if file is None:
        return None
    files = Files(read_file, lambda artefact, clip: encoder_of(artefact, None, clip))
    return Enforcement(file, Record(folder / RECORD), files, asked)


def status(policy: Enforcement | None) -> dict[str, Any]:
    """For the page: what governs this server, what was refused today, the last accounts."""
    if policy is None:
        return {"on": False}
    try:
        loaded = policy.file.now()
        about = {"on": loaded.policy.on, "governs": loaded.governs() if loaded.policy.on else ""}
    except Refused as error:
        about = {"on": True, "error": str(error)}
    refused = [public(entry) for entry in policy.record.refused_today()]
    return {**about, "refused": refused[-50:], "refused_count": len(refused), "last": last(policy)}


def last(policy: Enforcement) -> list[dict[str, Any]]:
    """The newest first."""
    return [public(entry) for entry in reversed(policy.record.last)]


def public(entry: dict[str, Any]) -> dict[str, Any]:
    said = [f'"{edit["source"]}" {edit["said"]}' for edit in entry.get("edits", ())]
    return {**{key: entry[key] for key in SHOWN if key in entry}, "did": said}


def metrics(policy: Enforcement | None) -> str:
    on = policy is not None and bool(policy.held)
    gauge = (
        "# HELP concept_guard_policy_on Whether a policy governs this server.\n# TYPE concept_guard_policy_on gauge\n"
    )
    return f"{gauge}concept_guard_policy_on {int(on)}\n" + ("" if policy is None else policy.record.metrics())


def add_routes(policy: Enforcement | None) -> None:
    """Nothing outside a running server; its own checks of origins lie before all of its routes."""
    server = running_server()
    if server is None:
        return
    from aiohttp import web

    @server.routes.get("/concept_guard/policy")
    async def governs(_: web.Request) -> web.Response:
        return web.json_response(status(policy))

    @server.routes.get("/concept_guard/policy/metrics")
    async def counters(_: web.Request) -> web.Response:
        return web.Response(body=metrics(policy).encode(), headers={"Content-Type": METRICS})

    if policy is None:
        return

    @web.middleware
    async def who(request: web.Request, handler: Any) -> Any:
        found: list[Problem] = []
        if request.method == "POST" and request.path.removeprefix("/api") == "/prompt":
            asking.set(user_behind(server, request))
            refusing.set(found)
        answered = await handler(request)
        return web.json_response(answer(found), status=400) if found else answered

    def prompted(data: dict[str, Any]) -> dict[str, Any]:
        """The host's own hook for prompts that come in: here the file is read again also while the policy is off."""
        policy.refresh()
        more = data.setdefault("extra_data", {})
        if isinstance(more, dict):
            more.pop(USER, None)
            if (user := asking.get()) is not None:
                more[USER] = user
        refuse_early(policy, data)
        return data

    server.app.middlewares.append(who)
    server.add_on_prompt_handler(prompted)


def refuse_early(policy: Enforcement, data: dict[str, Any]) -> None:
    """Takes a prompt away that the policy would refuse anyway: the host then queues nothing."""
    box = refusing.get()
    if box is None or not policy.held or not (found := problems(policy, data.get("prompt"))):
        return
    box += found
    del data["prompt"]
    who = {} if asking.get() is None else {"user": asking.get()}
    for id, kind, why in found:
        policy.note(None, "refused", {**who, "node_id": id, "node": kind, "why": why})


def user_behind(server: Any, request: Any) -> str | None:
    """None where the host has no users, or knows this one not."""
    if not args.multi_user:
        return None
    try:
        user: str = server.user_manager.get_request_user_id(request)
        return user
    except KeyError:
        return None


POLICY = enforcement()
if POLICY is not None:
    POLICY.refresh()
add_routes(POLICY)
