"""Finds the steps in which a concept has to be edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..editing.causal.search import Period
from ..editing.edits.spec import Concept, EditSpec
from ..editing.engine.host import edits_of
from ..editing.gates.gates import image_discriminator
from ..editing.methods.cre import DEFAULTS
from ..editing.pictures.chart import Series, plot
from ..jobs.search import SEARCHES, Task, prompts_of
from .inputs import CATEGORY, choice_input, expect, named, schedule_inputs
from .progress import Shown
from .show import id_of, told
from .types import ConceptType, DiscriminatorType

NODE = "ConceptGuardCausalPeriod"


class ConceptGuardCausalPeriod(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Find Causal Period",
            category=f"{CATEGORY}/gates",
            description="Finds the steps in which CRE has to act on a concept: leaves out steps from the start, then "
            "from the end, as long as the discriminator finds no more of the concept. Samples many times; the "
            "result is kept in a file.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will be edited; edits that it carries stay on."),
                ConceptType.Input(
                    "concept",
                    tooltip="What will be erased, with `strength` and otherwise the defaults of Erase Concept (CRE).",
                ),
                DiscriminatorType.Input("discriminator", tooltip="What decides whether the concept is there."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="A prompt that asks for the concept. Several, joined by Conditioning (Combine), are "
                    "searched together, each in pictures of its own.",
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Vae.Input("vae", tooltip="Decodes the pictures that the discriminator looks at."),
                io.Latent.Input(
                    "latent", tooltip="Of the size to search with; a batch of n searches n seeds together."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Which noise; 0 is a seed like any other.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=2,
                    max=200,
                    tooltip="Of the schedule that is searched, at least 2; 0 is refused.",
                ),
                *schedule_inputs(
                    "The guidance scale; 1 runs the prompt alone, 0 the negative alone.",
                    "euler and ddim share what runs have in common, others sample each run anew.",
                    "The schedule that is searched.",
                ),
                io.Float.Input(
                    "delta",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="How much a step left out may raise the mean confidence; 0 nothing, as in the "
                    "paper. Larger finds shorter periods.",
                ),
                choice_input(
                    "search",
                    tuple(SEARCHES),
                    "exclusion",
                    "Step by step (exclusion, the paper's algorithm 1), or by halving, which "
                    "assumes that leaving out more steps never helps (bisection).",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.05,
                    max=4.0,
                    step=0.05,
                    optional=True,
                    tooltip="Of the edit that the range is for: a stronger one has to act in fewer steps. "
                    "0 would edit nothing and is refused.",
                ),
            ],
            outputs=[
                io.TimestepsRange.Output(display_name="range", tooltip="For the `range` input of an edit."),
                io.Float.Output(display_name="start", tooltip="Its start, as a fraction of the timesteps."),
                io.Float.Output(display_name="end", tooltip="Its end, as a fraction of the timesteps."),
                io.Image.Output(display_name="plot", tooltip="Confidence against steps left out, the period shaded."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        concept: Concept,
        discriminator: Any,
        positive: list,
        negative: list,
        vae: Any,
        latent: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        delta: float = 0.0,
        search: str = "exclusion",
        strength: float = 1.0,
    ) -> io.NodeOutput:
        with named(NODE):
            expect(concept, Concept)
            if search not in SEARCHES:
                raise ValueError(f"search is {search!r}; choose one of {', '.join(SEARCHES)}")
            judge, positive = image_discriminator(discriminator), prompts_of(positive)
            if any(edit.gate.inflight for edit in edits_of(model)):
                raise ValueError("model carries an edit whose gate decides in flight; search with a model without it")
        spec = EditSpec("projection", concept, strength, options=DEFAULTS, node=NODE)
        sigmas = comfy.samplers.KSampler(model, steps, model.load_device, sampler_name, scheduler).sigmas.cpu()
        task = Task(model, spec, judge, positive, negative, vae, latent, seed, cfg, sampler_name, sigmas, delta, search)
        found, note = task.kept_or_found(Path(folder_paths.get_user_directory()), Shown(model, id_of(cls)))
        start, end = task.percents[found.start], task.percents[found.end]
        text = f"steps {found.start} to {found.end - 1} of {steps}: {start:.3f} to {end:.3f}\n{note}"
        picture = chart(found, concept.name)
        return told(cls, text, (start, end), start, end, picture, concept_guard_range=[start, end])


def chart(found: Period, name: str) -> Tensor:
    """IMAGE: the probes of both sides against the steps that they leave out."""
    start = Series("left out at the start", sorted((a, f) for a, b, f in found.probes if b == found.steps))
    ends = [(b, f) for a, b, f in found.probes if a == found.start]
    end = Series("left out at the end, from here on", sorted(ends))
    shade = (float(found.start), float(found.end))
    title = f'causal period of "{name}": steps {found.start} to {found.end - 1} of {found.steps}'
    return plot([start, end], title, "step", "confidence that it is there", (0.0, float(found.steps)), shade=shade)


NODES: list[type[io.ComfyNode]] = [ConceptGuardCausalPeriod]
