"""Shows where in a picture a concept is found: the evidence that the erasures work on."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..editing.edits.spec import Concept, complaint_about
from ..editing.engine.host import add_watch
from ..editing.engine.watch import Watch
from ..editing.methods.eiup import CHOICES, DEFAULTS
from ..editing.pictures.heat import SCALES, painted, scaled
from .inputs import CATEGORY, blocks_input, check, choice_input, expect, named
from .types import ConceptType

NODE = "ConceptGuardConceptMap"
EDGES = ("area", "mask", "set_area_to_bounds")  # of a conditioning that serves a part of the picture


class Levels(comfy.samplers.Sampler):
    """Not a sampler, but what stands in its place: one model call at each noise level, on the same finished picture."""

    @torch.no_grad()
    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        progress = comfy.utils.ProgressBar(len(sigmas))
        scale = model_wrap.inner_model.model_sampling.noise_scaling
        for sigma in sigmas:
            comfy.model_management.throw_exception_if_processing_interrupted()
            model_wrap(scale(sigma, noise, latent_image), sigma.expand(len(noise)), **extra_args)
            progress.update(1)
        return latent_image


def noise_levels(model: Any, start: float, end: float, count: int) -> Tensor:
    """The sigmas of `count` percents spread over a window, inside the range that the model knows."""
    sampling = model.get_model_object("model_sampling")
    percents = [start + (end - start) * (i + 0.5) / count for i in range(count)]
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    return torch.tensor([min(max(float(sampling.percent_to_sigma(p)), low), high) for p in percents])


def whole_picture(positive: list) -> list:
    """Conditionings that serve a part alone would be asked about a crop."""
    return [[entry[0], {k: v for k, v in entry[1].items() if k not in EDGES}] for entry in positive]


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
        watched = add_watch(model, watch)
        with closing(watch):
            look(watched, positive, x, seed, noise_levels(model, start_percent, end_percent, steps))
            heat = scaled(watch.heat(height, width), scale)
        maps = painted(heat, image)
        # Not as "images": whether the page shows them is the user's setting, and the host would always.
        return io.NodeOutput(maps, heat, ui={"concept_guard_maps": ui.PreviewImage(maps).as_dict()["images"]})


def look(model: Any, positive: list, x: Tensor, seed: int, sigmas: Tensor) -> None:
    """Let the model see the pictures x at each noise level; its watch remembers."""
    positive = whole_picture(positive)
    noise = comfy.sample.prepare_noise(x, seed)
    # Without guidance the negative prompt is never run; it stands there for what the host reads of it.
    comfy.sample.sample_custom(model, noise, 1.0, Levels(), sigmas, positive, positive, x, disable_pbar=True, seed=seed)


NODES: list[type[io.ComfyNode]] = [ConceptGuardConceptMap]
