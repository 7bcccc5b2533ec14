"""Finds the steps in which a concept has to be edited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..editing.causal import kept as cache
from ..editing.causal.search import MEMORYLESS, Period, Prefixes, assess_with_exclusion, bisect, edges, naive_calls
from ..editing.edits.digest import digest
from ..editing.edits.spec import Concept, EditSpec
from ..editing.engine.host import add_edit, edits_of, look_at, settled
from ..editing.engine.run import EDITS
from ..editing.files.whole import NotWritten
from ..editing.gates.decoders import decoder
from ..editing.gates.discriminator import Judge
from ..editing.gates.gates import image_discriminator
from ..editing.methods.cre import DEFAULTS
from ..editing.pictures.chart import Series, plot
from .inputs import CATEGORY, choice_input, expect, named
from .show import id_of, told
from .types import ConceptType, DiscriminatorType

NODE = "ConceptGuardCausalPeriod"
Tick = Callable[[int, Tensor | None], None]  # told the model calls so far, and the latents of a run that ended
SEARCHES: dict[str, Callable[..., Period]] = {"exclusion": assess_with_exclusion, "bisection": bisect}


@dataclass
class Search(comfy.samplers.Sampler):
    """Stands in the sampler's place: runs it as often as the search asks, within one sampling run."""

    sampler: comfy.samplers.KSAMPLER
    find: Callable[[Callable[[int, int], float], int], Period]
    spec: EditSpec  # whose window is looked for
    percents: list[float]  # the edges of the schedule's steps
    share: bool
    look: Callable[[Tensor, Any], list[float]]
    tick: Tick
    found: Period | None = None
    calls: int = field(default=0, init=False)

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
        extra_args["denoise_mask"] = denoise_mask
        options = extra_args["model_options"]["transformer_options"]
        others = [spec for spec in options[EDITS] if spec is not self.spec]
        sampling = model_wrap.inner_model.model_sampling
        steps = len(sigmas) - 1

        def go_on(x: Tensor, i: int, window: tuple[int, int]) -> list[Tensor]:
            a, b = (self.percents[edge] for edge in window)
            options[EDITS] = [*others, replace(self.spec, start_percent=a, end_percent=b)]
            seen: list[Tensor] = []

            def see(step: dict[str, Any]) -> None:
                seen.append(step["x"].clone())
                self.tick(prefixes.calls + len(seen), None)

            model = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas[i:])
            model.latent_image, model.noise = latent_image, noise
            last = self.sampler.sampler_function(
                model, x, sigmas[i:], extra_args=extra_args, callback=see, disable=True, **self.sampler.extra_options
            )
            return [*seen[1:], last]

        def confidence(a: int, b: int) -> float:
            x = sampling.inverse_noise_scaling(sigmas[-1], prefixes.run(a, b))
            scores = look_at(model_wrap, x, self.look)
            self.tick(prefixes.calls, x)
            return sum(scores) / len(scores)

        first = sampling.noise_scaling(sigmas[0], noise, latent_image, self.sampler.max_denoise(model_wrap, sigmas))
        prefixes = Prefixes(go_on, first, steps, self.share)
        self.found = self.find(confidence, steps)
        self.calls = prefixes.calls
        return latent_image


def prompts_of(conditioning: list) -> list:
    """A conditioning's entries, which the host would mix, as prompts of pictures of their own: one entry, [n, T, W]."""
    if len(conditioning) < 2:
        return conditioning
    shapes = {entry[0].shape[1:] for entry in conditioning}
    extras = {key for entry in conditioning for key in entry[1]} - {"pooled_output"}
    if len(shapes) > 1 or extras:
        raise ValueError(
            f"positive joins prompts of unlike length or with {', '.join(sorted(extras)) or 'other settings'}; join "
            "plain text prompts of one length, or search with one"
        )
    pooled = [entry[1].get("pooled_output") for entry in conditioning for _ in entry[0]]
    about = {} if any(each is None for each in pooled) else {"pooled_output": torch.cat(pooled)}
    return [[torch.cat([entry[0] for entry in conditioning]), about]]


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
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="The guidance scale; 1 runs the prompt alone, 0 the negative alone.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="euler and ddim share what runs have in common, others sample each run anew.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="normal",
                    tooltip="The schedule that is searched.",
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
        found, note = task.kept_or_found(progress(model, id_of(cls), steps))
        start, end = task.percents[found.start], task.percents[found.end]
        text = f"steps {found.start} to {found.end - 1} of {steps}: {start:.3f} to {end:.3f}\n{note}"
        picture = chart(found, concept.name)
        return told(cls, text, (start, end), start, end, picture, concept_guard_range=[start, end])


@dataclass(frozen=True)
class Task:
    """A search, with all that its answer depends on. `positive` is as `prompts_of` gives it."""

    model: Any
    spec: EditSpec
    judge: Judge
    positive: list
    negative: list
    vae: Any
    latent: dict[str, Any]
    seed: int
    cfg: float
    sampler_name: str
    sigmas: Tensor  # of the schedule, [steps + 1]
    delta: float = 0.0
    search: str = "exclusion"

    @cached_property
    def percents(self) -> list[float]:
        return edges(self.sigmas.tolist(), self.model.get_model_object("model_sampling").percent_to_sigma)

    def file(self) -> Path | None:
        """Where its answer is kept; None if what it depends on cannot be told apart from other things."""
        if (weights := settled(self.model)) is None:
            return None
        _, look, _ = decoder(self.judge, self.vae)
        edits = [edit.key for edit in edits_of(self.model)]
        inputs = [cache.plain(each) for each in (self.positive, self.negative, self.latent)]
        numbers = (self.seed, self.cfg, self.sampler_name, self.sigmas, self.delta, self.search)
        key = digest((weights, look, self.spec.key, edits, inputs, *numbers))
        return cache.path(Path(folder_paths.get_user_directory()), key)

    def kept_or_found(self, tick: Tick) -> tuple[Period, str]:
        """The period from its file, or from a search, which the file then keeps; and a note on where it is from."""
        file, steps = self.file(), len(self.sigmas) - 1
        if file is not None and (kept := cache.read(file, steps)):
            return kept, "from the file of an earlier search"
        found, calls = self.found(tick)
        naive = naive_calls(found.probes, steps)
        note = f"{calls} model calls for each picture ({naive} if runs shared no steps)"
        return found, note if file is None else f"{note}{kept_in(file, found)}"

    def found(self, tick: Tick, find: Callable[..., Period] | None = None) -> tuple[Period, int]:
        """The period, and the model calls that it took; `find` searches in another way."""
        find = find or SEARCHES[self.search]
        look, _, models = decoder(self.judge, self.vae)
        edited = add_edit(self.model, self.spec)
        edited.set_additional_models(NODE, list(models))
        x = comfy.sample.fix_empty_latent_channels(self.model, self.latent["samples"])
        noise = comfy.sample.prepare_noise(x, self.seed, self.latent.get("batch_index"))
        copies = max((len(entry[0]) for entry in self.positive), default=1)
        noise, x = (each.repeat_interleave(copies, 0) for each in (noise, x))
        search = Search(
            comfy.samplers.sampler_object(self.sampler_name),
            partial(find, delta=self.delta),
            self.spec,
            self.percents,
            self.sampler_name in MEMORYLESS,
            look,
            tick,
        )
        comfy.sample.sample_custom(
            edited,
            noise,
            self.cfg,
            search,
            self.sigmas,
            self.positive,
            self.negative,
            x,
            noise_mask=self.latent.get("noise_mask"),
            disable_pbar=True,
            seed=self.seed,
        )
        assert search.found is not None
        return search.found, search.calls


def kept_in(file: Path, found: Period) -> str:
    """Keep it; what a node adds if that fails, for which nobody should search again."""
    try:
        cache.write(file, found)
    except NotWritten as error:
        return f"\nnot kept for the next time: {error}"
    return ""


def progress(model: Any, node_id: str | None, steps: int) -> Tick:
    """Shows model calls against the most that may be needed, and the picture judged last; an interrupt stops it."""
    import latent_preview  # brings the host's preview models

    most = steps * (steps + 3) // 2
    bar = comfy.utils.ProgressBar(most, node_id=node_id)
    previewer = latent_preview.get_previewer(model.load_device, model.get_model_object("latent_format"))

    def tick(calls: int, latents: Tensor | None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        shown = previewer and latents is not None and previewer.decode_latent_to_preview_image("JPEG", latents)
        bar.update_absolute(min(calls, most), most, shown or None)

    return tick


def chart(found: Period, name: str) -> Tensor:
    """IMAGE: the probes of both sides against the steps that they leave out."""
    start = Series("left out at the start", sorted((a, f) for a, b, f in found.probes if b == found.steps))
    ends = [(b, f) for a, b, f in found.probes if a == found.start]
    end = Series("left out at the end, from here on", sorted(ends))
    shade = (float(found.start), float(found.end))
    title = f'causal period of "{name}": steps {found.start} to {found.end - 1} of {found.steps}'
    return plot([start, end], title, "step", "confidence that it is there", (0.0, float(found.steps)), shade=shade)


NODES: list[type[io.ComfyNode]] = [ConceptGuardCausalPeriod]
