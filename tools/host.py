"""A ComfyUI server with this checkout as its custom node, for `make serve`, `make demo` and the tests.

with Host() as host:
    entry = host.run(prompt)        # API-format prompt; raises HostError with the node's own words
    pngs = host.images(entry)
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from .environment import ROOT, SetupError, comfyui_path
from .run import has_accelerator

PACK = "ConceptGuard"
SERVE_BASE = ROOT / "output" / "host"  # models, input and output of `make serve` and of the command line
ADDRESS = "127.0.0.1"


class HostError(RuntimeError):
    """The server did not start, died, refused a prompt, or a node of the prompt failed."""


def link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`, also when it pointed elsewhere before."""
    if path.is_symlink() and path.readlink() == target:
        return
    path.unlink(missing_ok=True)
    path.symlink_to(target, target_is_directory=True)


def prepare_base(base: Path) -> Path:
    """Make `base` a ComfyUI base directory (models, input, output ...) whose one custom node is this checkout."""
    for name in ("custom_nodes", "input", "models", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link(base / "custom_nodes" / PACK, ROOT)
    return base


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    if not 0 < port < 65536:
        raise SetupError(f"{port} is not a port", "name one from 1 to 65535: make serve PORT=8188")
    with socket.socket() as probe:
        if os.name != "nt":  # there the option would let two servers share the port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except PermissionError:
            raise SetupError(f"port {port} needs an administrator's rights", "choose one above 1023") from None
        except OSError:
            raise SetupError(
                f"port {port} is taken by another program",
                f"stop that program, or choose another port: make serve PORT={free_port()}",
            ) from None


def server_command(base: Path, port: int) -> list[str]:
    """The command that runs ComfyUI on `base`; nothing of it is written into ComfyUI's own folder."""
    command = [sys.executable, str(comfyui_path() / "main.py"), "--base-directory", str(base), "--port", str(port)]
    command += ["--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"]
    command += ["--disable-auto-launch", "--disable-api-nodes", "--use-pytorch-cross-attention"]
    return command if has_accelerator() else [*command, "--cpu"]


class Host:
    """A running server; a context manager. Without `base` it lives in a temporary folder that goes when it stops."""

    def __init__(self, base: Path | None = None, port: int | None = None, arguments: tuple[str, ...] = ()) -> None:
        self.temporary = base is None
        self.base = prepare_base(base or Path(tempfile.mkdtemp(prefix="concept-guard-host-")))
        self.port = port or free_port()
        self.arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None
        # A proxy configured for the machine has no business between us and our own server.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> Host:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = 180) -> None:
        """Start the server and wait until it answers."""
        with open(self.log_path, "wb") as log:
            command = [*server_command(self.base, self.port), *self.arguments]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._check_alive()
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise HostError(f"ComfyUI did not answer within {timeout:.0f} s:\n{self.log_tail()}")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.temporary:
            shutil.rmtree(self.base, ignore_errors=True)

    # --- prompts -----------------------------------------------------------------------------------------------------

    def run(self, prompt: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
        """Run an API-format prompt to its end and return its history entry (`outputs`, `status`)."""
        try:
            prompt_id = self.post("/prompt", {"prompt": prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise HostError(refusal(error.read(), prompt)) from None
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._check_alive()
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return succeeded(entry)
            time.sleep(0.05)
        raise HostError(f"the prompt did not end within {timeout:.0f} s:\n{self.log_tail()}")

    def images(self, entry: dict[str, Any]) -> dict[str, list[bytes]]:
        """The image files a prompt saved or previewed, by the id of the node that did."""
        return {
            node: [self._fetch("/view?" + urllib.parse.urlencode(image)) for image in output["images"]]
            for node, output in entry["outputs"].items()
            if output.get("images")
        }

    def get(self, path: str) -> Any:
        return json.loads(self._fetch(path))

    def post(self, path: str, body: object) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with self._opener.open(request, timeout=60) as response:
            return json.loads(response.read())

    # --- the server itself -------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.base / "server.log"

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def _fetch(self, path: str) -> bytes:
        with self._opener.open(self.url + path, timeout=60) as response:
            data: bytes = response.read()
            return data

    def _check_alive(self) -> None:
        if self.process is None or self.process.poll() is not None:
            code = None if self.process is None else self.process.returncode
            raise HostError(f"ComfyUI is not running (exit status {code}). Its last words:\n{self.log_tail()}")


def refusal(body: bytes, prompt: dict[str, Any]) -> str:
    """What the server said when it did not accept a prompt, one line a problem."""
    answer = json.loads(body)
    lines = [f"the prompt was refused: {answer['error']['message']}"]
    for node, report in (answer.get("node_errors") or {}).items():
        kind = prompt.get(node, {}).get("class_type", "?")
        lines += [f"{kind} (node {node}): {e['message']}: {e['details']}" for e in report["errors"]]
    return "\n".join(lines)


def succeeded(entry: dict[str, Any]) -> dict[str, Any]:
    """The history entry, or the error of the node that stopped the prompt."""
    if entry["status"]["status_str"] == "success":
        return entry
    for kind, message in entry["status"]["messages"]:
        if kind == "execution_error":
            raise HostError(f"{message['node_type']} (node {message['node_id']}): {message['exception_message']}")
    raise HostError(f"the prompt was interrupted: {entry['status']}")
