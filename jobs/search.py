"""The search for a causal period: the steps in which an edit has to act on a concept, found by sampling many times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ..editing.causal import kept
from ..editing.causal.search import MEMORYLESS, Period, Prefixes, assess_with_exclusion, bisect, edges, naive_calls
from ..editing.edits.digest import digest
from ..editing.edits.spec import EditSpec
from ..editing.engine.host import RUN, add_edit, edits_of, look_at, settled
from ..editing.engine.run import EDITS
from ..editing.files.whole import NotWritten
from ..editing.gates.decoders import decoder
from ..editing.gates.discriminator import Judge
from .progress import Progress, silent

KEY = "concept_guard_search"  # of the models that look at the pictures, among the MODEL's own
SEARCHES: dict[str, Callable[..., Period]] = {"exclusion": assess_with_exclusion, "bisection": bisect}


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

    def file(self, user: Path) -> Path | None:
        """Where its answer is kept for this user; None if what it depends on cannot be told from other things."""
        if (weights := settled(self.model)) is None:
            return None
        _, look, _ = decoder(self.judge, self.vae)
        edits = [edit.key for edit in edits_of(self.model)]
        inputs = [kept.plain(each) for each in (self.positive, self.negative, self.latent)]
        numbers = (self.seed, self.cfg, self.sampler_name, self.sigmas, self.delta, self.search)
        key = digest((weights, look, self.spec.key, edits, inputs, *numbers))
        return kept.path(user, key)

    def kept_or_found(self, user: Path, progress: Progress = silent) -> tuple[Period, str]:
        """The period from its file, or from a search, which the file then keeps; and a note on where it is from."""
        file, steps = self.file(user), len(self.sigmas) - 1
        if file is not None and (before := kept.read(file, steps)):
            return before, "from the file of an earlier search"
        found, calls = self.found(progress)
        naive = naive_calls(found.probes, steps)
        note = f"{calls} model calls for each picture ({naive} if runs shared no steps)"
        return found, note if file is None else f"{note}{kept_in(file, found)}"

    def found(self, progress: Progress = silent, find: Callable[..., Period] | None = None) -> tuple[Period, int]:
        """The period, and the model calls that it took; `find` searches in another way."""
        find = find or SEARCHES[self.search]
        look, _, models = decoder(self.judge, self.vae)
        edited = add_edit(self.model, self.spec)
        edited.set_additional_models(KEY, list(models))
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
            progress,
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
        kept.write(file, found)
    except NotWritten as error:
        return f"\nnot kept for the next time: {error}"
    return ""


@dataclass
class Search(comfy.samplers.Sampler):
    """Stands in the sampler's place: runs it as often as the search asks, within one sampling run.

    sigmas: [S + 1], in units of the clean latent; all latents are [B, 4, h, w].
    """

    sampler: comfy.samplers.KSAMPLER
    find: Callable[[Callable[[int, int], float], int], Period]
    spec: EditSpec  # whose window is looked for
    percents: list[float]  # the edges of the schedule's steps
    share: bool
    look: Callable[[Tensor, Any], list[float]]
    progress: Progress
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
        most = steps * (steps + 3) // 2  # model calls that may be needed

        def tell(calls: int, latents: Tensor | None = None) -> None:
            self.progress(min(calls, most), most, latents=latents)

        def go_on(x: Tensor, i: int, window: tuple[int, int]) -> list[Tensor]:
            a, b = (self.percents[edge] for edge in window)
            tried = replace(self.spec, start_percent=a, end_percent=b)
            options[RUN].origin[tried] = self.spec  # whose part it has in the run's account
            options[EDITS] = [*others, tried]
            seen: list[Tensor] = []

            def see(step: dict[str, Any]) -> None:
                seen.append(step["x"].clone())
                tell(prefixes.calls + len(seen))

            model = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas[i:])
            model.latent_image, model.noise = latent_image, noise
            last = self.sampler.sampler_function(
                model, x, sigmas[i:], extra_args=extra_args, callback=see, disable=True, **self.sampler.extra_options
            )
            return [*seen[1:], last]

        def confidence(a: int, b: int) -> float:
            x = sampling.inverse_noise_scaling(sigmas[-1], prefixes.run(a, b))
            scores = look_at(model_wrap, x, self.look)
            tell(prefixes.calls, x)
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
