"""One sampling run's edits: which are active at a model call, and the patches that apply them.

Pure torch: what it needs of the host comes in as functions and modules (binding.py).

Noise levels (sigma) are in units of the clean latent (of a model of flows, from 0 to 1).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..edits.blocks import BlockKey
from ..edits.spec import EditSpec, InFlight, Shared, opened
from .account import Account, Noted
from .backbone import Backbone, backbone_of
from .conds import Guiders
from .plan import Plan, Text
from .rows import Rows, Served, Window, couple_of, put
from .streams import Streams
from .watch import Watch

EDITS = "concept_guard"  # in transformer_options: the list of specs
OBSERVER = "concept_guard_observer"  # there too, optional: called with A, At, A0 of every projection
WATCH = "concept_guard_watch"  # there too, optional: a Watch that sees every model call
CALL = "concept_guard_call"  # there too, only below a model call: what its patches need
PLANS = 4  # kept at once: cond groups with different weights (LoRA hooks) take turns within a step

Attention = Callable[..., Tensor]


@dataclass
class Call(Shared):
    """What one model call's patches share."""

    plan: Plan
    served: Served
    watch: Watch | None = None
    watched: Collection[BlockKey] = ()
    previous: Mapping[Any, Attention] = field(default_factory=dict)  # other packs' replacements of an attention
    streams: Streams | None = None  # where a backbone needs them
    seen: Streams | None = None  # the watch's
    place: Any = None  # of its tokens, for such a backbone
    # For the account: the attentions whose output was edited, whose text was, and where something was found.
    reached: dict[BlockKey, None] = field(default_factory=dict)
    read: dict[BlockKey, None] = field(default_factory=dict)
    noted: list[Noted] = field(default_factory=list)

    @property
    def who(self) -> str:
        """The node that asks, for errors."""
        return self.plan.specs[0].node if self.plan.specs or self.watch is None else self.watch.node

    def note(self, rows: Rows, shape: Sequence[int], owner: Sequence[int], found: Tensor) -> None:
        """Put down what was found, [K, R, N] or by head [K, R, N, H, 1]. shape: the picture's there, [B, C, h, w]."""
        self.noted.append(Noted((shape[-2], shape[-1], self.served.tiles), rows, owner, found))

    def reaches(self, key: BlockKey) -> bool:
        return key in self.plan.sets or key in self.watched


class Run(Shared):
    """Lives from the start of a sampling run to its end; everything it computed goes with `close`."""

    def __init__(self, backbone: Backbone, percent_to_sigma: Callable[[float], float]) -> None:
        self.backbone = backbone
        self.percent_to_sigma = percent_to_sigma
        self.hooks = backbone.hooks(self)
        self.guiders = Guiders()  # none where only a hooked conditioning brings the edits
        self.windows: dict[EditSpec, tuple[float, float]] = {}
        self.plans: dict[Hashable, Plan] = {}
        self.batches: dict[Served, Served] = {}
        self.decided: dict[tuple[EditSpec, int, Window], tuple[EditSpec, ...]] = {}
        self.verdicts: dict[str, tuple[float, ...]] = {}  # of gates that decide in mid-run, one value an image
        self.gated: dict[EditSpec, EditSpec] = {}  # the edits behind them, as decided
        self.carried: frozenset[EditSpec] = frozenset()  # by the MODEL; others come with a conditioning
        self.origin: dict[EditSpec, EditSpec] = {}  # of an edit that a gate or a first look changed
        self.account = Account((), backbone, ())
        self.momenta: dict[Hashable, Any] = {}  # what edits of guidance keep from step to step
        self.model: Any = None
        self.others: dict[Any, Run] = {}
        self.before: Mapping[str, tuple[float, ...]] = {}

    def begin(
        self,
        specs: Sequence[EditSpec],
        schedule: Sequence[float],
        model: Any,
        before: Mapping[str, tuple[float, ...]],
    ) -> None:
        """A sampling run of a MODEL that carries these edits. schedule: the noise levels of its steps; before: what
        in-flight gates decided in the run that this one goes on with."""
        windows = {spec: self.window(spec) for spec in specs if not spec.idle}
        self.account = Account(specs, self.backbone, schedule, windows, lambda: self.ends(schedule))
        self.carried, self.model, self.before = frozenset(specs), model, before
        for spec in specs:
            if spec.gate.inflight is not None and not spec.idle:
                self.moment(spec)

    def beside(self, model: Any) -> Run:
        """The run of the host's BaseModel that is called: guiders may call another one with the same options."""
        if self.model is None or model is self.model:
            return self
        if model not in self.others:
            backbone = backbone_of(model.diffusion_model, type(model).__name__, next(iter(self.carried)).node)
            other = self.others[model] = Run(backbone, model.model_sampling.percent_to_sigma)
            other.model, other.guiders, other.carried, other.before = model, self.guiders, self.carried, self.before
            other.verdicts, other.gated, other.origin = self.verdicts, self.gated, self.origin
            other.account = self.account
        return self.others[model]

    def close(self) -> None:
        for other in self.others.values():
            other.close()
        self.others.clear()
        self.plans.clear()
        self.windows.clear()
        self.decided.clear()
        self.verdicts.clear()
        self.gated.clear()
        self.momenta.clear()
        del self.hooks  # they hold the run
        self.guiders, self.model = Guiders(), None  # they hold the MODEL

    def ends(self, schedule: Sequence[float]) -> tuple[float, float]:
        """The percents of the first and the last step. schedule: the steps' noise levels, and where the run ends."""
        return percent_at(schedule[0], self.percent_to_sigma), percent_at(schedule[-2], self.percent_to_sigma)

    def window(self, spec: EditSpec) -> tuple[float, float]:
        """The noise levels of its percents, (start, end), and the first look at an edit that arrives in mid-run."""
        if spec not in self.windows:
            self.backbone.admit(spec)
            start, end = map(self.percent_to_sigma, spec.how.window(spec))
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
        if (verdict := self.verdicts.get(flight.id, self.before.get(flight.id))) is None:
            return None
        try:
            self.gated[spec] = replace(spec, gate=spec.gate.decided(verdict))
        except ValueError as error:
            raise spec.error(str(error)) from None
        self.origin[self.gated[spec]] = spec
        return self.gated[spec]

    def asks(self, spec: EditSpec, sigma: float) -> bool:
        """Whether its gate is to decide behind a model call at noise level sigma."""
        flight = spec.gate.inflight
        waits = flight is not None and not spec.idle and flight.id not in self.verdicts
        return waits and sigma <= self.moment(spec) * (1 + 1e-5)

    def asks_again(self, spec: EditSpec) -> bool:
        """Whether its gate is shown the finished picture as well: with a restart, for what took shape later, and for
        what an edit left."""
        flight = spec.gate.inflight
        ends = bool(self.account.schedule) and self.account.end == 0
        return ends and flight is not None and flight.restart and not spec.idle

    def judge(self, specs: Sequence[EditSpec], sigma: float, look: Callable[[InFlight], list[float]]) -> bool:
        """Ask these edits' gates at noise level sigma; `look` shows them the clean images.

        Whether the run should begin again: an image is flagged, and an edit should have acted on it by now.
        """
        restart, now = False, {}
        for spec in specs:
            flight = spec.gate.inflight
            assert flight is not None
            if flight.id not in now:
                first, now[flight.id] = flight.id not in self.verdicts, self._verdict(spec, flight, sigma, look)
                if first or any(now[flight.id]):  # open by what was decided before
                    for other in [x for x in self.gated if x.gate.inflight and x.gate.inflight.id == flight.id]:
                        del self.gated[other]
            restart |= flight.restart and any(now[flight.id]) and sigma <= self.window(spec)[0]
        return restart

    def _verdict(
        self, spec: EditSpec, flight: InFlight, sigma: float, look: Callable[[InFlight], list[float]]
    ) -> tuple[bool, ...]:
        """Ask a gate; which images it has flagged that were not flagged before. Asked again, at the end, it opens
        for those as well; what it sees there of the others is for the account to tell."""
        again = flight.id in self.verdicts
        try:
            scores = look(flight)
            verdict = opened(scores, flight.threshold, flight.soft)
        except ValueError as error:
            raise spec.error(str(error)) from error
        before = self.verdicts.get(flight.id, self.before.get(flight.id, ()))
        before = before if len(before) == len(verdict) else (0.0,) * len(verdict)
        fresh = tuple(bool(new) and not old for new, old in zip(verdict, before, strict=True))
        if again:
            self.account.gate(flight.id, finished=list(scores), left=[bool(value) for value in verdict])
            if not any(fresh):
                if any(verdict) and flight.report:
                    flight.report(scores, verdict, True)
                return fresh
        found = tuple(old or new if again else max(old, new) for old, new in zip(before, verdict, strict=True))
        self.verdicts[flight.id] = found
        if flight.report:
            flight.report(scores, found, False)
        self.account.gate(
            flight.id,
            at_percent=flight.at_percent,
            step=self.account.step(sigma) + 1,
            scores=[round(score, 4) for score in scores],
            opens=list(found),
            restarts=flight.restart and any(fresh),
        )
        return fresh

    def moment(self, spec: EditSpec) -> float:
        """The noise level from which on its gate decides: at its percent, but while there is still something to do.

        With a restart that is after the last step at the latest; without one a step of the edit's window must follow.
        """
        flight = spec.gate.inflight
        assert flight is not None
        at, steps = self.percent_to_sigma(flight.at_percent), self.account.schedule
        if not steps or flight.restart:
            return max([at, *steps[-1:]])
        start, end = self.window(spec)
        within = [i for i, sigma in enumerate(steps) if end < sigma <= start]
        if within == [0] and not any(self.before.get(flight.id, ())):
            raise spec.error(
                "its gate decides after a step, and no further step of this run lies within the edit's window; turn on "
                "the gate's restart, or take more steps"
            )
        return max(at, steps[within[-1] - 1]) if within and within[-1] else at

    def due(self, specs: Sequence[EditSpec], sigma: float) -> None:
        """Put down for the account that the edits within their window are to act at noise level sigma."""
        active = [spec for spec in self.active(specs, sigma) if not self.settled_away(spec)]
        self.account.due([self.origin.get(spec, spec) for spec in active], sigma)

    def settled_away(self, spec: EditSpec) -> bool:
        """Whether its first look found that there is nothing to do."""
        outcomes = [out for (which, *_), out in self.decided.items() if which is spec]
        return bool(outcomes) and all(each.idle for out in outcomes for each in out)

    def decide(
        self, specs: Sequence[EditSpec], images: int, window: Window, look: Callable[[Watch], None]
    ) -> tuple[EditSpec, ...]:
        """The edits as they come to be after their first look, taken once a run for the images of a model call.

        `look` lets a Watch see an unedited model call.
        """
        out: list[EditSpec] = []
        for spec in specs:
            if (evidence := spec.how.first_look(spec)) is None:
                out.append(spec)
                continue
            if (spec, images, window) not in self.decided:
                watch = Watch(spec.source, spec.node, evidence=evidence)
                look(watch)
                settled = spec.how.settled(spec, watch, self.backbone.blocks, window or range(images))
                self.decided[spec, images, window] = tuple(settled)
                self.origin.update(dict.fromkeys(settled, self.origin.get(spec, spec)))
            out += self.decided[spec, images, window]
        return tuple(sorted((spec for spec in out if not spec.idle), key=lambda spec: spec.order))

    def same(self, served: Served) -> Served:
        """The one of its kind: torch.compile takes another object for something new."""
        return self.batches.setdefault(served, served)

    def plan(self, specs: tuple[EditSpec, ...], weights: Hashable, device: torch.device, dtype: torch.dtype) -> Plan:
        key = (tuple(spec.key for spec in specs), weights, device, dtype)
        if key not in self.plans:
            if len(self.plans) >= PLANS:
                self.plans.clear()
            self.plans[key] = Plan(specs, self.backbone, device, dtype)
        return self.plans[key]

    def install(
        self, options: dict[str, Any], plan: Plan, served: Served, watch: Watch | None = None
    ) -> dict[str, Any]:
        """A copy of a model call's transformer_options with the plan's edits behind all that is there already.

        `watch` looks at every attention that its blocks name, edited or not.
        """
        call = Call(plan, served, watch, () if watch is None else watch.admitted(self.backbone))
        # Emptied, so that a wrapper registered twice (by the MODEL and by a hook) edits once.
        edits: dict[str, Any] = {EDITS: [], WATCH: None, CALL: call}
        return self.hooks.install({**options, **edits}, call)

    def attended(
        self, key: BlockKey, A: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], foreign: bool = False
    ) -> Tensor:
        """What an attention found in the text, as the edits leave it. A, q: [B, N, C]; k, v: [B, L, C]; returns A's.

        `foreign` says that another pack's patch made A: then it is not the attention to k and v alone.
        """
        call: Call = extra[CALL]
        couple = couple_of(extra)
        if call.watch is not None and key in call.watched:
            rows = call.served.conditional(len(q), couple)
            call.watch.see(self.backbone, key, A, q, k, rows, call.served.images, extra["activations_shape"])
        edited = call.plan.rows(call.served, len(q), couple) if key in call.plan.sets else None
        if edited is None:
            return A
        i = edited.index
        return put(A, i, self.edited(key, edited, A[i], q[i], k[i], v[i], extra, foreign)[0])

    def edited(
        self,
        key: BlockKey,
        rows: Rows,
        A: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: dict[str, Any],
        foreign: bool = False,
        text: Text | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same for the edited rows alone: A, q: [R, N, C]; k, v: [R, L, C]; returns fp32 or A's dtype, and what the
        prompt's log Z gains beside a picture, [R, N, H, 1]. text: whose tokens say a concept, if v do not; bias:
        what a mask adds to the prompt's logits, [R or 1, H or 1, N or 1, L].
        """
        call: Call = extra[CALL]
        edits = call.plan.edits(key, call.streams)
        assert edits is not None
        call.reached[key] = None
        note = partial(call.note, rows, extra.get("activations_shape") or (1, q.shape[1]))
        observe = extra.get(OBSERVER)
        observer = observe and partial(observe, block=key, specs=call.plan.specs)
        return edits.apply(A, q, k, v, rows.s, foreign, observer, note, text, bias)

    def text(self, key: BlockKey, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The text that an attention makes keys and values of, as the edits leave it. context, value: [B, L, W]."""
        call: Call = extra[CALL]
        rows = call.plan.rows(call.served, len(context), couple_of(extra))
        if rows is None:
            return context, value
        call.read[key] = None
        changed = call.plan.changed(context, key, rows)
        other = changed if value is context else call.plan.changed(value, key, rows)
        return changed, call.plan.revalued(other, key, rows)


def percent_at(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """The percent at which a noise level is reached."""
    p, q = 0.0, 1.0
    for _ in range(20):
        middle = (p + q) / 2
        p, q = (middle, q) if percent_to_sigma(middle) >= sigma else (p, middle)
    return p
