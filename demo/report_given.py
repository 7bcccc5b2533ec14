"""What the arguments of `make report` name: models and their parts, presets, peers, and what looks at pictures."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..editing.edits.digest import digest
from ..editing.edits.spec import Concept
from ..editing.engine.host import add_edit, of_model
from ..editing.files import artefacts
from ..editing.files.artefacts import Artefact
from ..editing.gates.classifiers import transformers_classifier
from ..editing.gates.discriminator import Judge, from_artefact
from ..editing.gates.drawings import Drawings
from ..editing.gates.features import Features, Vision, weights_digest
from ..editing.gates.packages import LABELS, NudeNet, OpenNSFW
from ..editing.gates.prompts import Text
from ..editing.presets.apply import Given, specs_of
from ..editing.presets.document import Preset
from ..editing.presets.document import read as read_preset
from ..jobs.report.looks import Look, by_classes, by_judge, clip_score
from ..jobs.report.peers import METHODS, Model, Peer, by_method, by_weights
from ..jobs.report.prompts import Case
from ..tools.environment import ROOT
from .judge import HEADS
from .load import MODEL_FILE, load, load_judge, transformer_file

PRESETS, DRAWINGS = ROOT / "presets", ROOT / "assets" / "drawings.safetensors"
Parts = tuple[Any, Any, Any]  # MODEL, CLIP and VAE


# --- models ----------------------------------------------------------------------------------------------------------


def there(file: Path, what: str) -> Path:
    if not file.is_file():
        raise ValueError(f'there is no {what} "{file}"')
    return file


def loaded(given: argparse.Namespace) -> Parts:
    """Of the demo model, or of a checkpoint, whose text encoder and VAE may lie in files of their own."""
    if not given.checkpoint:
        return load(architecture=given.architecture)
    import comfy.sd
    import comfy.utils

    name = there(Path(given.checkpoint), "checkpoint").name
    clip, vae = (separate_clip(given) if given.clip else None), None
    if given.vae:
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(there(given.vae, "VAE")), safe_load=True))
    try:
        own = comfy.sd.load_checkpoint_guess_config(given.checkpoint, output_vae=not vae, output_clip=not clip)
    except RuntimeError:  # by which the host says that it does not know it
        own = None
    model, own_clip, own_vae = (own or (None, None, None))[:3]
    clip, vae = clip or own_clip, vae or own_vae
    for what, it, mend in (
        ("diffusion model that is known here", model, "another file"),
        ("text encoder", clip, "it with --clip"),
        ("VAE", vae and vae.first_stage_model, "it with --vae"),
    ):
        if it is None:
            raise ValueError(f'"{name}" holds no {what}; give {mend}')
    return model, clip, vae


def separate_clip(given: argparse.Namespace) -> Any:
    import comfy.sd

    kind = getattr(comfy.sd.CLIPType, given.clip_type.upper(), None)
    if kind is None:
        known = ", ".join(each.name.lower() for each in comfy.sd.CLIPType)
        raise ValueError(f'the kind of text encoder is "{given.clip_type}"; it is one of {known}')
    return comfy.sd.load_clip([str(there(file, "text encoder")) for file in given.clip], clip_type=kind)


def files_of(given: argparse.Namespace) -> dict[str, str]:
    """The sha256 of the checkpoint, and of what lies in files of its own."""
    if given.checkpoint:
        checkpoint = Path(given.checkpoint)
    else:
        checkpoint = MODEL_FILE if given.architecture == "unet" else transformer_file(given.architecture)
    out = {"checkpoint_sha256": sha256_of(checkpoint)}
    for file in (*given.clip, *([given.vae] if given.vae else [])):
        out[f"{file.name}_sha256"] = sha256_of(file)
    return out


def sha256_of(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


# --- edits -----------------------------------------------------------------------------------------------------------


def preset_file(name: str) -> Path | None:
    return next((each for each in (Path(name), PRESETS / f"{name}.json") if each.is_file()), None)


def preset_of(name: str) -> Preset:
    if (file := preset_file(name)) is None:
        shipped = ", ".join(sorted(each.stem for each in PRESETS.glob("*.json")))
        raise ValueError(f'there is no preset "{name}"; give a file, or one of {shipped}')
    return read_preset(file.read_bytes())


def key_of(preset: Preset) -> str:
    return digest([preset.unmeasured.model_dump_json()])


def edited(parts: Parts, preset: Preset, encoder: Callable[[Artefact], Features | None]) -> Model:
    """The MODEL with the preset's edits; its prompt gates decide about the case's prompt."""
    model, clip, vae = parts
    if not preset.made_for(family := of_model(model, "report").family):
        raise ValueError(f'preset "{preset.name}" is for {", ".join(preset.base_models)}, and this is one of {family}')

    def of(case: Case) -> Any:
        out = model
        for spec in specs_of(preset, Given(clip, encoder=encoder, vae=vae, text=case.prompt), node="report"):
            out = add_edit(out, spec)
        return out

    if any(edit.gate is not None for edit in preset.edits):
        return of
    always = of(Case("", 0))
    return lambda _: always


def concepts_of(parts: Parts, preset: Preset) -> list[Concept]:
    """What a preset erases, each thing once, for the peers to erase as well."""
    ungated = preset.model_copy(
        update={"edits": tuple(edit.model_copy(update={"gate": None}) for edit in preset.edits)}
    )
    specs = specs_of(ungated, Given(parts[1]), node="report")
    return list({spec.source.key: spec.source for spec in specs if isinstance(spec.source, Concept)}.values())


def peer_of(name: str, parts: Parts, preset: Preset, encoder: Callable[[Artefact], Features | None]) -> Peer:
    """A preset, a LoRA of a trained erasure, or a method on what the preset erases."""
    if (file := preset_file(name)) is not None:
        try:
            other = preset_of(name)
        except ValueError:
            if file.suffix == ".json":
                raise
            return by_weights(file, sha256_of(file), parts[0])
        return Peer(other.name, key_of(other), edited(parts, other, encoder))
    known = {each.lower() for each in METHODS}
    return by_method(name, parts[0], parts[1], concepts_of(parts, preset) if name.lower() in known else ())


# --- judges ----------------------------------------------------------------------------------------------------------


def encoders(clip_vision: Path | None, clip: Any) -> Callable[[Artefact], Features | None]:
    """What a discriminator's file was trained with: the pack's own network, the CLIP Vision model that was given, or
    for prompts the text encoder."""

    @cache
    def vision() -> Features:
        import comfy.clip_vision

        assert clip_vision is not None
        found = comfy.clip_vision.load(str(there(clip_vision, "CLIP Vision model")))
        if found is None:
            raise ValueError(f'"{clip_vision.name}" is no CLIP Vision model; give the one of the discriminator')
        return Vision(found)

    def of(artefact: Artefact) -> Features | None:
        if artefact.mechanism == Drawings.kind:
            return Drawings(DRAWINGS)
        if artefact.mechanism == Text.kind:
            return Text(clip)
        return vision() if artefact.mechanism == Vision.kind and clip_vision else None

    return of


def demo_look(gone: frozenset[str]) -> Look:
    """The demo world's own judge."""
    judge = load_judge()

    def probabilities(images: Tensor) -> Tensor:
        with torch.no_grad():
            return judge(images[..., :3].movedim(-1, 1).float())["objects"].softmax(1)

    return by_classes("demo judge", weights_digest(judge.state_dict()), HEADS["objects"], probabilities, gone)


def own_judge(file: Path, encoder: Callable[[Artefact], Features | None]) -> tuple[Judge, float]:
    """A discriminator that the pack trained, with the threshold in its file."""
    artefact = artefacts.read(there(file, "discriminator"), "discriminator")
    found = from_artefact(artefact, encoder(artefact))
    return found, found.threshold


def looks_of(
    given: argparse.Namespace, gone: frozenset[str], encoder: Callable[[Artefact], Features | None]
) -> list[Look]:
    out = [] if given.checkpoint else [demo_look(gone)]
    for folder in given.classifier:
        it = transformers_classifier(folder, "0")
        out.append(by_classes(folder.name, it.key, it.labels, it.probabilities, gone))
    out += [by_judge(*own_judge(file, encoder)) for file in given.discriminator]
    if given.nudenet:
        out.append(by_judge(NudeNet("\n".join(LABELS)), given.threshold))
    if given.opennsfw:
        out.append(by_judge(OpenNSFW(), given.threshold))
    return [*out, *([clip_score(given.clip_score)] if given.clip_score else [])]
