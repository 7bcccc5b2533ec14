"""Shows where in a picture a concept is found: the evidence that the erasures work on."""

from __future__ import annotations

from typing import Any

import comfy.sample
from comfy_api.latest import io, ui
from torch import Tensor

from ..editing.edits.spec import Concept, complaint_about
from ..editing.engine.watch import Watch
from ..editing.methods.eiup import CHOICES, DEFAULTS
from ..editing.pictures.heat import SCALES, painted, scaled
from ..jobs.map import concept_map, noise_levels
from .inputs import CATEGORY, blocks_input, check, choice_input, expect, named
from .progress import Shown
from .show import id_of
from .types import ConceptType

NODE = "ConceptGuardConceptMap"


class ConceptGuardConceptMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Concept Map",
            category=f"{CATEGORY}/look",
            description="Where in a sampled picture a concept is found: adds noise to it, lets the model look at it a "
            "few times, and averages the attention of the concept's words over steps and cross-attentions. "
            "SD1.x, SD2.x, SDXL.",
            inputs=[
                io.Model.Input("model", tooltip="The model that looks; with its edits, if it carries any."),
                ConceptType.Input("concept", tooltip="What to look for."),
                io.Conditioning.Input("positive", tooltip="The prompt that the picture was sampled with."),
                io.Latent.Input("latent", tooltip="The sampled picture or pictures, as the sampler puts them out."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Which noise is added; 0 is a seed like any other.",
                ),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="How many noise levels to look at, one model call each; at least 1, 0 is refused.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="The noisiest level, as a fraction of the timesteps; 0 is pure noise.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="The least noisy level, as a fraction of the timesteps; 1 is the finished picture, "
                    "0 is pure noise.",
                ),
                blocks_input(),
                io.Image.Input(
                    "image", optional=True, tooltip="The decoded picture to paint the map over. Not connected: colours."
                ),
                choice_input(
                    "evidence",
                    CHOICES["evidence"],
                    DEFAULTS.evidence,
                    "What to show: the attention of the concept's words (none), or only as far as the picture turns to "
                    "them rather than to the prompt (share); or where the picture's features are like the concept's, "
                    "compared with its neutral prompts: where edits act (alike).",
                ),
                choice_input(
                    "scale",
                    SCALES,
                    "picture",
                    "Stretch the map of each picture over all colours (picture), those of a batch alike, so that they "
                    "can be compared (batch), or none (none).",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="map", tooltip="The map as colours: black, purple, orange, yellow."),
                io.Mask.Output(display_name="mask", tooltip="The map as numbers from 0 to 1."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, start_percent: float | None = 0.2, end_percent: float | None = 0.8, blocks: str | None = "all"
    ) -> bool | str:
        return check(cls, None, start_percent, end_percent, blocks)

    @classmethod
    def execute(
        cls,
        model: Any,
        concept: Concept,
        positive: list,
        latent: dict[str, Any],
        seed: int = 0,
        steps: int = 4,
        start_percent: float = 0.2,
        end_percent: float = 0.8,
        blocks: str = "all",
        image: Tensor | None = None,
        evidence: str = DEFAULTS.evidence,
        scale: str = "picture",
    ) -> io.NodeOutput:
        with named(NODE):
            expect(concept, Concept)
            if complaint := complaint_about(1.0, start_percent, end_percent, blocks):
                raise ValueError(complaint)
            watch = Watch(concept, NODE, blocks, evidence)
            if scale not in SCALES:
                raise ValueError(f"scale is {scale!r}; choose one of {', '.join(SCALES)}")
        x = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        height, width = (8 * n for n in x.shape[-2:]) if image is None else image.shape[1:3]
        if image is not None and len(image) not in (1, len(x)):
            raise ValueError(f"{NODE}: image has {len(image)} pictures and latent {len(x)}; decode the same latent")
        sigmas = noise_levels(model, start_percent, end_percent, steps)
        heat = concept_map(model, watch, positive, x, seed, sigmas, (height, width), Shown(model, id_of(cls)))
        heat = scaled(heat, scale)
        maps = painted(heat, image)
        # Not as "images": whether the page shows them is the user's setting, and the host would always.
        return io.NodeOutput(maps, heat, ui={"concept_guard_maps": ui.PreviewImage(maps).as_dict()["images"]})


NODES: list[type[io.ComfyNode]] = [ConceptGuardConceptMap]
