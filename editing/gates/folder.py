"""Pictures from a folder, for training: what cannot be read is named and left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .features import squared

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST = 20_000


@dataclass(frozen=True)
class Found:
    """pictures: [n, 3, size, size]; unreadable: the names of files that are none."""

    pictures: Tensor
    unreadable: tuple[str, ...] = ()


def folder_in(base: Path, name: str) -> Path:
    """A folder inside `base`; raises ValueError for anything else."""
    folder = (base / name.strip()).resolve()
    if not folder.is_relative_to(base.resolve()):
        raise ValueError(f"{name!r} leads out of the input folder; name a folder inside it")
    if not folder.is_dir():
        raise ValueError(f"{name!r} is no folder inside the input folder {base}; put the pictures there")
    return folder


def read_folder(folder: Path, size: int, progress: Callable[[], None] = lambda: None) -> Found:
    """The pictures right inside a folder, in the order of their names. `progress` is called for each; it may raise."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
    if len(files) > MOST:
        raise ValueError(f"{folder.name} has {len(files)} pictures, more than the {MOST} that are read; move some away")
    pictures, unreadable = [], []
    for path in files:
        progress()
        try:
            with Image.open(path) as image:
                rgb = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            unreadable.append(path.name)
            continue
        pictures.append(squared(torch.from_numpy(rgb.copy()).float()[None] / 255, size))
    return Found(torch.cat(pictures) if pictures else torch.zeros(0, 3, size, size), tuple(unreadable))
