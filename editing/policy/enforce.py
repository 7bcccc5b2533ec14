"""A policy put where every sampler of the host passes: the one module that changes the host, and only while a policy
is on.

Four of the host's methods are wrapped. CFGGuider.sample is what all sampler nodes call: there the MODEL gets the
policy's edits, and there its account is asked for. BaseModel.apply_model is what a model call goes through, whoever
makes it: there those are refused that did not come by the first. CLIP.tokenize and CLIP.encode_from_tokens tell which
text encoder made which prompt. `off` puts the host's own functions back.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider
from comfy.sd import CLIP

from ..edits.spec import EditSpec
from ..engine.account import ACCOUNTS, LISTENERS, Account
from ..engine.backbone import Backbone, backbone_of
from ..engine.conds import positive
from ..engine.host import EDITS, GUIDED, RUN, bear_witness, carrying, edits_of, of_model, ordered, others_in
from ..gates.decoders import preview
from ..training.harness import _Body as Training
from .document import Keeping, Policy, Rule
from .encoders import Encoders, words_of
from .file import Loaded, PolicyFile, Refused
from .govern import NODE, Files, Gates, Sampling, edits_for, flags, seen_at_last, shown, together
from .record import Record

# Of a prompt: its text, where it counts, and what the host makes of it.
TEXTUAL = ("cross_attn", "pooled_output", "attention_mask", "conditioning_", "mask", "hooks", "model_conds")
PARTLY = {"start_percent", "end_percent", "clip_start_percent", "clip_end_percent", "area", "mask", "strength"}
# Of a MODEL: what may change the guidance, beside what stands behind it.
CHANGED = (
    *("sampler_cfg_function", "sampler_pre_cfg_function"),
    *("sampler_calc_cond_batch_function", "model_function_wrapper", "context_handler"),
)
GUIDING = [WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE]
GUIDING += [WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL]
HOST_TRAINING = Path(comfy.samplers.__file__).parent.parent / "comfy_extras" / "nodes_train.py"
LEFT = "a gate still sees in the finished picture, edited, what it is there for"
MADE = ("edited", "closed", "passed")  # verdicts of runs that have a picture
NEARLY = 0.9  # of the greatest noise level: a run that begins there has all of the timesteps


@dataclass
class Told:
    """Who asks for a run, for the record and for words on the node: whatever the server knows."""

    who: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda _: None


class Enforcement:
    """file: the policy; asked: who asks for the run that goes on now."""

    def __init__(self, file: PolicyFile, record: Record, files: Files, asked: Callable[[], Told] = Told) -> None:
        self.file, self.record, self.files, self.asked = file, record, files, asked
        self.encoders = Encoders()
        self.sampled: list[BaseModel] = []  # the models of the runs that go on, the outermost first
        self.held: list[tuple[type, str, Any, Any]] = []  # class, name, the host's function and ours

    # -- on and off ----------------------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """As the file has it now: whether the policy is on. A damaged file is, and refuses."""
        try:
            on = self.file.now().policy.on
        except Refused:
            on = True
        if on and not self.held:
            self.on()
        if not on and self.held:
            self.off()
        return on

    def on(self) -> None:
        for owner, name, make in (
            (CFGGuider, "sample", self._sample),
            (BaseModel, "apply_model", self._apply_model),
            (CLIP, "tokenize", self._tokenize),
            (CLIP, "encode_from_tokens", self._encode_from_tokens),
        ):
            original = vars(owner)[name]
            ours = functools.wraps(original)(make(original))
            setattr(owner, name, ours)
            self.held.append((owner, name, original, ours))

    def off(self) -> None:
        """The host is as it was. Where another pack has wrapped ours meanwhile, ours stays within, and does nothing."""
        for owner, name, original, ours in reversed(self.held):
            if vars(owner)[name] is ours:
                setattr(owner, name, original)
        self.held = []

    # -- what is wrapped -----------------------------------------------------------------------------------------------

    def _sample(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def sample(guider: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *a: Any, **k: Any) -> Any:
            def go() -> Any:
                return original(guider, noise, latent_image, sampler, sigmas, *a, **k)

            if not self.held or not self.refresh() or sigmas.shape[-1] == 0:
                return go()
            if trains(sampler):
                return self.training(guider, go)
            return self.governed(guider, latent_image, sigmas, go)

        return sample

    def _apply_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def apply_model(model: Any, *args: Any, **kwargs: Any) -> Any:
            if self.held and not any(each is model for each in self.sampled):
                raise self.refused(
                    Refused(
                        "a node samples this model by code of its own, past the host's guiders, where no edit can be "
                        "put on it; use another sampler (if the policy was turned on in the middle of this run, start "
                        "it again)"
                    ),
                    {"model": type(model).__name__},
                )
            return original(model, *args, **kwargs)

        return apply_model

    def _tokenize(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def tokenize(clip: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = original(clip, text, *args, **kwargs)
            self.encoders.tokenized(tokens, text)
            return tokens

        return tokenize

    def _encode_from_tokens(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def encode_from_tokens(clip: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(clip, tokens, *args, **kwargs)
            if self.held:
                self.encoders.encoded(clip, tokens, result, self.words())
            return result

        return encode_from_tokens

    def words(self) -> list[Any]:
        try:
            return words_of(self.file.now().presets.values())
        except Refused:
            return []

    # -- one run -------------------------------------------------------------------------------------------------------

    def training(self, guider: Any, go: Callable[[], Any]) -> Any:
        """A node that trains: it gives back the pictures that it was given, or none."""
        about = {"model": type(guider.model_patcher.model).__name__}
        try:
            loaded = self.file.now()
            self.others(loaded.policy.training, "a training, which makes no picture but weights", about)
        except Refused as error:
            raise self.refused(error, about) from None
        self.note(loaded, "passed", about)
        with self.sampling(guider.model_patcher):
            return go()

    def governed(self, guider: Any, latent_image: Any, sigmas: torch.Tensor, go: Callable[[], Any]) -> Any:
        """One sampling run with the policy's edits; an error, and no picture, unless its account shows them.

        sigmas: the run's noise levels [steps + 1], in units of the clean latent.
        """
        start, about = time.monotonic(), {"model": type(guider.model_patcher.model).__name__}
        try:
            loaded = self.file.now()
            ours = self.edits(loaded, guider, latent_image, sigmas, about)
        except Refused as error:
            raise self.refused(error, about) from None
        if ours is None or all(spec.idle for spec in ours):  # it goes as if there were no policy
            with self.sampling(guider.model_patcher):
                latents = go()
            verdict = "passed" if ours is None else "closed"
            self.note(loaded, verdict, {**about, "seconds": round(time.monotonic() - start, 3)})
            return latents
        if RUN in guider.model_options.get("transformer_options", {}):  # a guider within a guider: the outer one counts
            with carried(guider, ours), self.sampling(guider.model_patcher):
                return go()
        try:
            latents, account = self.carry(guider, ours, go)
            again, left = self.sees(guider, ours, account.gates, latents)
            if again is not None:
                about["again"] = "a gate saw in the finished picture what it had not seen on the way"
                asked, ours = ours, again
                latents, account = self.carry(guider, ours, go)
                _, left = self.sees(guider, asked, {}, latents)
            about |= {"left": LEFT} if left else {}
            shown([account], ours)
        except Refused as error:
            raise self.refused(error, about) from None
        except BaseException as error:
            verdict = "refused" if str(error).startswith(NODE) else "failed"  # an edit of the policy's did not act
            self.note(loaded, verdict, {**about, "why": str(error) or type(error).__name__})
            raise
        self.tell(loaded, ours, account, about.get("left"))
        document = account.document()
        about |= {key: document[key] for key in ("edits", "gates", "steps")}
        self.note(loaded, "edited", {**about, "seconds": round(time.monotonic() - start, 3)})
        return latents

    def carry(self, guider: Any, ours: Sequence[EditSpec], go: Callable[[], Any]) -> tuple[Any, Account]:
        """What a guider samples with these edits, and the account that shows them. Raises Refused if none does."""
        with carried(guider, ours), self.sampling(guider.model_patcher), listening() as accounts:
            latents = go()
        return latents, shown(accounts, ours)

    def sees(
        self, guider: Any, ours: Sequence[EditSpec], gates: Gates, latents: Any
    ) -> tuple[list[EditSpec] | None, bool]:
        """`seen_at_last` of a run's latents [B, C, h, w]."""
        form = guider.model_patcher.model.latent_format
        return seen_at_last(ours, gates, lambda flight: flight.look(latents.float(), form))

    def edits(
        self, loaded: Loaded, guider: Any, latent_image: Any, sigmas: torch.Tensor, about: dict[str, Any]
    ) -> list[EditSpec] | None:
        """The policy's edits of this run; None: it lets it pass without any. Raises Refused.

        sigmas: the run's noise levels [steps + 1], in units of the clean latent.
        """
        policy, patcher = loaded.policy, guider.model_patcher
        try:
            backbone = of_model(patcher, NODE)
            about["family"] = backbone.family
            rule = ruled(policy, backbone)
        except ValueError as error:
            self.others(policy.others, str(error).removeprefix(f"{NODE}: "), about)
            return None
        run, texts = self.seen(loaded, rule, guider, backbone, latent_image, sigmas)
        if policy.prompts:
            about["prompts"] = texts
        if run.picture and policy.pictures != "edit":
            self.others(policy.pictures, "this run begins with a picture, or is led by one", about)
            return None
        specs = edits_for(loaded, rule, run, self.files)
        try:
            for spec in specs:
                backbone.admit(spec)
        except ValueError as error:
            self.others(policy.others, str(error).removeprefix(f"{NODE}: "), about)
            return None
        return specs

    def suits(self, network: torch.nn.Module, name: str) -> None:
        """Raises Refused for a kind of model that it does not sample. name: for people."""
        policy = self.file.now().policy
        try:
            ruled(policy, backbone_of(network, name, NODE))
        except ValueError as error:
            self.others(policy.others, str(error).removeprefix(f"{NODE}: "), {})

    def others(self, choice: str, why: str, about: dict[str, Any]) -> None:
        if choice == "refuse":
            raise Refused(f"{why}; this server does not sample it")
        about["why"] = why

    def seen(
        self, loaded: Loaded, rule: Rule, guider: Any, backbone: Backbone, latents: Any, sigmas: torch.Tensor
    ) -> tuple[Sampling, list[str | None]]:
        """A run, and the texts of its prompts. sigmas: noise levels [steps + 1], in units of the clean latent."""
        conds = conds_of(guider)
        encoded = [(name, cond["cross_attn"]) for name, cond in conds if "cross_attn" in cond]
        encoders, said = self.encoders.behind([tensor for _, tensor in encoded], backbone.width)
        everyone = not plain(guider)
        asked = [each.texts for (name, _), each in zip(encoded, said, strict=True) if everyone or positive(name)]
        texts = None if None in asked else tuple(dict.fromkeys(text for some in asked for text in some or ()))
        led = any(led_by_picture(cond) for _, cond in conds) or any(each.pictures for each in said)
        image = None if led else looked_at(latents, guider.model_patcher)
        picture = led or begins_with_picture(latents)
        gate = loaded.policy.pictures_gate
        if gate is not None and image is not None:
            picture = flags(gate, image, loaded, rule, self.files)
        sampling = guider.model_patcher.get_model_object("model_sampling")
        levels = [float(sigma) for sigma in sigmas]
        run = Sampling(
            *(backbone.family, encoders, texts or None, picture, image),
            whole=is_whole(levels, sampling),
            steps=functools.cache(lambda start, end: share_between(levels, sampling, start, end)),
            everyone=everyone,
        )
        return run, [each.text for each in said]

    @contextmanager
    def sampling(self, patcher: ModelPatcher) -> Iterator[None]:
        self.sampled.append(patcher.model)
        try:
            yield
        finally:
            self.sampled.pop()

    # -- who is told ---------------------------------------------------------------------------------------------------

    def tell(self, loaded: Loaded, ours: Sequence[EditSpec], account: Account, left: str | None) -> None:
        if "user" not in loaded.policy.tell:
            return
        keys = {spec.key for spec in ours}
        lines = [(entry.spec, line) for entry, line in account.lines() if entry.spec.key in keys]
        said = [f'"{spec.source.name}" {line}' for spec, line in lines]
        self.asked().say("\n".join([*said, *([left] if left else [])]))

    def refused(self, error: Refused, about: dict[str, Any]) -> Refused:
        """The same, with its place in the record, also where the policy cannot be read."""
        try:
            loaded = self.file.now()
        except Refused:
            loaded = None
        self.note(loaded, "refused", {**about, "why": str(error)})
        return error

    def note(self, loaded: Loaded | None, verdict: str, about: dict[str, Any]) -> None:
        entry = {"verdict": verdict, **self.asked().who, **about}
        keeping = Keeping() if loaded is None else loaded.policy.record
        log = loaded is None or verdict not in MADE or "log" in loaded.policy.tell  # what went wrong is always told
        try:
            self.record.add(entry, keeping, log)
        except OSError as error:
            logging.error("ConceptGuard policy: the record cannot be written: %s", error)
            if verdict in MADE:
                raise Refused(
                    "the record cannot be written, and no picture leaves this server without its line; whoever runs "
                    f"the server sees to its disk ({error.strerror or error})"
                ) from error


def ruled(policy: Policy, backbone: Backbone) -> Rule:
    """The rule for a model. Raises ValueError if there is none."""
    if (rule := policy.rule(backbone.family)) is None:
        raise ValueError(f"no rule of the policy covers {backbone.family} models")
    return rule


def conds_of(guider: Any) -> list[tuple[str, dict[str, Any]]]:
    """A guider's prompts, each with the name of its list."""
    return [(name, cond) for name, conds in guider.original_conds.items() for cond in conds]


@contextmanager
def carried(guider: Any, ours: Sequence[EditSpec]) -> Iterator[None]:
    """While a guider samples, its MODEL and its options carry the policy's edits."""
    held = guider.model_patcher, guider.model_options
    given = held[1].get("transformer_options", {})
    brought = {spec.key: spec for spec in (*edits_of(held[0]), *given.get(EDITS, ()))}
    specs = together(list(brought.values()), ours)
    model = carrying(held[0], specs)
    options = model.model_options
    if held[1] is not held[0].model_options:
        options = create_model_options_clone(held[1])
        options.setdefault("transformer_options", {})[EDITS] = list(specs)
        options["transformer_options"].setdefault(ACCOUNTS, model.model_options["transformer_options"][ACCOUNTS])
        bear_witness(options, specs)
    guider.model_patcher, guider.model_options = model, options
    try:
        yield
    finally:
        guider.model_patcher, guider.model_options = held


@contextmanager
def listening() -> Iterator[list[Account]]:
    """The accounts of the runs that end meanwhile."""
    accounts: list[Account] = []
    LISTENERS.append(accounts.append)
    try:
        yield accounts
    finally:
        LISTENERS.remove(accounts.append)


def plain(guider: Any) -> bool:
    """Whether the picture follows the positive prompts alone: the host's own guidance from cfg 1 on, with nobody's
    functions in it, and a positive prompt at every step."""
    options = guider.model_options
    foreign = any(options.get(name) for name in CHANGED) or bool(others_in(options, GUIDED))
    held = options.get("transformer_options", {}).get("wrappers", {}), guider.model_patcher.wrappers
    for wrappers in (some.get(kind, {}) for some in held for kind in GUIDING):
        foreign = foreign or any(each for key, each in wrappers.items() if key != EDITS)
    whole = any(positive(name) and not set(cond) & PARTLY for name, cond in conds_of(guider))
    return ordered(guider) and getattr(guider, "cfg", 1.0) >= 1 and whole and not foreign


def begins_with_picture(latent_image: Any) -> bool:
    parts = latent_image.unbind() if getattr(latent_image, "is_nested", False) else [latent_image]
    return any(torch.count_nonzero(part) > 0 for part in parts if isinstance(part, torch.Tensor))


def led_by_picture(cond: dict[str, Any]) -> bool:
    """Whether a prompt brings more than text and numbers: a ControlNet, latents, features of pictures, boxes."""
    return any(not is_plain(value) for key, value in cond.items() if not key.startswith(TEXTUAL))


def is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, uuid.UUID))


def is_whole(levels: Sequence[float], sampling: Any) -> bool:
    """Whether noise levels [steps + 1], in units of the clean latent, go down through all of the timesteps."""
    falling = all(a >= b for a, b in pairwise(levels))
    return falling and levels[0] >= NEARLY * float(sampling.percent_to_sigma(0.01)) and levels[-1] == 0


def share_between(levels: Sequence[float], sampling: Any, start: float, end: float) -> float:
    """The share of the steps of noise levels [steps + 1], in units of the clean latent, between two percents."""
    above, below = float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end))
    return sum(below < level <= above for level in levels[:-1]) / max(1, len(levels) - 1)


def trains(sampler: Any) -> bool:
    """Whether it is no sampler, but a training in a sampler's place: ours, or the host's."""
    kind = type(sampler)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return kind is Training or (kind.__name__ == "TrainSampler" and Path(file) == HOST_TRAINING)


def looked_at(latents: Any, patcher: ModelPatcher) -> torch.Tensor | None:
    """The picture that a run begins with, as the host's preview shows it: [B, h, w, 3] in [0, 1]; None without one."""
    if not isinstance(latents, torch.Tensor) or not torch.count_nonzero(latents):
        return None
    try:
        return preview(latents.float().cpu(), patcher.model.latent_format)
    except ValueError:
        return None
