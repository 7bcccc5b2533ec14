"""Learned files: those of the models folder concept_guard/, and the ones that came with the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths

FOLDER = "concept_guard"
OFF = "off"
DEMO_WEIGHT = "demo model"
DEMO_WEIGHT_FILE = Path(__file__).resolve().parent.parent / "demo" / "weights" / "eiup-weight.safetensors"

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def weight_choices() -> list[str]:
    """What the `auto` input offers."""
    found = [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".safetensors")]
    return [OFF, *([DEMO_WEIGHT] if DEMO_WEIGHT_FILE.is_file() else []), *found]


def weight_file(choice: str) -> Path:
    if choice == DEMO_WEIGHT:
        return DEMO_WEIGHT_FILE
    path = folder_paths.get_full_path(FOLDER, choice)
    if path is None:
        raise ValueError(f'auto: "{choice}" is not in the models folder {FOLDER}/; put it there, or choose another')
    return Path(path)


def fingerprint(path: Path) -> Any:
    """Changes when the file does."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
