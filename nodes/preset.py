"""Safety presets: a whole document put on a MODEL at once, and written from the edits that a MODEL carries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..editing.edits.spec import Gate
from ..editing.engine.host import add_edit, edits_of, of_model
from ..editing.files.artefacts import Artefact
from ..editing.files.whole import put_beside
from ..editing.presets.apply import Given, specs_of
from ..editing.presets.document import LearnedFile, Preset, packed, read, write
from ..editing.presets.save import Saver, slug
from ..editing.presets.words import described
from .discriminator import encoder_of
from .files import contents, fingerprint, holding
from .gates import reporting
from .inputs import CATEGORY, check, folded, gate_of, named, strength_input
from .kpop import compare
from .preset_routes import add_routes, missing, read_file
from .show import id_of, said, telling
from .types import GateType, PresetGateType

APPLY, SAVE, LOOK = "ConceptGuardApplyPreset", "ConceptGuardSavePreset", "ConceptGuardPresetGate"
FOLDER = "concept_guard_presets"  # in the host's output folder


@dataclass(frozen=True)
class PresetGate:
    """A gate for a preset as a whole, and what the preset's own gates look with and at."""

    whole: Gate = Gate()
    vae: Any = None
    clip_vision: Any = None
    image: Tensor | None = None
    text: str | None = None


class ConceptGuardPresetGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=LOOK,
            display_name="Preset Gate",
            category=f"{CATEGORY}/presets",
            description="What the gates that a safety preset brings look with and at; connect it to the gate of Apply "
            "Safety Preset. Only what the preset asks for is needed: the preset's own words say what that is.",
            inputs=[
                io.Vae.Input("vae", optional=True, tooltip="For in-flight gates that decode with a VAE: the model's."),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="For discriminators that were trained with one."
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="For image gates: the reference. One picture decides for the whole batch; several decide "
                    "for the image of the same number each.",
                ),
                io.String.Input(
                    "text",
                    optional=True,
                    force_input=True,
                    tooltip="For prompt gates: the prompt, as the text encoder gets it; empty is never flagged.",
                ),
                GateType.Input(
                    "gate",
                    optional=True,
                    tooltip="A gate for the preset as a whole; 0 is a closed gate and leaves the image untouched. Not "
                    "connected: open.",
                ),
            ],
            outputs=[
                PresetGateType.Output(display_name="gate", tooltip="For the `gate` input of Apply Safety Preset.")
            ],
        )

    @classmethod
    def execute(
        cls,
        vae: Any = None,
        clip_vision: Any = None,
        image: Tensor | None = None,
        text: str | None = None,
        gate: Gate | None = None,
    ) -> io.NodeOutput:
        with named(LOOK):
            whole = gate_of(gate)
        seen = PresetGate(whole, vae, clip_vision, image, text)
        return io.NodeOutput(seen)


class ConceptGuardApplyPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=APPLY,
            display_name="Apply Safety Preset",
            category=f"{CATEGORY}/presets",
            description="Puts all edits of a safety preset on a model, as their nodes would. The preset's whole text "
            "is in the workflow, so that it runs the same everywhere. Choose one in the ConceptGuard panel. May stand "
            "anywhere between the model loader and the sampler. SD1.x, SD2.x, SDXL.",
            inputs=[
                io.Model.Input("model", tooltip="The model to edit; the one that comes in stays as it is."),
                io.Clip.Input(
                    "clip", tooltip="The text encoder of that model: the preset's words are encoded with it."
                ),
                io.String.Input(
                    "preset",
                    default="",
                    multiline=True,
                    tooltip="The preset's text (JSON). It is checked before anything runs. "
                    "A strength of 0 in it switches that edit off.",
                ),
                strength_input("Multiplies the strength of every edit of the preset: 1 as written, 0 all off."),
                io.MultiType.Input(
                    "gate",
                    types=[GateType, PresetGateType],
                    optional=True,
                    tooltip="Multiplies the strength of every edit, image by image; 0 is a closed gate and leaves the "
                    "image untouched. Not connected: open. A preset with gates of its own may want a Preset Gate here.",
                ),
                folded(
                    io.Boolean.Input(
                        "other_models",
                        default=False,
                        optional=True,
                        tooltip="Use the preset also on a model of another kind than those that it was made for, where "
                        "its numbers may do too much or nothing. Off: that is an error.",
                    )
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the preset's edits.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, preset: str | None = None, strength: float | None = 1.0) -> bool | str:
        try:
            with named(APPLY):
                if preset is not None and (lacks := missing(read(preset))):
                    raise ValueError(f"preset: {'; '.join(lacks)}")
        except ValueError as error:
            return str(error)
        return check(cls, strength)

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        preset: str,
        strength: float = 1.0,
        gate: Gate | PresetGate | None = None,
        other_models: bool = False,
    ) -> io.NodeOutput:
        with named(APPLY):
            document = read(preset)
            if not other_models:
                suits(document, of_model(model, APPLY).family)
            seen = gate if isinstance(gate, PresetGate) else PresetGate(gate_of(gate))
            given = Given(
                clip,
                read_file,
                lambda artefact: encoder_of(artefact, seen.clip_vision, clip),
                seen.vae,
                seen.image,
                seen.text,
                reporting(id_of(cls)),
            )
            specs = specs_of(document, given, strength, seen.whole, APPLY)
        tell = telling(cls)
        for spec in specs:
            if spec.source.artefact is not None and spec.source.artefact.kind == "prompt":
                compare(spec.source.artefact, model, APPLY)
            model = add_edit(model, replace(spec, report=tell))
        return io.NodeOutput(model)


def suits(preset: Preset, family: str) -> None:
    """Raise for a model of another family than the preset was made for."""
    if not preset.made_for(family):
        raise ValueError(
            f'preset "{preset.name}" was made for {", ".join(preset.base_models)} models, and this is one of {family}; '
            "choose a preset for it, or tick other_models to use this one all the same"
        )


class ConceptGuardSavePreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=SAVE,
            display_name="Save Safety Preset",
            category=f"{CATEGORY}/presets",
            description="Writes the edits that a model carries, with their gates and learned files, as a safety preset "
            f"to share or to keep in the ConceptGuard panel. The file goes to the output folder, in {FOLDER}/: .json "
            "for words and numbers, .safetensors where learned files travel along.",
            inputs=[
                io.Model.Input("model", tooltip="The model whose edits are saved."),
                io.Clip.Input("clip", tooltip="The text encoder that the concepts were made with."),
                io.String.Input(
                    "name", default="My preset", tooltip="What the preset is called, 80 characters at most."
                ),
                io.String.Input(
                    "description",
                    default="",
                    multiline=True,
                    tooltip="What it is for, and the reasons for its numbers.",
                ),
                io.String.Input("author", default="", tooltip="Who made it; may stay empty."),
                io.String.Input("licence", default="", tooltip="Under which terms it may be shared; may stay empty."),
            ],
            outputs=[
                io.String.Output(display_name="preset", tooltip="The preset's text, as Apply Safety Preset takes it.")
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any, name: str, description: str = "", author: str = "", licence: str = ""
    ) -> io.NodeOutput:
        with named(SAVE):
            saver = Saver(clip, located)
            edits = saver.edits(edits_of(model))
            document = Preset.model_construct(  # `read` checks it, and says what is wrong as for any other
                name=name.strip(),
                description=description.replace("\r\n", "\n"),
                author=author.strip(),
                licence=licence.strip(),
                edits=edits,
                files=tuple(saver.files.values()),
            )
            text = write(document)
            path = save(read(text))
        lines = [f"Saved as {FOLDER}/{path.name}", *saver.notes, *described(read(text))]
        return io.NodeOutput(text, ui={"concept_guard_preset": [text], **said(*lines)})


def located(artefact: Artefact) -> LearnedFile | None:
    """The file of the models folder that holds it."""
    path = holding(artefact)
    return None if path is None else LearnedFile(file=path.name, sha256=contents(path, fingerprint(path)))


def save(preset: Preset) -> Path:
    """Write a new file in the output folder, whole or not at all; an older one of that name is never replaced."""
    data, suffix = (packed(preset), ".safetensors") if preset.files else (write(preset).encode(), ".json")
    folder = Path(folder_paths.get_output_directory()) / FOLDER
    return put_beside(data, folder / f"{slug(preset.name) or 'preset'}{suffix}")


add_routes()

NODES: list[type[io.ComfyNode]] = [ConceptGuardApplyPreset, ConceptGuardSavePreset, ConceptGuardPresetGate]
