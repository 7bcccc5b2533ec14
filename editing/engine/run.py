"""One sampling run's edits: which are active at a model call, and the patches that apply them.

Pure torch: what it needs of the host comes in as functions and modules (binding.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..edits.blocks import BlockKey, select_blocks
from ..edits.spec import Concept, EditSpec, Gate, InFlight, Shared, opened
from ..methods.cre import CREOptions
from ..methods.eiup import EIUPOptions
from .plan import Plan, Rows, Window, put
from .watch import Watch

EDITS = "concept_guard"  # in transformer_options: the list of specs
OBSERVER = "concept_guard_observer"  # there too, optional: called with A, At, A0 of every projection
WATCH = "concept_guard_watch"  # there too, optional: a Watch that sees every model call
CALL = "concept_guard_call"  # there too, only below a model call: what its patches need
PLANS = 4  # kept at once: cond groups with different weights (LoRA hooks) take turns within a step

Patch = Callable[..., Tensor]


@dataclass
class Call(Shared):
    """What one model call's patches share."""

    plan: Plan
    previous: Mapping[Any, Patch]  # other packs' replacements of a cross-attention, by block
    watch: Watch | None = None
    watched: Collection[BlockKey] = ()


@dataclass(frozen=True)
class Backbone:
    """What the engine knows about a model: its cross-attentions' transformer blocks and the context width they read."""

    name: str
    width: int
    blocks: Mapping[BlockKey, Any]
    fingerprint: str = ""  # the same for models that differ in their weights alone

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(".".join(map(str, key)) for key in self.blocks)

    def admit(self, spec: EditSpec) -> None:
        """Raise, naming the node and the mend, if `spec` cannot edit this model."""
        learned_on = getattr(spec.source, "backbone", "")
        if spec.source.width != self.width:
            kind = type(spec.source).__name__.lower()
            if learned_on:
                raise spec.error(
                    f'{kind} "{spec.source.name}" was learned for {learned_on.split()[0]}, text width '
                    f"{spec.source.width}; {self.name} has text width {self.width}. Choose one that was learned on "
                    "this kind of model"
                )
            raise spec.error(
                f'{kind} "{spec.source.name}" was made with a text encoder of width {spec.source.width}, but '
                f"{self.name} reads one of width {self.width}; make the {kind} with the CLIP that belongs to this model"
            )
        compared = spec.options is not None and spec.options.baseline == "neutral"
        if compared and isinstance(spec.source, Concept) and spec.source.baseline is None:
            without = 'baseline to "none"' if isinstance(spec.options, CREOptions) else "another evidence"
            raise spec.error(
                f'concept "{spec.source.name}" has nothing neutral to be compared with; connect a CLIPTextEncode '
                f"with ordinary words, or none, to its `neutral` input, or set {without}"
            )
        auto = spec.options.auto if isinstance(spec.options, EIUPOptions) else None
        if auto is not None and auto.blocks != self.block_names:
            raise spec.error(
                f'auto: "{auto.name}" was trained on another model, of {len(auto.blocks)} cross-attentions from '
                f"{auto.blocks[0]} to {auto.blocks[-1]}; {self.name} has {len(self.blocks)}. Choose a file that was "
                "trained on this model, or set auto to off"
            )
        if learned_on and self.fingerprint and learned_on != self.fingerprint:
            logging.warning(
                '%s: "%s" was learned on another kind of model (%s) than %s (%s); look at what it does',
                spec.node,
                spec.source.name,
                learned_on,
                self.name,
                self.fingerprint,
            )
        try:
            select_blocks(spec.blocks, self.blocks)
        except ValueError as error:
            raise spec.error(str(error)) from None


class Run(Shared):
    """Lives from the start of a sampling run to its end; everything it computed goes with `close`."""

    def __init__(self, backbone: Backbone, percent_to_sigma: Callable[[float], float], attention: Patch) -> None:
        self.backbone = backbone
        self.percent_to_sigma = percent_to_sigma
        self.attention = attention
        # Made once: torch.compile takes a new function for new code.
        self.replacements = {key: partial(self._cross_attention, key) for key in backbone.blocks}
        self.context_patch = self._context
        self.windows: dict[EditSpec, tuple[float, float]] = {}
        self.plans: dict[Hashable, Plan] = {}
        self.decided: dict[tuple[EditSpec, int, Window], tuple[EditSpec, ...]] = {}
        self.verdicts: dict[str, tuple[float, ...]] = {}  # of gates that decide in mid-run, one value an image
        self.gated: dict[EditSpec, EditSpec] = {}  # the edits behind them, as decided
        self.carried: frozenset[EditSpec] = frozenset()  # by the MODEL; others come with a conditioning

    def close(self) -> None:
        self.plans.clear()
        self.windows.clear()
        self.decided.clear()
        self.verdicts.clear()
        self.gated.clear()
        self.replacements.clear()

    def window(self, spec: EditSpec) -> tuple[float, float]:
        """The noise levels of its percents, (start, end), and the first look at an edit that arrives in mid-run."""
        if spec not in self.windows:
            self.backbone.admit(spec)
            start, end = self.percent_to_sigma(spec.start_percent), self.percent_to_sigma(spec.end_percent)
            self.windows[spec] = (start, end)
        return self.windows[spec]

    def active(self, specs: Sequence[EditSpec], sigma: float) -> tuple[EditSpec, ...]:
        """The edits at noise level sigma, in their fixed order."""
        windows = [(spec, *self.window(spec)) for spec in map(self.behind_gate, specs) if spec and not spec.idle]
        within = [spec for spec, start, end in windows if end < sigma <= start]
        return tuple(sorted(within, key=lambda spec: spec.order))

    def behind_gate(self, spec: EditSpec) -> EditSpec | None:
        """The edit as the gate that decides in mid-run lets it through; None before it has decided."""
        flight = spec.gate.inflight
        if flight is None or spec in self.gated:
            return self.gated.get(spec, spec)
        if spec not in self.carried:
            raise spec.error("a gate that decides in flight needs the edit on the MODEL, not on a conditioning")
        if (verdict := self.verdicts.get(flight.id)) is None:
            return None
        try:
            self.gated[spec] = replace(spec, gate=spec.gate.decided(verdict))
        except ValueError as error:
            raise spec.error(str(error)) from None
        return self.gated[spec]

    def judge(self, specs: Sequence[EditSpec], sigma: float, look: Callable[[InFlight], list[float]]) -> bool:
        """Ask the gates that are due after a model call at noise level sigma; `look` shows them the clean images.

        Whether the run should begin again: an image is flagged, and an edit should have acted on it by now.
        """
        restart, now = False, {}
        for spec in specs:
            flight = spec.gate.inflight
            if flight is None or spec.idle or sigma > self.percent_to_sigma(flight.at_percent):
                continue
            if flight.id not in self.verdicts:
                try:
                    scores = look(flight)
                    self.verdicts[flight.id] = now[flight.id] = opened(scores, flight.threshold, flight.soft)
                except ValueError as error:
                    raise spec.error(str(error)) from error
                if flight.report:
                    flight.report(scores, now[flight.id])
            restart |= flight.restart and any(now.get(flight.id, ())) and sigma <= self.window(spec)[0]
        return restart

    def decide(
        self, specs: Sequence[EditSpec], images: int, window: Window, look: Callable[[Watch], None]
    ) -> tuple[EditSpec, ...]:
        """The edits with their automatic weights, found once a run for the images of a model call.

        `look` lets a Watch see an unedited model call.
        """
        out: list[EditSpec] = []
        for spec in specs:
            if not isinstance(spec.options, EIUPOptions) or spec.options.auto is None:
                out.append(spec)
                continue
            if (spec, images, window) not in self.decided:
                watch = Watch(replace(spec, blocks="all"))
                look(watch)
                w = spec.options.auto.weights(watch.features(self.backbone.blocks))
                self.decided[spec, images, window] = tuple(with_weights(spec, w, window))
            out += self.decided[spec, images, window]
        return tuple(sorted((spec for spec in out if not spec.idle), key=lambda spec: spec.order))

    def plan(self, specs: tuple[EditSpec, ...], weights: Hashable, device: torch.device, dtype: torch.dtype) -> Plan:
        key = (tuple(spec.key for spec in specs), weights, device, dtype)
        if key not in self.plans:
            if len(self.plans) >= PLANS:
                self.plans.clear()
            self.plans[key] = Plan(specs, self.backbone.blocks, device, dtype)
        return self.plans[key]

    def install(self, options: dict[str, Any], plan: Plan, watch: Watch | None = None) -> dict[str, Any]:
        """A copy of a model call's transformer_options with the plan's edits behind all that is there already.

        `watch` looks at every cross-attention that its blocks name, edited or not.
        """
        watched = () if watch is None else select_blocks(watch.spec.blocks, self.backbone.blocks)
        patches = dict(options.get("patches", {}))
        slots = dict(options.get("patches_replace", {}))
        attn2 = slots["attn2"] = dict(slots.get("attn2", {}))
        previous = {}
        for key in (key for key in self.backbone.blocks if key in plan.blocks or key in watched):
            if (before := attn2.get(key, attn2.get(key[:2]))) is not None:  # the host's precedence
                previous[key] = before
            attn2[key] = self.replacements[key]
        if plan.directions:
            patches["attn2_patch"] = [*patches.get("attn2_patch", ()), self.context_patch]
        # Emptied, so that a wrapper registered twice (by the MODEL and by a hook) edits once.
        edits: dict[str, Any] = {EDITS: [], WATCH: None, CALL: Call(plan, previous, watch, watched)}
        return {**options, "patches": patches, "patches_replace": slots, **edits}

    def _cross_attention(self, key: BlockKey, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        """An `attn2` replacement. q: [B, N, C]; k, v: [B, L, C]; returns [B, N, C], before `to_out`."""
        call: Call = extra[CALL]
        before = call.previous.get(key)
        A = self.attention(q, k, v, extra) if before is None else before(q, k, v, extra)
        if call.watch is not None and key in call.watched:
            attn = self.backbone.blocks[key].attn2
            call.watch.see(key, attn, A, q, k, chunks_of(extra), extra["activations_shape"])
        rows = call.plan.rows(chunks_of(extra), q.shape[0], window_of(extra)) if key in call.plan.blocks else None
        if rows is None:
            return A
        i = rows.index
        observe = extra.get(OBSERVER)
        observer = observe and partial(observe, block=key, specs=call.plan.specs)
        edited = call.plan.blocks[key].apply(A[i], q[i], k[i], v[i], rows.s, before is not None, observer)
        return put(A, i, edited)

    def _context(
        self, n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """An `attn2_patch`: the text that keys and values are made of. context, value: [B, L, W]."""
        call: Call = extra[CALL]
        rows: Rows | None = call.plan.rows(chunks_of(extra), context.shape[0], window_of(extra))
        if rows is None:
            return n, context, value
        key = (*extra["block"], extra.get("block_index", 0))
        shifted = call.plan.shift(context, key, rows)
        return n, shifted, shifted if value is context else call.plan.shift(value, key, rows)


def with_weights(spec: EditSpec, w: Tensor, window: Window) -> Iterator[EditSpec]:
    """An erasure with the weights that its regressor found, as one edit a phrase. w: [P, images].

    A gate has a value for each image already; here it carries the weight as well.
    """
    concept, options = spec.source, spec.options
    assert isinstance(concept, Concept) and isinstance(options, EIUPOptions)
    try:
        gates = spec.gate.per_image(w.shape[1], window)
    except ValueError as error:
        raise spec.error(str(error)) from None
    images = window or tuple(range(w.shape[1]))
    for p, phrase in enumerate(concept.phrases):
        found = {i: -options.weight(p) * w_i * gate for i, w_i, gate in zip(images, w[p].tolist(), gates, strict=True)}
        values = tuple(found.get(i, 0.0) for i in range(max(images) + 1))
        one = replace(options, weights=(1.0,), auto=None)
        yield replace(spec, source=replace(concept, phrases=(phrase,)), gate=Gate(values), options=one)


def window_of(extra: Mapping[str, Any]) -> Window:
    """The images that a context window shows, the host's or AnimateDiff-Evolved's; None when all are shown."""
    window = extra.get("context_window")
    if window is not None and window.dim == 0:
        return tuple(window.index_list)
    shown = (extra.get("ad_params") or {}).get("sub_idxs")
    return tuple(shown) if shown else None


def chunks_of(extra: Mapping[str, Any]) -> Sequence[int]:
    """Which cond each equal part of the batch serves. Attention Couple enlarges the batch in a block, and says how."""
    for name in ("cond_or_uncond_couple", "cond_or_uncond_hook_couple", "cond_or_uncond"):
        if extra.get(name):
            return extra[name]
    return (0,)
