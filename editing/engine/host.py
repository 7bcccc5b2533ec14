"""The engine's one connection to the host: edits are put into a MODEL here, and come to life when it is sampled.

The edits travel as data. While sampling, a wrapper around each model call turns the active ones into patches, after
every other pack has placed its own; so neither the order of nodes nor the packs in the graph decide who comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialVideoTransformer, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_management import load_models_gpu
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..edits.blocks import BlockKey
from ..edits.digest import digest
from ..edits.spec import Direction, EditSpec, InFlight
from ..gates.features import weights_digest
from .run import EDITS, OBSERVER, WATCH, Backbone, Run, chunks_of, window_of
from .watch import Watch

FAMILIES = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}  # by the width of the text
NOTHING = Direction("nothing", torch.zeros(1, 1))
RUN = "concept_guard_run"  # in the transformer_options of one sampling run


def add_edit(model: ModelPatcher, spec: EditSpec) -> ModelPatcher:
    """A clone of `model` with one more edit; raises if the model cannot be edited so."""
    model = admitted(model, spec)
    options = model.model_options["transformer_options"]
    options[EDITS] = [*options.get(EDITS, ()), spec]
    if spec.gate.inflight:
        loaded = model.get_additional_models_with_key(EDITS)
        more = [each for each in spec.gate.inflight.models if not any(each.is_clone(known) for known in loaded)]
        model.set_additional_models(EDITS, [*loaded, *more])
    return model


def add_watch(model: ModelPatcher, watch: Watch) -> ModelPatcher:
    """A clone of `model` whose model calls `watch` will see."""
    model = admitted(model, watch.spec)
    model.model_options["transformer_options"][WATCH] = watch
    return model


def admitted(model: ModelPatcher, spec: EditSpec) -> ModelPatcher:
    """A clone that the engine will wake up with; raises if `spec` does not suit the model."""
    backbone_of(model.get_model_object("diffusion_model"), type(model.model).__name__, spec).admit(spec)
    model = model.clone()
    for kind, wrapper in WRAPPERS.items():
        if not model.get_wrappers(kind, EDITS):
            model.add_wrapper_with_key(kind, EDITS, wrapper)
    return model


def edits_of(model: ModelPatcher) -> tuple[EditSpec, ...]:
    """The edits that a MODEL carries."""
    return tuple(model.model_options["transformer_options"].get(EDITS, ()))


def settled(model: ModelPatcher) -> str | None:
    """The same text for the same MODEL, also in another session; None where other packs have a part in it.

    Edits are not counted: `edits_of` gives them.
    """
    options = model.model_options
    known = {EDITS, OBSERVER, WATCH, "wrappers"}
    foreign = set(options["transformer_options"]) - known or set(options) - {"transformer_options"}
    foreign = foreign or {key for kind in model.wrappers.values() for key in kind if key != EDITS and kind[key]}
    held = (model.object_patches, model.callbacks, model.hook_patches, model.forced_hooks, model.weight_wrapper_patches)
    if foreign or model.patches or any(map(holds, held)):
        return None
    return weights_digest(model.model.state_dict())


def holds(held: Any) -> bool:
    """Whether nested dicts hold anything."""
    return any(map(holds, held.values())) if isinstance(held, dict) else bool(held)


def hook_options(spec: EditSpec) -> dict[str, Any]:
    """The same edit for one conditioning only: what a TransformerOptionsHook takes.

    Where no MODEL brings an edit as well there is no run around it, and an automatic weight is found at every call.
    """
    return {EDITS: [spec], "wrappers": {kind: {EDITS: [wrapper]} for kind, wrapper in WRAPPERS.items()}}


def backbone_of(unet: torch.nn.Module, model_name: str, spec: EditSpec) -> Backbone:
    """The model as the engine sees it; `spec` is who asks, and is named if the model cannot be edited."""
    unet = getattr(unet, "_orig_mod", unet)  # compiled
    blocks = cross_attentions(unet) if isinstance(unet, UNetModel) else {}
    if not blocks:
        raise spec.error(
            f"cannot edit {model_name} ({type(unet).__name__}): ConceptGuard edits the cross-attention of SD1.x, SD2.x "
            "and SDXL models; connect one of these"
        )
    width = next(iter(blocks.values())).attn2.to_k.in_features
    return Backbone(f"{model_name} ({type(unet).__name__})", width, blocks, fingerprint(width, blocks))


def fingerprint(width: int, blocks: Mapping[BlockKey, BasicTransformerBlock]) -> str:
    """Of the family and the shapes of all that reads the text: the same for models that differ in weights alone."""
    shapes = [(key, block.attn2.to_k.in_features, block.attn2.to_k.out_features) for key, block in blocks.items()]
    return f"{FAMILIES.get(width, f'width-{width}')} {digest(shapes)[:12]}"


def fingerprint_of(model: ModelPatcher, node: str) -> str:
    """Of a MODEL; raises, in the name of `node`, for one that the engine does not know."""
    unet, probe = model.get_model_object("diffusion_model"), EditSpec("direction", NOTHING, node=node)
    return backbone_of(unet, type(model.model).__name__, probe).fingerprint


def cross_attentions(unet: UNetModel) -> dict[BlockKey, BasicTransformerBlock]:
    """The transformer blocks that read the text, by the host's keys."""
    if any(isinstance(module, SpatialVideoTransformer) for module in unet.modules()):
        return {}  # its temporal blocks share their keys with the spatial ones, and it reads an image, not a text
    middle = [] if unet.middle_block is None else [unet.middle_block]
    found = {}
    for side, blocks in (("input", unet.input_blocks), ("middle", middle), ("output", unet.output_blocks)):
        for i, block in enumerate(blocks):
            transformers = [module for module in block.modules() if isinstance(module, BasicTransformerBlock)]
            found.update({(side, i, j): t for j, t in enumerate(transformers) if t.attn2 is not None})
    return found


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
    """The host's own attention, as a block without a replacement calls it; Sage and Flash overrides still apply."""
    return optimized_attention(
        q, k, v, extra["n_heads"], attn_precision=extra.get("attn_precision"), transformer_options=extra
    )


def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps a whole sampling run: makes its Run, and frees what it computed however the run ends."""
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})
    specs = [*options.get(EDITS, ()), *(watch.spec for watch in (options.get(WATCH),) if watch)]
    if not specs or RUN in options:
        return executor(*args, **kwargs)
    patcher = guider.model_patcher
    unet, sampling = (patcher.get_model_object(name) for name in ("diffusion_model", "model_sampling"))
    with closing(start_run(unet, sampling, type(patcher.model).__name__, specs)) as run:
        options[RUN], run.carried = run, frozenset(specs)
        try:
            return executor(*args, **kwargs)
        finally:
            del options[RUN]


class Restart(Exception):
    """Ends a sampler's work, for it to begin again."""


def sampler_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps the sampler: begins again from the same noise as often as a gate, which decides once a run, asks for it."""
    while True:
        try:
            return executor(*args, **kwargs)
        except Restart:
            continue


def predict_noise(executor: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wraps one guided prediction of the clean image: the gates that are due look at it."""
    denoised = executor(x, timestep, *args, **kwargs)
    guider = executor.class_obj
    run = guider.model_options.get("transformer_options", {}).get(RUN)
    specs = () if run is None else guider.model_options["transformer_options"].get(EDITS, ())
    if all(spec.gate.inflight is None or spec.gate.inflight.id in run.verdicts for spec in specs):
        return denoised

    def look(flight: InFlight) -> list[float]:
        return look_at(guider, denoised, flight.look)

    restart = run.judge(specs, float(timestep.max()), look)
    if restart:
        raise Restart
    return denoised


def look_at(guider: Any, latents: torch.Tensor, look: Callable[[torch.Tensor, Any], list[float]]) -> list[float]:
    """What `look` makes of clean images [B, C, h, w], as the model has them, in the middle of a sampling run."""
    scores = look(guider.inner_model.process_latent_out(latents.float()), guider.inner_model.latent_format)
    load_models_gpu([guider.model_patcher, *guider.loaded_models])  # what looked may have pushed them off the device
    return scores


def start_run(unet: torch.nn.Module, sampling: Any, model_name: str, specs: Sequence[EditSpec]) -> Run:
    """Complains before the first step if one of the edits does not suit the model."""
    run = Run(backbone_of(unet, model_name, specs[0]), sampling.percent_to_sigma, attention)
    for spec in specs:
        run.window(spec)
    return run


def apply_model(executor: Any, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wraps one model call: installs the edits that are active at its noise level."""
    arguments = list(args)
    holder, key = options_among(arguments, kwargs)
    options = holder[key]
    specs, watch = options.get(EDITS, ()), options.get(WATCH)
    if (watch is None and all(spec.idle for spec in specs)) or 0 not in chunks_of(options):
        return executor(x, t, *arguments, **kwargs)

    model = executor.class_obj
    with ExitStack() as stack:
        run = options.get(RUN)
        if run is None:  # an edit that only a hooked conditioning brings has no run around it
            run = start_run(model.diffusion_model, model.model_sampling, type(model).__name__, specs)
            stack.enter_context(closing(run))
        place = weights_of(model), x.device, model.manual_cast_dtype or model.get_dtype()

        def look(first: Watch) -> None:
            """One more model call, of the unedited model, whose result nobody needs."""
            holder[key] = run.install(options, run.plan((), *place), first)
            executor(x, t, *map(unused, arguments), **{name: unused(value) for name, value in kwargs.items()})

        active = run.active(specs, float(options.get("sigmas", t).max()))  # the one look at the device per call
        chunks, window = chunks_of(options), window_of(options)
        active = run.decide(active, len(x) // len(chunks), window, look)
        holder[key] = options
        if active or watch:
            plan = run.plan(active, *place)
            plan.rows(chunks, len(x), window)  # found now: what torch.compile finds new at a later step, it compiles
            holder[key] = run.install(options, plan, watch)
        return executor(x, t, *arguments, **kwargs)


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


WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: outer_sample,
    WrappersMP.SAMPLER_SAMPLE: sampler_sample,
    WrappersMP.PREDICT_NOISE: predict_noise,
    WrappersMP.APPLY_MODEL: apply_model,
}
