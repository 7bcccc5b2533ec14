"""The nodes that use and keep what KPOP learned: its weights as a LoRA, and its prompt for an audit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..editing.edits.spec import EditSpec, Gate, Prompt
from ..editing.engine.host import add_edit, fingerprint_of
from ..editing.files import artefacts
from ..editing.files.artefacts import Artefact
from ..editing.files.header import packed
from ..editing.methods.kpop import edit_of, prompt_of
from ..editing.training.lora import LoRA
from .files import changed, choices, file_of, saved, saved_in
from .inputs import (
    CATEGORY,
    UNLINKED,
    check,
    file_output,
    link_inputs,
    named,
    prefix_input,
    strength_input,
    where,
    window_inputs,
)
from .types import FileType, LoRAType, PromptType

KIND = "prompt"


class ConceptGuardSaveWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardSaveWeights",
            display_name="Save Weights",
            category=f"{CATEGORY}/train",
            description="Writes changed weights into the models folder loras/, always as a new file: any Load LoRA "
            "reads it, here and in other programs that read ComfyUI's LoRAs. Press R to see it there.",
            inputs=[
                LoRAType.Input("weights", tooltip="What Train KPOP made of the weights."),
                prefix_input("without", "loras"),
            ],
            outputs=[
                FileType.Output(
                    display_name="file",
                    tooltip="The file's name in the models folder; goes into the lora_name of a Load LoRA.",
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, weights: Any, filename_prefix: str = "without") -> io.NodeOutput:
        with named("ConceptGuardSaveWeights"):
            if not isinstance(weights, dict) or not weights:
                raise ValueError(f"weights is a {type(weights).__name__}; connect the weights of Train KPOP")
            lora = weights if isinstance(weights, LoRA) else LoRA(weights, {})
            folder = Path(folder_paths.get_folder_paths("loras")[0])
            name = saved_in(folder, packed(lora.checked(), lora.about), filename_prefix)
        return io.NodeOutput(name, ui={"text": (name,)})


class ConceptGuardSavePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardSavePrompt",
            display_name="Save Prompt",
            category=f"{CATEGORY}/train",
            description="Writes a learned prompt into the models folder concept_guard/, always as a new file. It is a "
            "key to what was erased: keep it apart from the weights, with those who audit them.",
            inputs=[
                PromptType.Input("prompt", tooltip="The prompt that Train KPOP learned."),
                prefix_input("prompt"),
            ],
            outputs=[file_output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, prompt: Prompt, filename_prefix: str = "prompt") -> io.NodeOutput:
        with named("ConceptGuardSavePrompt"):
            if (artefact := of_type(prompt).artefact) is None:
                raise ValueError("prompt was not learned, and there is nothing to save; connect Train KPOP")
            name = saved(artefact, filename_prefix)
        return io.NodeOutput(name, ui={"text": (name,)})


class ConceptGuardLoadPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardLoadPrompt",
            display_name="Load Prompt",
            category=f"{CATEGORY}/edits",
            description="A learned prompt from the models folder concept_guard/. Files are checked before use.",
            inputs=[io.Combo.Input("file", options=choices(KIND), tooltip="A file that Save Prompt wrote.")],
            outputs=[PromptType.Output(display_name="prompt", tooltip="The prompt.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> Any:
        return changed(file, KIND)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        with named("ConceptGuardLoadPrompt"):
            return io.NodeOutput(prompt_of(artefacts.read(file_of(file, KIND), KIND)))


class ConceptGuardKPOP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardKPOP",
            display_name="Recover with Prompt (KPOP)",
            category=f"{CATEGORY}/edits",
            description="Puts a learned prompt back into the cross-attentions that it was learned in: weights from "
            "which a concept was erased draw it again. For audits. May stand anywhere between the model loader and the "
            "sampler.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model with the changed weights; the one that comes in stays as it is."
                ),
                PromptType.Input("prompt", tooltip="The prompt that was learned with these weights."),
                strength_input(
                    "How much of the prompt takes part: 1 as learned, 0 nothing (the model stays without the concept)."
                ),
                *window_inputs(),
                *link_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The model that draws the concept again.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        strength: float | None = 1.0,
        start_percent: float | None = 0.0,
        end_percent: float | None = 1.0,
        range: Any = UNLINKED,
    ) -> bool | str:
        return check("ConceptGuardKPOP", strength, start_percent, end_percent, "all", range)

    @classmethod
    def execute(
        cls,
        model: Any,
        prompt: Prompt,
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        range: tuple[float, float] | None = None,
        gate: Gate | None = None,
    ) -> io.NodeOutput:
        node = "ConceptGuardKPOP"
        with named(node):
            place = where(start_percent, end_percent, of_type(prompt).blocks, range, gate)
        method, source = edit_of(prompt)
        edited = add_edit(model, EditSpec(method, source, strength, **place, node=node))
        compare(prompt.artefact, model, node)
        return io.NodeOutput(edited)


def compare(prompt: Artefact | None, model: Any, node: str) -> None:
    """Warn of a prompt that was learned on another model: it still edits this one, to whatever effect."""
    if prompt is not None and prompt.backbone not in ("", fingerprint_of(model, node)):
        logging.warning('%s: prompt "%s" was learned on %s', node, prompt.name, prompt.backbone)


def of_type(prompt: Any) -> Prompt:
    if not isinstance(prompt, Prompt):
        raise ValueError(f"prompt is a {type(prompt).__name__}; connect the output of Load Prompt or Train KPOP")
    return prompt


NODES: list[type[io.ComfyNode]] = [
    ConceptGuardSaveWeights,
    ConceptGuardSavePrompt,
    ConceptGuardLoadPrompt,
    ConceptGuardKPOP,
]
