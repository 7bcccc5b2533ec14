"""The nodes that use and keep what KPOP learned: its weights as a LoRA, and its prompt for an audit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..editing.edits.spec import EditSpec, PromptTokens
from ..editing.engine.host import add_edit, fingerprint_of
from ..editing.files.artefacts import Artefact
from ..editing.files.header import packed
from ..editing.methods.kpop import edit_of, prompt_of
from ..editing.training.changes import LoRA
from .edit import EditNode, defaults, place_of
from .files import saved_in
from .inputs import (
    CATEGORY,
    expect,
    link_inputs,
    named,
    prefix_input,
    rows_input,
    strength_input,
    window_inputs,
)
from .learned import load_node, save_node
from .show import said, telling
from .types import FileType, LoRAType, PromptType


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
        return io.NodeOutput(name, ui=said(name))


def learned(prompt: Any) -> Artefact:
    if (artefact := expect(prompt, PromptTokens, "prompt").artefact) is None:
        raise ValueError("prompt was not learned, and there is nothing to save; connect Train KPOP")
    return artefact


ConceptGuardSavePrompt = save_node(
    (
        "ConceptGuardSavePrompt",
        "Save Prompt",
        "train",
        "Writes a learned prompt into the models folder concept_guard/, always as a new file. It is a "
        "key to what was erased: keep it apart from the weights, with those who audit them.",
    ),
    "prompt",
    PromptType,
    "The prompt that Train KPOP learned.",
    learned,
)
ConceptGuardLoadPrompt = load_node(
    (
        "ConceptGuardLoadPrompt",
        "Load Prompt",
        "edits",
        "A learned prompt from the models folder concept_guard/. Files are checked before use.",
    ),
    "prompt",
    PromptType,
    prompt_of,
)


class ConceptGuardKPOP(EditNode):
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
                rows_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model that draws the concept again.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, **inputs: Any) -> io.NodeOutput:
        with named(node := "ConceptGuardKPOP"):
            given = {**defaults(cls), **inputs}
            prompt = expect(given.pop("prompt"), PromptTokens, "prompt")
            given["blocks"] = prompt.blocks
            place, strength = place_of(given), given.pop("strength")
        method, source = edit_of(prompt)
        edited = add_edit(model, EditSpec(method, source, strength, **place, node=node, report=telling(cls)))
        compare(prompt.artefact, model, node)
        return io.NodeOutput(edited)


def compare(prompt: Artefact | None, model: Any, node: str) -> None:
    """Warn of a prompt that was learned on another model: it still edits this one, to whatever effect."""
    if prompt is not None and prompt.backbone not in ("", fingerprint_of(model, node)):
        logging.warning('%s: prompt "%s" was learned on %s', node, prompt.name, prompt.backbone)


NODES: list[type[io.ComfyNode]] = [
    ConceptGuardSaveWeights,
    ConceptGuardSavePrompt,
    ConceptGuardLoadPrompt,
    ConceptGuardKPOP,
]
