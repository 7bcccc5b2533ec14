"""How the nodes that learn step by step are run: from where they were stopped, with what they show, kept if stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ..editing.edits.digest import digest
from ..editing.files import artefacts
from ..editing.files.artefacts import Artefact
from ..editing.training.learning import Training, carry_on, take_up
from ..editing.training.network import DTYPES, Network
from .files import FOLDER
from .progress import Progress

UNFINISHED = "unfinished"  # inside the models folder


def train_inputs(checkpointing: bool) -> list[io.Input]:
    """What every training asks for, last."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Of everything that is drawn at random; the same seed gives the same file. 0 is a seed "
            "like any other.",
        ),
        io.Combo.Input(
            "precision",
            options=list(DTYPES),
            default="fp32",
            tooltip="What the network computes in. bf16 halves its memory and is faster on recent cards; "
            "what is learned stays in fp32.",
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


def lines_for(name: str, text: str, count: int, what: str) -> list[str]:
    """The lines of the input `name`, one for each of `count` things; a single one, or none, serves for all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if len(lines) not in (1, count):
        raise ValueError(f"{name} has {len(lines)} lines for {count} {what}; write one line for each, or one for all")
    return lines if len(lines) == count else lines * count


def network_of(model: Any, precision: str, checkpointing: bool) -> Network:
    return Network(model, DTYPES[precision], checkpointing)


def conduct(
    kind: str,
    training: Training,
    steps: int,
    settings: Mapping[str, Any],
    node_id: str | None,
    model: Any,
    every: int,
    resume: bool,
) -> list[float]:
    """Train until `steps` are made; returns their losses. If it is stopped, a checkpoint of this kind is left.

    settings: all that decides what is learned, but for the number of steps; the checkpoint's name is made of them.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; give at least 1")
    path = Path(folder_paths.get_folder_paths(FOLDER)[0]) / UNFINISHED / f"{kind}-{key_of(settings)}.safetensors"
    losses = found(kind, training, path) if resume and path.is_file() else []
    if len(losses) > steps:
        raise ValueError(
            f'the checkpoint "{path.name}" has {len(losses)} steps already; give at least as many, delete '
            "it, or set resume to off"
        )
    progress = Progress(model, node_id, steps)

    def report(done: int) -> None:
        if every and done % every == 0 and done < steps:
            put_away(kind, training, losses, path)
        progress(done, losses[-1], latent_of(training))

    try:
        carry_on(training, steps, losses, report)
    except ValueError:  # it diverged: there is nothing to go on from
        raise
    except BaseException:
        if losses:
            put_away(kind, training, losses, path)
            logging.warning("ConceptGuard: stopped after %d steps; queue the same again to go on.", len(losses))
        raise
    path.unlink(missing_ok=True)
    return losses


def latent_of(training: Training) -> torch.Tensor | None:
    clean = training.preview()
    return None if clean is None else clean[None]


def found(kind: str, training: Training, path: Path) -> list[float]:
    """Go on from a checkpoint; returns the losses until then."""
    state = dict(artefacts.read(path, kind).tensors)
    losses = [float(x) for x in state.pop("losses")]
    take_up(training, state, path.name)
    return losses


def put_away(kind: str, training: Training, losses: list[float], path: Path) -> None:
    tensors = {**training.state(), "losses": torch.tensor(losses, dtype=torch.float32)}
    artefacts.write(Artefact(kind, "unfinished training", tensors), path)


def key_of(settings: Mapping[str, Any]) -> str:
    return digest([json.dumps(settings, sort_keys=True)])[:20]


@torch.no_grad()
def encode(clip: Any, text: str) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def weights_key(network: Network) -> str:
    """Tells one model's weights from another's, LoRAs included."""
    sums = [float(p.float().sum()) for name, p in network.unet.named_parameters() if ".attn2." in name]
    return digest(sums)[:20]
