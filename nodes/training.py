"""What the nodes that learn have in common: their last inputs, and how their trainings are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..editing.training.harness import DTYPES
from ..jobs.train import Course
from .files import FOLDER
from .inputs import seed_input
from .progress import Shown

UNFINISHED = "unfinished"  # inside the models folder
RUN = ("steps", "precision", "checkpointing", "checkpoint_every", "resume")  # inputs that `course` takes


def train_inputs(checkpointing: bool) -> list[io.Input]:
    """What every training asks for, last."""
    return [
        seed_input(
            "Of everything that is drawn at random; the same seed gives the same file. 0 is a seed like any other."
        ),
        io.Combo.Input(
            "precision",
            options=list(DTYPES),
            default="fp32",
            tooltip="What the network computes in: bf16 needs half the memory and is faster on recent cards; auto is "
            "the model's own precision, but bf16 for a model in fp16. What is learned stays in fp32.",
        ),
        io.Boolean.Input(
            "checkpointing",
            default=checkpointing,
            tooltip="Compute the network's blocks twice rather than keep what they need for learning: far "
            "less memory, about a third more time.",
        ),
        io.Int.Input(
            "checkpoint_every",
            default=100,
            min=0,
            max=100_000,
            tooltip="Put away the state of the training every so many steps, to go on from after a crash. 0: "
            "only when it is stopped or fails.",
        ),
        io.Boolean.Input(
            "resume",
            default=True,
            tooltip="If a training with exactly these settings was stopped, go on from there; the result "
            "is that of one which was never stopped. Off: start anew.",
        ),
    ]


def course(
    node: str,
    node_id: str | None,
    model: Any,
    steps: int = 1000,
    precision: str = "fp32",
    checkpointing: bool = True,
    checkpoint_every: int = 100,
    resume: bool = True,
) -> Course:
    """A training as these inputs want it, with a checkpoint in the models folder and its progress on the node."""
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0]) / UNFINISHED
    progress = Shown(model, node_id)
    return Course(steps, precision, checkpointing, checkpoint_every, resume, folder, progress, node)
