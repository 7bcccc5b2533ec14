"""How every training is run, whatever it learns: from where it was stopped, told about, and kept when it is stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..editing.edits.digest import digest
from ..editing.edits.encode import lines_of
from ..editing.engine.host import edits_of
from ..editing.files import artefacts
from ..editing.files.artefacts import Artefact
from ..editing.files.whole import NotWritten
from ..editing.training.harness import Predictor, train_with, weights_key
from ..editing.training.loop import Diverged, Training, carry_on, take_up
from .progress import Progress, silent

KIND = "checkpoint"
SHOWN = 5  # steps between two pictures
CELL = 8  # pixels a side of a latent's numbers, in all models that can be trained (training/harness.py)
T = TypeVar("T", bound=Training)


@dataclass(frozen=True)
class Course:
    """How a training is run; of all this, `precision` alone has a part in what is learned.

    every: steps between two checkpoints, 0 for none but the one that a stop leaves; folder: where they lie, None for no
    checkpoint at all; resume: whether to go on from one; node: whom an error about the model names.
    """

    steps: int
    precision: str = "auto"
    checkpointing: bool = False
    every: int = 100
    resume: bool = True
    folder: Path | None = None
    progress: Progress = silent
    node: str = "training"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give at least 1")


def conduct(
    what: str,
    course: Course,
    settings: Mapping[str, Any],
    model: Any,
    positive: Sequence[Any],
    latent: Tensor,
    make: Callable[[Predictor], T],
    losses: Sequence[float] = (),
) -> tuple[T, list[float]]:
    """The training, after `course.steps` steps, and their losses. If it is stopped, a checkpoint is left.

    settings: all that decides what is learned, but for the model and the number of steps; the checkpoint's name is made
    of them. positive, latent: the prompts and the pictures, [B, 4, h, w], that the model is to predict for
    (harness.train_with). make: the training before its first step, or where it was after these `losses`.
    """
    known = {**settings, "model": weights_key(model, course.precision)}
    if edits := [edit.key for edit in edits_of(model)]:
        known["edits"] = edits
    file = None if course.folder is None else course.folder / f"{what}-{key_of(known)}.safetensors"
    done: list[float] = list(losses)
    made: list[T] = []

    def body(predict: Predictor) -> None:
        made.append(training := make(predict))
        if file is not None and course.resume:
            go_on(what, training, done, file, course.steps)
        run(what, training, done, course, file)

    train_with(model, list(positive), latent, body, course.precision, course.checkpointing)
    if file is not None:
        file.unlink(missing_ok=True)
    return made[0], done


def run(what: str, training: Training, losses: list[float], course: Course, file: Path | None) -> None:
    """Until all steps are made; when it is stopped, so that it can be gone on with."""

    def report(done: int) -> None:
        if file is not None and course.every and done % course.every == 0 and done < course.steps:
            put_away(what, training, losses, file)
        seen = training.preview() if done % SHOWN == 0 else None
        course.progress(done, course.steps, f"step {done} of {course.steps}, loss {losses[-1]:.4g}", seen)

    try:
        carry_on(training, course.steps, losses, report)
    except Diverged:  # there is nothing to go on from
        raise
    except BaseException:
        if file is not None and losses and put_away(what, training, losses, file):
            logging.warning(
                "ConceptGuard: stopped after %d steps. Queue the same again to go on; with steps set to %d, to keep "
                "what there is.",
                len(losses),
                len(losses),
            )
        raise


def go_on(what: str, training: Training, losses: list[float], file: Path, steps: int) -> None:
    """From a checkpoint, if there is one that is further than `losses`."""
    found = next((each for each in (file, older(what, file)) if each.is_file()), None)
    if found is None:
        return
    state = state_in(found, what)
    until = [float(x) for x in state.pop("losses")]
    if len(until) <= len(losses):
        return
    if len(until) > steps:
        raise ValueError(
            f'the checkpoint "{found.name}" has {len(until)} steps already; give at least as many, delete '
            "it, or set resume to off"
        )
    take_up(training, state, found.name)
    losses[:] = until
    if found != file:
        found.unlink()


def put_away(what: str, training: Training, losses: Sequence[float], file: Path) -> bool:
    """Whether there is a checkpoint now: a full disk is no reason to lose what a training has learned."""
    tensors = {**training.state(), "losses": torch.tensor(losses, dtype=torch.float32)}
    try:
        artefacts.write(Artefact(KIND, "unfinished training", tensors, mechanism=what), file)
    except NotWritten as error:
        logging.warning("ConceptGuard: there is no checkpoint of step %d: %s", len(losses), error)
        return False
    return True


def older(what: str, file: Path) -> Path:
    """Where versions before 0.2 kept the checkpoint."""
    return file.with_name(file.name.replace(f"{what}-", f"{what}-checkpoint-", 1))


def state_in(file: Path, what: str) -> dict[str, Tensor]:
    """A checkpoint's state, `losses` beside it; also of the kinds that there were before 0.2."""
    if artefacts.kind_of(file) == KIND:
        return dict(artefacts.read(file, KIND).tensors)
    held = dict(artefacts.read(file, f"{what}-checkpoint").tensors)
    learned = "weights" if what == "kpop" else "learned"
    prompt = [held.pop(name) for name in ("prompt.k", "prompt.v") if name in held]
    if prompt:
        held["prompt"] = torch.cat(prompt)
    return {name.replace("prompt.adam", "prompt").replace("adam", learned): tensor for name, tensor in held.items()}


def key_of(settings: Mapping[str, Any]) -> str:
    return digest([json.dumps(settings, sort_keys=True)])[:20]


@torch.no_grad()
def encode(clip: Any, text: str) -> list[Any]:
    """A prompt as one entry of a CONDITIONING."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]


def latents_for(model: Any, pictures: int, width: int, height: int) -> Tensor:
    """Empty ones for so many pictures of width x height pixels, [B, C, height / 8, width / 8]."""
    return torch.zeros(pictures, model.model.latent_format.latent_channels, height // CELL, width // CELL)


def lines_for(name: str, text: str, count: int, what: str) -> list[str]:
    """The lines of the input `name`, one for each of `count` things; a single one, or none, serves for all."""
    lines = lines_of(text) or [""]
    if len(lines) not in (1, count):
        raise ValueError(f"{name} has {len(lines)} lines for {count} {what}; write one line for each, or one for all")
    return lines if len(lines) == count else lines * count
