"""The engine's one connection to the host: edits are put into a MODEL here, and come to life when it is sampled.

The edits travel as data. While sampling, a wrapper around each model call turns the active ones into patches, after
every other pack has placed its own; so neither the order of nodes nor the packs in the graph decide who comes last.

In these wrappers x: [B, C, h, w], noisy latents; timestep, t: [B], their noise levels in units of the clean latent (of
a model of flows, from 0 to 1).
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from comfy.model_management import load_models_gpu
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.samplers import CFGGuider

from .. import methods as _methods  # noqa: F401  registers the methods
from ..edits.digest import Shared, digest
from ..edits.spec import ROWS, EditSpec
from ..gates.features import weights_digest
from . import backbones as _backbones  # noqa: F401  registers the kinds of models
from .account import ACCOUNTS, LISTENERS, Account, Accounts
from .backbone import Backbone, backbone_of
from .conds import CONDS, Named, positive
from .guidance import batched
from .obstacles import OTHERS, cause, nag_in
from .rows import Served, images_of, patches_of, tiles_of, window_of
from .run import CALL, EDITS, OBSERVER, WATCH, Call, Run
from .streams import ModelCall
from .watch import Watch

RUN = "concept_guard_run"  # in the transformer_options of one sampling run


def add_edit(model: ModelPatcher, spec: EditSpec) -> ModelPatcher:
    """A clone of `model` with one more edit; raises if the model cannot be edited so."""
    of_model(model, spec.node).admit(spec)
    model = carrying(model, (*edits_of(model), spec))
    model.model_options["transformer_options"][ACCOUNTS] = Accounts()
    return model


def carrying(model: ModelPatcher, specs: Sequence[EditSpec]) -> ModelPatcher:
    """A clone of `model` with these edits, which suit it, and no others; of its runs it keeps the same accounts."""
    model = woken(model)
    options = model.model_options["transformer_options"]
    options[EDITS] = list(specs)
    options.setdefault(ACCOUNTS, Accounts())
    model.set_attachments(EDITS, tuple(specs))
    bear_witness(model.model_options, specs)
    for flight in [spec.gate.inflight for spec in specs if spec.gate.inflight]:
        loaded = model.get_additional_models_with_key(EDITS)
        more = [each for each in flight.models if not any(each.is_clone(known) for known in loaded)]
        model.set_additional_models(EDITS, [*loaded, *more])
    return model


def add_watch(model: ModelPatcher, watch: Watch) -> ModelPatcher:
    """A clone of `model` whose model calls `watch` will see; raises if the model cannot be watched so."""
    watch.admitted(of_model(model, watch.node))
    model = woken(model)
    model.model_options["transformer_options"][WATCH] = watch
    return model


def of_model(model: ModelPatcher, node: str) -> Backbone:
    """A MODEL as the engine sees it; raises, in the name of `node`, for one that it does not know."""
    return backbone_of(model.get_model_object("diffusion_model"), type(model.model).__name__, node)


def fingerprint_of(model: ModelPatcher, node: str) -> str:
    """The same for models that differ in their weights alone."""
    return of_model(model, node).fingerprint


def woken(model: ModelPatcher) -> ModelPatcher:
    """A clone that the engine will wake up with."""
    model = model.clone()
    for kind, wrapper in WRAPPERS.items():
        if not model.get_wrappers(kind, EDITS):
            model.add_wrapper_with_key(kind, EDITS, wrapper)
    for kind, callback in CALLBACKS.items():
        if not model.get_callbacks(kind, EDITS):
            model.add_callback_with_key(kind, EDITS, callback)
    cloned(model, model)
    return model


def bear_witness(model_options: dict[str, Any], specs: Sequence[EditSpec]) -> None:
    """Puts a Witness of its edits among the patches of a MODEL, and behind its guidance, in place of an older one."""
    options, witness = model_options["transformer_options"], Witness(specs)
    patches = options.get("patches", {})
    options["patches"] = {**patches, BLOCK: [*others_in(patches, BLOCK), witness]}
    model_options[GUIDED] = [*others_in(model_options, GUIDED), witness]


def others_in(held: dict[str, Any], name: str) -> list[Any]:
    """A list of other packs' patches."""
    return [patch for patch in held.get(name, ()) if not isinstance(patch, Witness)]


def accounts_of(model: ModelPatcher) -> Accounts | None:
    """The accounts of the last runs of a MODEL or of its clones; None for one without edits."""
    return model.model_options["transformer_options"].get(ACCOUNTS)


def edits_of(model: ModelPatcher) -> tuple[EditSpec, ...]:
    """The edits that a MODEL carries."""
    return tuple(model.model_options["transformer_options"].get(EDITS, ()))


def settled(model: ModelPatcher) -> str | None:
    """The same text for the same MODEL, also in another session; None where other packs have a part in it.

    Edits are not counted: `edits_of` gives them.
    """
    options = model.model_options
    known = {EDITS, ACCOUNTS, OBSERVER, WATCH, "wrappers", "patches"}
    foreign = set(options["transformer_options"]) - known or set(options) - {"transformer_options", GUIDED}
    for kinds in (model.wrappers, model.callbacks):
        foreign = foreign or {key for kind in kinds.values() for key in kind if key != EDITS and kind[key]}
    patches = options["transformer_options"].get("patches", {})
    patched = others_in(options, GUIDED) or any(others_in(patches, name) for name in patches)
    held = (model.object_patches, model.hook_patches, model.forced_hooks, model.weight_wrapper_patches)
    if foreign or patched or model.patches or any(map(holds, held)):
        return None
    return weights_digest(model.model.state_dict())


def holds(held: Any) -> bool:
    """Whether nested dicts hold anything."""
    return any(map(holds, held.values())) if isinstance(held, dict) else bool(held)


def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps a whole sampling run: makes its Run and its account, and frees what it computed however the run ends."""
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})
    specs, watch = options.get(EDITS, ()), options.get(WATCH)
    patcher = guider.model_patcher
    nothing_lost(patcher, specs)
    if not (specs or watch):
        return executor(*args, **kwargs)
    if RUN in options:  # a guider within a guider
        options[RUN].guiders.add(guider, ordered(guider))
        return executor(*args, **kwargs)
    network = patcher.get_model_object("diffusion_model")
    can_act(guider, network, specs)
    backbone = backbone_of(network, type(patcher.model).__name__, specs[0].node if specs else watch.node)
    with closing(start_run(backbone, patcher.get_model_object("model_sampling"), specs)) as run:
        run.begin(specs, schedule_of(args, kwargs), patcher.model, remembered(specs, args))
        run.guiders.add(guider, ordered(guider))
        options[RUN] = run
        try:
            with awake(patcher, run):
                latents = executor(*args, **kwargs)
            complain(run, guider)
        except ValueError as error:
            run.account.trouble = str(error)
            raise
        finally:
            del options[RUN]
            run.account.close()
        settle(run, options, latents)
        return latents


def schedule_of(args: Sequence[Any], kwargs: dict[str, Any]) -> list[float]:
    """The noise levels of a run's steps, by the host's outer_sample(noise, latent_image, sampler, sigmas, ..)."""
    sigmas = kwargs.get("sigmas", args[3] if len(args) > 3 else ())
    return [float(sigma) for sigma in sigmas]


def nothing_lost(patcher: ModelPatcher, specs: Sequence[EditSpec]) -> None:
    """Raise if the MODEL carried edits that are not in its options any more."""
    for spec in patcher.get_attachment(EDITS) or ():
        if spec not in specs and not spec.idle:
            raise spec.error(
                "the edit was not applied: a node between this one and the sampler replaced the MODEL's "
                "transformer_options, in which it travels; put that node before this one, or take it out"
            )


def can_act(guider: Any, network: torch.nn.Module, specs: Sequence[EditSpec]) -> None:
    """Raise before the first step, if an edit is going to do nothing."""
    follows_the_positive(guider, specs)
    is_guided(guider, specs)
    if (nag := nag_in(network)) and (live := [spec for spec in specs if not spec.idle]):
        del network.forward  # it would stay, for the one who put it there does not expect an error
        raise live[0].error(
            f"the edit was not applied: {type(guider).__name__} puts a forward of its own into the model ({nag}), and "
            "gives its attentions more rows than it has pictures. Use core's or sd-perturbed-attention's NAG"
        )
    on_one_device(guider.model_patcher, specs)


def on_one_device(patcher: ModelPatcher, specs: Sequence[EditSpec]) -> None:
    """Raise if newer hosts' MultiGPU CFG Split samples the MODEL: its prompts run through copies on other devices."""
    live = [spec for spec in specs if not spec.idle]
    if live and patcher.get_additional_models_with_key("multigpu"):
        raise live[0].error(
            "the edit was not applied: MultiGPU CFG Split runs copies of the model on several devices at once, and an "
            "edit follows one of them; take that node out"
        )


@contextmanager
def awake(patcher: ModelPatcher, run: Run) -> Iterator[None]:
    """While a run of this MODEL goes on, with the engine in it."""
    AWAKE.append((patcher, run))
    try:
        yield
    finally:
        AWAKE.pop()


def pre_run(patcher: ModelPatcher) -> None:
    """A callback when sampling begins: raises if the engine was not woken for it."""
    if not any(each is patcher for each, _ in AWAKE):
        for spec in patcher.get_attachment(EDITS) or ():
            if not spec.idle:
                raise spec.error(
                    "the edit was not applied: a node between this one and the sampler replaced the MODEL's wrappers, "
                    "which wake it up; put that node before this one, or take it out"
                )


def loaded(patcher: ModelPatcher, device: Any, lowvram: Any, force_patch_weights: bool, *_: Any) -> None:
    """A callback when weights are loaded: raises if that is for writing them into a file."""
    for spec in patcher.get_attachment(EDITS) or ():
        if force_patch_weights and not spec.idle:
            raise spec.error(
                "the edit acts while sampling, and a file of weights cannot hold it; save the MODEL that comes before "
                "this node, and the edits with Save Safety Preset"
            )


def cloned(_: ModelPatcher, model: ModelPatcher) -> None:
    """A callback when a MODEL is cloned: the clone, too, says so when it is asked for its weights alone."""
    this = weakref.ref(model)
    model.get_key_patches = lambda *args, **kwargs: weights_alone(this(), *args, **kwargs)


def weights_alone(patcher: ModelPatcher | None, *args: Any, **kwargs: Any) -> Any:
    """What a merge asks its second MODEL for: raises if that carries edits, which would be lost.

    A merge names the part that it takes. The patcher itself asks for all of its weights, when LoRA hooks take turns.
    """
    assert patcher is not None
    for spec in patcher.get_attachment(EDITS) or ():
        if (args or kwargs) and not spec.idle:
            raise spec.error(
                "the edit was not applied: a merge takes the weights of this MODEL alone, and leaves its edits behind; "
                "merge first, and put the edit behind the merge"
            )
    return type(patcher).get_key_patches(patcher, *args, **kwargs)


def complain(run: Run, guider: Any) -> None:
    """Raise if an edit that was due did not act, or not in all of its blocks."""
    for spec, entry in run.account.entries.items():
        if (complaint := run.account.complaint(entry)) is not None:
            missed = bool(entry.installed)
            why = cause(missed, run.account.calls, guider.model_options, run.backbone.foreign())
            why = OTHERS if entry.ignored else why
            raise spec.error(f"the edit was not applied: it {complaint}. {why}")


def settle(run: Run, options: dict[str, Any], latents: Any) -> None:
    """A run has ended well: remember its account, and tell it."""
    account, made = run.account, digest_of(latents)
    account.brought = tuple(run.guiders.brought)
    for _, around in AWAKE:  # a guider that left its work to this one
        around.account.absorb(account)
    if ACCOUNTS in options:
        options[ACCOUNTS].runs.append((made, account))
    for flight, verdict in run.verdicts.items():
        VERDICTS[made, flight] = verdict
    while len(VERDICTS) > REMEMBERED:
        VERDICTS.pop(next(iter(VERDICTS)))
    told: dict[Any, list[str]] = {}  # by node
    for entry, line in account.lines():
        spec = entry.spec
        logging.info('%s: "%s" %s', spec.node, spec.source.name, line)
        if spec.report is not None:
            told.setdefault(spec.report, []).append(f'"{spec.source.name}" {line}')
    for report, lines in told.items():
        report("\n".join(lines) if len(lines) > 1 else lines[0].split('" ', 1)[1])
    for listener in LISTENERS if account.entries else ():
        listener(account)


def digest_of(latents: Any) -> str:
    """The same for the same numbers, wherever they lie."""
    return digest([latents.detach().cpu()]) if isinstance(latents, torch.Tensor) else ""


def account_of(model: ModelPatcher, latents: Any) -> Account:
    """Of the run that made these latents with this MODEL. Raises ValueError if none is known."""
    accounts = accounts_of(model)
    if accounts is None:
        raise ValueError("model carries no edits; connect the MODEL that goes into the sampler")
    found = accounts.of(digest_of(latents))
    if found is None:
        raise ValueError(
            "no run of this MODEL is known; connect the MODEL that goes into the sampler, and the latent that comes "
            "out of it"
        )
    return found


def remembered(specs: Sequence[EditSpec], args: Sequence[Any]) -> dict[str, tuple[float, ...]]:
    """What in-flight gates decided in the run that made the latents this one begins with."""
    flights = {spec.gate.inflight.id for spec in specs if spec.gate.inflight is not None}
    if not flights or len(args) < 2:
        return {}
    made = digest_of(args[1])
    return {flight: VERDICTS[made, flight] for flight in flights if any(VERDICTS.get((made, flight), ()))}


def ordered(guider: Any) -> bool:
    """Whether it passes its prompts on as the host's own does: the positive one first."""
    return type(guider).predict_noise is CFGGuider.predict_noise


def follows_the_positive(guider: Any, specs: Sequence[EditSpec]) -> None:
    """Raise if the picture follows the negative prompt, which conditional edits leave as it is."""
    cfg = getattr(guider, "cfg", 1.0)
    own = guider.model_options.get("sampler_cfg_function")  # what it makes of cfg, only the pack knows, or the host
    if not ordered(guider) or cfg > 0 or not (own is None or str(getattr(own, "__module__", "")).startswith("comfy")):
        return
    for spec in specs:
        if spec.rows == ROWS[0] and not spec.idle:
            raise spec.error(
                f"cfg is {cfg:g}: the picture follows the negative prompt, which this edit leaves as it is. Set its "
                "rows to all, or cfg above 0"
            )


def is_guided(guider: Any, specs: Sequence[EditSpec]) -> None:
    """Raise if an edit of guidance finds none to change: at cfg 1 the host asks for the positive prompt alone."""
    alone = math.isclose(getattr(guider, "cfg", 0.0), 1.0)
    if not alone or not ordered(guider) or guider.model_options.get("disable_cfg1_optimization", False):
        return
    for spec in specs:
        if spec.how.stage == "guidance" and not spec.idle:
            raise spec.error(
                "cfg is 1: there is no guidance that could lead away from a concept. Set cfg above 1, or use an edit "
                "of the attention, such as Erase Concept (CRE)"
            )


def calc_cond_batch(
    executor: Any, model: Any, conds: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]
) -> Any:
    """Wraps the batching of some prompts: says below it who they are, and adds those that guidance asks for."""
    options = model_options.get("transformer_options", {})
    if RUN not in options:
        return executor(model, conds, x, timestep, model_options)

    def call(lists: list[Any], named: Named) -> list[torch.Tensor]:
        below = {**model_options, "transformer_options": {**options, CONDS: named}}
        return executor(model, lists, x, timestep, below)

    run, named = options[RUN], options[RUN].guiders.named(conds, len(x))
    guides = [spec for spec in options.get(EDITS, ()) if spec.how.stage == "guidance" and not spec.idle]
    if not guides:
        out = call(conds, named)
    else:
        out = batched(run, guides, x, float(timestep.max()), conds, window_of(options), call)
    run.account.predicted(named.names, out)
    return out


class Restart(Exception):
    """Ends a sampler's work, for it to begin again."""


def sampler_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps the sampler: begins again from the same noise as often as gates open for more images."""
    while True:
        try:
            out = executor(*args, **kwargs)
            look_again(args, out)
            return out
        except Restart:
            begin_anew(args)


def look_again(args: Sequence[Any], latents: torch.Tensor) -> None:
    """Shows what a sampler of these arguments made to the gates that look at the finished picture too."""
    guider, _, extra = args[:3]
    options = extra["model_options"].get("transformer_options", {})
    run = options.get(RUN)
    specs = [] if run is None else [spec for spec in options.get(EDITS, ()) if run.asks_again(spec)]
    if specs and run.judge(specs, run.account.schedule[-1], lambda flight: look_at(guider, latents, flight.look)):
        raise Restart


def begin_anew(args: Sequence[Any]) -> None:
    """Forget what was counted and cached in the steps that are done again.

    The host's EasyCache and LazyCache begin anew with a run, outside of the sampler: its arguments are
    (guider, sigmas, extra_args, ..).
    """
    guider, _, extra = args[:3]
    options = extra["model_options"]["transformer_options"]
    options[RUN].account.clear()
    options[RUN].momenta.clear()
    cache = options.get("easycache")
    if cache is not None:
        sampling = guider.model_patcher.get_model_object("model_sampling")
        vars(cache).update(vars(cache.clone().prepare_timesteps(sampling)))


def predict_noise(executor: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wraps one guided prediction of the clean image: counts a step, and the gates that are due look at it."""
    guider = executor.class_obj
    options = guider.model_options.get("transformer_options", {})
    run, specs = options.get(RUN), options.get(EDITS, ())
    if run is None or not specs:
        return executor(x, timestep, *args, **kwargs)
    sigma = float(timestep.max())  # the model is called next and looks at it as well: nobody waits longer for it
    denoised = executor(x, timestep, *args, **kwargs)
    first = not any(entry.due for entry in run.account.entries.values())
    run.due(specs, sigma)
    run.account.guided_to(denoised, sigma)
    if first and not run.account.calls:
        complain(run, guider)
    due = [spec for spec in specs if run.asks(spec, sigma)]
    if due and run.judge(due, sigma, lambda flight: look_at(guider, denoised, flight.look)):
        raise Restart
    return denoised


def look_at(guider: Any, latents: torch.Tensor, look: Callable[[torch.Tensor, Any], list[float]]) -> list[float]:
    """What `look` makes of clean images [B, C, h, w], as the model has them, in the middle of a sampling run."""
    scores = look(guider.inner_model.process_latent_out(latents.float()), guider.inner_model.latent_format)
    load_models_gpu([guider.model_patcher, *guider.loaded_models])  # what looked may have pushed them off the device
    return scores


def start_run(backbone: Backbone, sampling: Any, specs: Sequence[EditSpec]) -> Run:
    """Complains before the first step if one of the edits does not suit the model."""
    run = Run(backbone, sampling.percent_to_sigma)
    for spec in specs:
        run.window(spec)
    return run


def apply_model(executor: Any, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wraps one model call: installs the edits that are active at its noise level."""
    arguments = list(args)
    holder, key = options_among(arguments, kwargs)
    options = holder[key]
    specs, watch = not_of_guidance(options), options.get(WATCH)
    if watch is None and all(spec.idle for spec in specs):
        return executor(x, t, *arguments, **kwargs)

    model = executor.class_obj
    with ExitStack() as stack:
        run = options.get(RUN)
        if run is None:  # an edit that only a hooked conditioning brings has no run around it
            backbone = backbone_of(model.diffusion_model, type(model).__name__, specs[0].node)
            run = stack.enter_context(closing(start_run(backbone, model.model_sampling, specs)))
        else:
            run = run.beside(model)
        options = holder[key] = {**options, CALL: None}
        served = served_by(run, options, len(x), specs or [watch])
        run.account.called(served)
        if not any(served.edited) and all(spec.rows == ROWS[0] for spec in specs):
            return executor(x, t, *arguments, **kwargs)
        place = weights_of(model), x.device, model.manual_cast_dtype or model.get_dtype()

        def look(first: Watch) -> None:
            """One more model call, of the unedited model, whose result nobody needs."""
            holder[key] = run.install(options, run.plan((), *place), served, first)
            call = holder[key][CALL]
            given = [unused(value) for value in arguments], {name: unused(value) for name, value in kwargs.items()}
            run.backbone.prepare(run, call, ModelCall.of(x, t, *given), executor).through(executor)

        sigma = float(options.get("sigmas", t).max())  # the one look at the device per call
        active = run.decide(run.active(specs, sigma), served.images, served.window, look)
        holder[key] = options
        if active or watch:
            plan = run.plan(active, *place)
            if active:
                plan.rows(served, len(x))  # found now: what torch.compile finds new at a later step, it compiles
            holder[key] = run.install(options, plan, served, watch)
        if not active and not watch:
            return executor(x, t, *arguments, **kwargs)
        call = holder[key][CALL]
        made = repooled(call, ModelCall.of(x, t, arguments, kwargs))
        made = run.backbone.prepare(run, call, made, executor)
        out = made.through(executor)
        if active:
            run.account.acted(call, run.origin, sigma)
        return out


def repooled(call: Call, made: ModelCall) -> ModelCall:
    """A model call with the pooled text as the edits make it, of a model that is told one."""
    y = made.more.get("y")
    rows = call.plan.rows(call.served, len(made.x)) if call.plan.pooled and y is not None else None
    if y is None or rows is None:
        return made
    return replace(made, more={**made.more, "y": call.plan.repooled(y, rows)})


def not_of_guidance(options: dict[str, Any]) -> list[EditSpec]:
    """The edits that act within a model call."""
    specs = options.get(EDITS, ())
    for spec in specs:
        if spec.how.stage == "guidance" and RUN not in options and not spec.idle:
            raise spec.error("guidance needs the edit on the MODEL, not on a conditioning")
    return [spec for spec in specs if spec.how.stage != "guidance"]


def served_by(run: Run, options: dict[str, Any], batch: int, who: Sequence[Any]) -> Served:
    """What the batch of a model call is; raises in the name of the first of `who` if nobody can tell."""
    parts = tuple(options.get("cond_or_uncond") or (0,))
    try:
        names = run.guiders.of_parts(parts, options) if run.guiders.guiders else ("positive",) * len(parts)
        images = images_of(options, options.get(CONDS), batch, len(parts))
        tiles = tiles_of(batch, len(parts), images, run.guiders.options.get("model_function_wrapper"))
    except ValueError as error:
        raise ValueError(f"{who[0].node}: {error}") from None
    edited = tuple(map(positive, names))
    return run.same(Served(parts, names, edited, images, tiles, window_of(options), *patches_of(options)))


def unused(argument: Any) -> Any:
    """A copy of what a model call uses up: it pops a ControlNet's outputs from their lists."""
    if not isinstance(argument, dict):
        return argument
    return {key: list(value) if isinstance(value, list) else value for key, value in argument.items()}


def options_among(args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Where a model call has its transformer_options: the host passes them by position, behind everything else."""
    if "transformer_options" not in kwargs:
        for i in reversed(range(len(args))):
            if isinstance(args[i], dict):
                return args, i
    kwargs.setdefault("transformer_options", {})
    return kwargs, "transformer_options"


def weights_of(model: Any) -> Hashable:
    """Changes when the weights do: keys and values made with other weights are not to be used again."""
    patcher = model.current_patcher
    if patcher is None:
        return None
    hooks = patcher.current_hooks.hooks if patcher.current_hooks is not None else ()
    return patcher.patches_uuid, tuple((hook.hook_ref, hook.strength) for hook in hooks)


class Witness(Shared):
    """A patch that does nothing but see that the MODEL's edits are there where its patches are.

    Packs that put one MODEL's patches into another (ComfyUI-bleh's ModelPatchConditional) copy the kinds that they
    know, these among them, and nothing else.
    """

    def __init__(self, specs: Sequence[EditSpec]) -> None:
        self.live = [spec for spec in specs if not spec.idle]

    def __call__(self, given: Any, options: dict[str, Any] | None = None) -> Any:
        """As a patch of a block it gets that block's input [B, C, h, w] and transformer_options; behind the guidance
        all that the host says of it in one dict. Within a compiled network only the latter is asked."""
        if torch.compiler.is_compiling():
            return given
        if options is None:
            given, options = given["denoised"], given["model_options"].get("transformer_options", {})
        runs = [run for _, run in AWAKE] + ([options[RUN]] if RUN in options else [])
        by_hand = CALL in options and RUN not in options  # a model call with the edits, and no run around it
        for spec in self.live:
            if not by_hand and not any(spec in run.carried for run in runs):  # else the account will tell
                raise spec.error(
                    "the edit was not applied: another node (such as ModelPatchConditional) took the patches of its "
                    "MODEL over into another one, and left the edit behind; put the edit behind that node, and give it "
                    "a window of its own"
                )
        return given


BLOCK = "input_block_patch"  # of the Witness: called in every pass of a UNet, whatever its attentions do
GUIDED = "sampler_post_cfg_function"  # and of every model, once a step
REMEMBERED = 64
AWAKE: list[tuple[ModelPatcher, Run]] = []  # what is being sampled with the engine in it, the outermost first
VERDICTS: dict[tuple[str, str], tuple[float, ...]] = {}  # of in-flight gates, by the latents that their run made

CALLBACKS = {CallbacksMP.ON_CLONE: cloned, CallbacksMP.ON_PRE_RUN: pre_run, CallbacksMP.ON_LOAD: loaded}
WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: outer_sample,
    WrappersMP.SAMPLER_SAMPLE: sampler_sample,
    WrappersMP.PREDICT_NOISE: predict_noise,
    WrappersMP.CALC_COND_BATCH: calc_cond_batch,
    WrappersMP.APPLY_MODEL: apply_model,
}
