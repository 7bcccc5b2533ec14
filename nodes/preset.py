"""Safety presets: a whole document put on a MODEL at once, and written from the edits that a MODEL carries."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..editing.binding import add_edit, edits_of
from ..editing.preset import Preset, described, read, write
from ..editing.preset_edits import edits_from, specs_of
from ..editing.spec import Gate
from .inputs import CATEGORY, check, named, strength_input
from .preset_routes import add_routes
from .types import GateType

APPLY, SAVE = "ConceptGuardApplyPreset", "ConceptGuardSavePreset"
FOLDER = "concept_guard_presets"  # in the host's output folder


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
                GateType.Input(
                    "gate",
                    optional=True,
                    tooltip="Multiplies the strength of every edit, image by image; 0 is a closed gate and leaves the "
                    "image untouched. Not connected: open.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the preset's edits.")],
        )

    @classmethod
    def validate_inputs(cls, preset: str | None = None, strength: float | None = 1.0) -> bool | str:
        try:
            with named(APPLY):
                if preset is not None:
                    read(preset)
        except ValueError as error:
            return str(error)
        return check(APPLY, strength)

    @classmethod
    def execute(
        cls, model: Any, clip: Any, preset: str, strength: float = 1.0, gate: Gate | None = None
    ) -> io.NodeOutput:
        with named(APPLY):
            if gate is not None and not isinstance(gate, Gate):
                raise ValueError(
                    f"gate is a {type(gate).__name__}; connect the GATE output of a ConceptGuard gate node"
                )
            specs = specs_of(read(preset), clip, strength, gate, APPLY)
        for spec in specs:
            model = add_edit(model, spec)
        return io.NodeOutput(model)


class ConceptGuardSavePreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=SAVE,
            display_name="Save Safety Preset",
            category=f"{CATEGORY}/presets",
            description="Writes the edits that a model carries as a safety preset, to share or to keep in the "
            f"ConceptGuard panel. The file goes to the output folder, in {FOLDER}/. Gates stay behind: they hold "
            "decisions about the pictures of one run.",
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
            edits = edits_from(edits_of(model), clip)
            document = Preset.model_construct(  # `read` checks it, and says what is wrong as for any other
                name=name.strip(), description=description.replace("\r\n", "\n"), author=author.strip(),
                licence=licence.strip(), edits=edits,
            )  # fmt: skip
            text = write(document)
            preset = read(text)
        path = save(text, preset.name)
        lines = [f"Saved as {FOLDER}/{path.name}", *described(preset)]
        return io.NodeOutput(text, ui={"concept_guard_preset": [text], "text": lines})


def save(text: str, name: str) -> Path:
    """Write a new file in the output folder, whole or not at all; an older one of that name is never replaced."""
    folder = Path(folder_paths.get_output_directory()) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{os.getpid()}.part"
    part.write_text(text, encoding="utf-8")
    stem = slug(name)
    try:
        for i in range(1, 100_000):
            path = folder / (f"{stem}.json" if i == 1 else f"{stem}-{i}.json")
            try:
                os.link(part, path)  # fails where the name is taken
            except FileExistsError:
                continue
            except OSError:  # a disk without links
                if path.exists():
                    continue
                os.replace(part, path)
            return path
    finally:
        part.unlink(missing_ok=True)
    raise ValueError(f'{SAVE}: the folder {FOLDER}/ is full of presets called "{stem}"; choose another name')


def slug(name: str) -> str:
    """A file name that every system takes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "preset"


add_routes()

NODES: list[type[io.ComfyNode]] = [ConceptGuardApplyPreset, ConceptGuardSavePreset]
