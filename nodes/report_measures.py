"""What a report card measures with networks of the person's own: FID, KID, LPIPS and the CLIP score.

They lie in the models folder concept_guard/measures/: files of weights, and a CLIP model in a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..editing.gates.folder import folder_in
from ..jobs.report.apart import Apart
from ..jobs.report.distances import Inception, Perceptual
from ..jobs.report.looks import Look, clip_score
from .files import FOLDER, OFF, within
from .inputs import choice_input, folded

PLACE = "measures"  # the folder inside concept_guard/
ENDINGS = (".safetensors", ".pth", ".pt")


def weights() -> dict[str, Path]:
    return within(PLACE, lambda path: path.suffix.lower() in ENDINGS and path.is_file())


def clips() -> dict[str, Path]:
    return within(PLACE, lambda path: (path / "config.json").is_file())


def measure_inputs() -> list[io.Input]:
    off = f"in the models folder {FOLDER}/{PLACE}/; off leaves it out."
    return [
        choice_input(
            "fid",
            (OFF, *weights()),
            OFF,
            "How far the edited pictures of what is to stay lie from the unedited: FID and KID, with the package "
            f"torch-fidelity and its weights of InceptionV3 {off}",
        ),
        choice_input(
            "lpips",
            (OFF, *weights()),
            OFF,
            "How unlike the pictures of each pair are: LPIPS, with the package lpips and torchvision's weights of "
            f"AlexNet {off}",
        ),
        choice_input(
            "clip_score",
            (OFF, *clips()),
            OFF,
            "How well the pictures of what is to stay fit their prompts: with a CLIP model in transformers' form, a "
            f"folder {off}",
        ),
        folded(
            io.String.Input(
                "real",
                default="",
                optional=True,
                tooltip="A folder of real pictures inside ComfyUI's input folder; FID and KID compare with it, too.",
            )
        ),
    ]


def chosen(input: str, choice: str, there: Callable[[], dict[str, Path]]) -> Path | None:
    """None: off. Raises ValueError for a file that has gone meanwhile."""
    if choice == OFF:
        return None
    if (path := there().get(choice)) is None:
        raise ValueError(f'{input}: "{choice}" is not in the models folder {FOLDER}/{PLACE}/')
    return path


def apart_of(fid: str, lpips: str, real: str) -> Apart:
    inception, perceptual = chosen("fid", fid, weights), chosen("lpips", lpips, weights)
    return Apart(
        None if inception is None else Inception.of(inception),
        folder_in(Path(folder_paths.get_input_directory()), real) if real.strip() else None,
        None if perceptual is None else Perceptual.of(perceptual),
    )


def look_of(choice: str) -> list[Look]:
    folder = chosen("clip_score", choice, clips)
    return [] if folder is None else [clip_score(folder)]
