"""Learned files: those of the models folder concept_guard/, and the ones that came with the demo model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import folder_paths
import yaml
from comfy.cli_args import args

from ..editing.files import artefacts
from ..editing.files.artefacts import Artefact
from ..editing.files.kinds import KINDS
from ..editing.files.names import dated, file_in, inside, is_learned
from ..editing.files.whole import numbered, put_beside
from .show import offered

FOLDER = "concept_guard"
OFF = "off"
DEMO_WEIGHT = "demo model"
ASSETS = Path(__file__).resolve().parent.parent / "assets"
DEMO_WEIGHT_FILE = ASSETS / "eiup-weight.safetensors"
DRAWINGS_FILE = ASSETS / "drawings.safetensors"
DEMO_GATES = ASSETS / "gates"
DEMO = {  # what came with the demo model: kind -> choice -> file
    "eiup-weight": {DEMO_WEIGHT: DEMO_WEIGHT_FILE},
    "discriminator": {f"demo: {f.stem.replace('-', ' ')}": f for f in sorted(DEMO_GATES.glob("*.safetensors"))},
}


def default_elsewhere() -> bool:
    """Whether an extra_model_paths.yaml makes a folder of its own the default for our files; the host keeps no note."""
    files = [Path(folder_paths.__file__).parent / "extra_model_paths.yaml"]
    files += [Path(file) for file in chain(*(args.extra_model_paths_config or ()))]
    read = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    sections = [section for each in read for section in (each or {}).values()]
    return any(isinstance(s, dict) and s.get("is_default") and FOLDER in s for s in sections)


OWN = Path(folder_paths.models_dir) / FOLDER
# First, where we write, unless an extra_model_paths.yaml says that another is the default.
folder_paths.add_model_folder_path(FOLDER, str(OWN), is_default=not default_elsewhere())


def choices(kind: str) -> list[str]:
    """What an input for files of this kind offers: also those that cannot be told, so that an error can say why."""
    ours = []
    for name in folder_paths.get_filename_list(FOLDER):
        path = folder_paths.get_full_path(FOLDER, name)
        if is_learned(name) and offered(name) and path and told(Path(path)) in (kind, None):
            ours.append(name.replace(os.sep, "/"))
    return [choice for choice, path in DEMO.get(kind, {}).items() if path.is_file()] + ours


def within(place: str, fits: Callable[[Path], bool]) -> dict[str, Path]:
    """What lies right inside a folder of our models folder, by its name."""
    found = {}
    for base in folder_paths.get_folder_paths(FOLDER):
        folder = Path(base) / place
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if fits(path) and offered(path.name):
                found[path.name] = path
    return found


def told(path: Path) -> str | None:
    try:
        return _told(path, fingerprint(path))
    except OSError:
        return None


@lru_cache(4096)
def _told(path: Path, fingerprint: Any) -> str | None:
    return artefacts.kind_of(path)


def file_of(choice: str, kind: str, input: str = "file") -> Path:
    """The file that a choice names. Raises ValueError if there is none, or none here."""
    if choice in DEMO.get(kind, {}):
        return DEMO[kind][choice]
    if path := folder_paths.get_full_path(FOLDER, inside(choice)):
        return Path(path)
    raise ValueError(f'{input}: "{choice}" is not in the models folder {FOLDER}/; put it there, or choose another')


def held() -> list[Path]:
    """All learned files there are: the models folder's, at any depth, and the ones that came with the demo model."""
    paths = [folder_paths.get_full_path(FOLDER, name) for name in folder_paths.get_filename_list(FOLDER)]
    ours = [Path(path) for path in paths if path and is_learned(path)]
    return ours + [path for each in DEMO.values() for path in each.values() if path.is_file()]


def known_by(name: str, sha256: str, kind: str) -> Path:
    """The file of this name with these contents. Raises ValueError, which says what is wrong with what is there."""
    alike = [path for path in held() if path.name == name and path.stat().st_size <= KINDS[kind].limit]
    for path in alike:
        if contents(path, fingerprint(path)) == sha256:
            return path
    if alike:
        raise ValueError(
            f'"{name}" in the models folder {FOLDER}/ has other contents than the one that is asked for; fetch that '
            f"one (its sha256 begins with {sha256[:12]}) and put it beside, in a folder of its own"
        )
    raise ValueError(f'"{name}" is not in the models folder {FOLDER}/; fetch it from where the preset is from')


@lru_cache(256)
def contents(path: Path, fingerprint: Any) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def holding(artefact: Artefact) -> Path | None:
    """The file that holds it, if there is one."""
    data = artefacts.data_of(artefact)
    for path in held():
        try:
            if told(path) == artefact.kind and artefacts.data_of(artefacts.read(path, artefact.kind)) == data:
                return path
        except ValueError:  # a damaged one
            continue
    return None


def saved(artefact: Artefact, prefix: str) -> str:
    """Write it into a new file, the prefix and the next number; returns its name as `choices` gives it."""
    return saved_in(Path(folder_paths.get_folder_paths(FOLDER)[0]), artefacts.data_of(artefact), prefix)


def saved_in(folder: Path, data: bytes, prefix: str) -> str:
    """The same in any models folder."""
    path = put_beside(data, file_in(folder, dated(prefix)), numbered)
    return path.relative_to(folder).as_posix()


def changed(choice: str | None, kind: str) -> Any:
    """For `fingerprint_inputs`: another value when the file is another; `execute` will say what is wrong with it."""
    try:
        return None if choice in (OFF, None) else fingerprint(file_of(choice, kind))
    except (OSError, ValueError):
        return None


def fingerprint(path: Path) -> Any:
    """Changes when the file does."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
