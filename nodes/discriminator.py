"""The nodes that train, save and load discriminators."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..editing.edits.encode import lines_of
from ..editing.files.artefacts import Artefact
from ..editing.gates import prompts
from ..editing.gates.discriminator import Discriminator, Report, from_artefact, reliability, to_artefact, train
from ..editing.gates.drawings import Drawings
from ..editing.gates.features import Features, Vision, squared
from ..editing.gates.folder import folder_in, read_folder
from ..editing.pictures.chart import Series, plot
from .files import DRAWINGS_FILE, changed, saved
from .inputs import CATEGORY, named, prefix_input
from .learned import file_input, loaded
from .progress import ticking
from .show import told
from .types import DiscriminatorType

TRAIN, TRAIN_PROMPT = "ConceptGuardTrainDiscriminator", "ConceptGuardTrainPromptDiscriminator"
LOAD, SAVE = "ConceptGuardLoadDiscriminator", "ConceptGuardSaveDiscriminator"
THRESHOLD = io.Float.Output(
    display_name="threshold", tooltip="Chosen for the false positive rate; for a gate's `threshold` input."
)


def rate_input() -> io.Float.Input:
    return io.Float.Input(
        "false_positive_rate",
        default=0.01,
        min=0.0,
        max=0.5,
        step=0.005,
        tooltip="The threshold is the least at which no larger a share of the held-out others is flagged; "
        "0 allows none of them.",
    )


def seed_input() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**63 - 1,
        tooltip="Which examples are held out, and how copies are spoiled; 0 is a seed like any other.",
    )


def trained_outputs() -> list[io.Output]:
    return [
        DiscriminatorType.Output(display_name="discriminator", tooltip="For a gate, or Save Discriminator."),
        THRESHOLD,
        io.Float.Output(display_name="accuracy", tooltip="On the examples that were held out, at confidence 0.5."),
        io.Image.Output(display_name="calibration", tooltip="Of the held-out examples: confidence against truth."),
    ]


def calibration(report: Report, name: str, threshold: float) -> Tensor:
    ideal = Series("ideal", [(0.0, 0.0), (1.0, 1.0)])
    points = Series("measured", reliability(report.pairs))
    title = f'"{name}": {100 * report.accuracy:.1f} % right of {len(report.pairs)} held out'
    return plot([points, ideal], title, "confidence", "share of the concept", (0.0, 1.0), shade=(threshold, 1.0))


@cache
def drawings() -> Drawings:
    return Drawings(DRAWINGS_FILE)


def gathered(what: str, images: Tensor | None, folder: str, size: int, notes: list[str]) -> Tensor:
    """A class's pictures, connected and from a folder: [n, 3, size, size]."""
    parts = [] if images is None else [squared(images, size)]
    if folder.strip():
        base = Path(folder_paths.get_input_directory())
        found = read_folder(
            folder_in(base, folder), size, comfy.model_management.throw_exception_if_processing_interrupted
        )
        parts.append(found.pictures)
        if found.unreadable:
            names = ", ".join(found.unreadable[:5]) + (", .." if len(found.unreadable) > 5 else "")
            notes.append(f"{folder}: {len(found.unreadable)} pictures cannot be read and were left out: {names}")
    if not parts:
        raise ValueError(f"no pictures {what}; connect some, or name a folder inside ComfyUI's input folder")
    return torch.cat(parts)


class ConceptGuardTrainDiscriminator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        folder = "A folder of pictures inside ComfyUI's input folder, instead of or beside"
        return io.Schema(
            node_id=TRAIN,
            display_name="Train Discriminator",
            category=f"{CATEGORY}/gates",
            description="Learns to tell pictures of a concept from others, in seconds: a linear head on the features "
            "of a CLIP Vision model, or of a small network for drawings that comes with the pack. A fifth of the "
            "pictures calibrates it, another fifth measures it.",
            inputs=[
                io.String.Input("name", default="concept", tooltip="What the concept is called."),
                io.Image.Input("concept_images", optional=True, tooltip="Pictures of the concept; 50 or more do well."),
                io.Image.Input(
                    "other_images",
                    optional=True,
                    tooltip="Pictures without it, the more alike the better; some times as many.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Whose features to use. Not connected: a small network for drawings and icons.",
                ),
                io.String.Input("concept_folder", default="", optional=True, tooltip=f"{folder} concept_images."),
                io.String.Input("other_folder", default="", optional=True, tooltip=f"{folder} other_images."),
                rate_input(),
                io.Int.Input(
                    "copies",
                    default=4,
                    min=0,
                    max=32,
                    tooltip="Spoiled copies of each picture to learn from as well (blurred, cropped, overexposed, "
                    "off colour, seen from the side); 0 learns from the pictures alone.",
                ),
                seed_input(),
            ],
            outputs=trained_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        name: str,
        false_positive_rate: float = 0.01,
        copies: int = 4,
        seed: int = 0,
        concept_images: Tensor | None = None,
        other_images: Tensor | None = None,
        clip_vision: Any = None,
        concept_folder: str = "",
        other_folder: str = "",
    ) -> io.NodeOutput:
        notes: list[str] = []
        with named(TRAIN):
            features: Features = drawings() if clip_vision is None else Vision(clip_vision)
            concept = gathered("of the concept", concept_images, concept_folder, features.size, notes)
            others = gathered("of other things", other_images, other_folder, features.size, notes)
            tick = ticking(6 * (copies + 1) + 4)
            found, report = train(
                concept, others, features, name.strip() or "concept", false_positive_rate, copies, seed, tick
            )
        found = described(found, report, false_positive_rate, copies, seed)
        text = "\n".join([report.text(found.threshold), *notes])
        chart = calibration(report, found.name, found.threshold)
        return told(cls, text, found, found.threshold, report.accuracy, chart)


class ConceptGuardTrainPromptDiscriminator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=TRAIN_PROMPT,
            display_name="Train Prompt Discriminator",
            category=f"{CATEGORY}/gates",
            description="Learns to tell prompts that ask for a concept from others, for a Prompt Gate.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that encodes the prompts."),
                io.String.Input("name", default="concept", tooltip="What the concept is called."),
                io.String.Input("concept_prompts", multiline=True, tooltip="Prompts that ask for it, one a line."),
                io.String.Input("other_prompts", multiline=True, tooltip="Prompts that do not, one a line."),
                rate_input(),
                seed_input(),
            ],
            outputs=trained_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        name: str,
        concept_prompts: str,
        other_prompts: str,
        false_positive_rate: float = 0.01,
        seed: int = 0,
    ) -> io.NodeOutput:
        concept, others = lines_of(concept_prompts), lines_of(other_prompts)
        with named(TRAIN_PROMPT):
            found, report = prompts.train_prompts(
                concept,
                others,
                clip,
                name.strip() or "concept",
                false_positive_rate,
                seed,
                ticking(len(concept) + len(others)),
            )
        found = described(found, report, false_positive_rate, 0, seed)
        chart = calibration(report, found.name, found.threshold)
        return told(cls, report.text(found.threshold), found, found.threshold, report.accuracy, chart)


def described(found: Discriminator, report: Report, rate: float, copies: int, seed: int) -> Discriminator:
    """With what its file tells about its training."""
    about = {
        "accuracy": report.accuracy,
        "accuracy spoiled": report.perturbed,
        "held out": len(report.pairs),
        "false positive rate asked": rate,
        "false positive rate": report.false_positives,
        "found": report.found,
        "copies": copies,
        "seed": seed,
    }
    return Discriminator(found.name, found.features, found.head, found.threshold, about)


class ConceptGuardSaveDiscriminator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=SAVE,
            display_name="Save Discriminator",
            category=f"{CATEGORY}/gates",
            description="Writes a discriminator into the models folder concept_guard/, a few kilobytes to share. An "
            "encoder that it uses is not in the file.",
            inputs=[
                DiscriminatorType.Input("discriminator", tooltip="What a Train node made."),
                prefix_input("discriminators/concept"),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, discriminator: Any, filename_prefix: str) -> io.NodeOutput:
        with named(SAVE):
            if not isinstance(discriminator, Discriminator):
                raise ValueError(
                    f"discriminator is a {type(discriminator).__name__}, which has no file; connect what a Train "
                    "Discriminator node made"
                )
            name = saved(to_artefact(discriminator), filename_prefix)
        return told(cls, f"saved as {name}")


def encoder_of(artefact: Artefact, clip_vision: Any = None, clip: Any = None) -> Features | None:
    """What there is of the kind that a discriminator was trained with."""
    if artefact.mechanism == Drawings.kind:
        return drawings()
    if artefact.mechanism == Vision.kind and clip_vision is not None:
        return Vision(clip_vision)
    if artefact.mechanism == prompts.Text.kind and clip is not None:
        return prompts.Text(clip)
    return None


class ConceptGuardLoadDiscriminator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=LOAD,
            display_name="Load Discriminator",
            category=f"{CATEGORY}/gates",
            description="A discriminator from the models folder concept_guard/. Files are checked before use.",
            inputs=[
                file_input("discriminator"),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="The CLIP Vision model that it was trained with, if with one."
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The text encoder that it was trained with, if it looks at prompts."
                ),
            ],
            outputs=[
                DiscriminatorType.Output(display_name="discriminator", tooltip="For a gate."),
                THRESHOLD,
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_: Any) -> Any:
        return changed(file, "discriminator")

    @classmethod
    def execute(cls, file: str, clip_vision: Any = None, clip: Any = None) -> io.NodeOutput:
        with named(LOAD):
            artefact = loaded(file, "discriminator")
            found = from_artefact(artefact, encoder_of(artefact, clip_vision, clip))
        accuracy = artefact.training.get("accuracy")
        text = f'"{found.name}", {found.features.kind}, threshold {found.threshold:.3f}'
        if isinstance(accuracy, float):
            text += f", {100 * accuracy:.1f} % right on held-out examples"
        return told(cls, text, found, found.threshold)


NODES: list[type[io.ComfyNode]] = [
    ConceptGuardTrainDiscriminator,
    ConceptGuardTrainPromptDiscriminator,
    ConceptGuardSaveDiscriminator,
    ConceptGuardLoadDiscriminator,
]
