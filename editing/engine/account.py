"""The account of one sampling run: what each edit reached and found, who was taken for conditional, when gates decided.

It counts while the model is called, and looks at the device only when the run has ended. Pure torch.

Noise levels (sigma, schedule) are in units of the clean latent (of a model of flows, from 0 to 1),
predictions [B, C, h, w].
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.blocks import BlockKey
from ..edits.digest import Shared
from ..edits.spec import EditSpec
from .backbone import Backbone
from .conds import positive
from .rows import Rows, Served

ACCOUNTS = "concept_guard_accounts"  # in transformer_options: an Accounts, of the runs of one MODEL
KEPT = 8  # runs of a MODEL that are remembered
UNNAMED = "unnamed"  # prompts that no guider knows
LITTLE = 0.005  # of the positions: an edit that found less found nothing
BESIDE = "; it edits what the text says: what the reference pictures show is read as it is"
FURTHER = "; noise is left for another sampler, whose MODEL needs an edit of its own"
HELD = 2**18  # numbers of what was found that wait to be added up: small models' whole run, some calls of large ones
Size = tuple[int, int, int]  # of an attention's map: height, width, and the tiles of the picture that it shows


@dataclass
class Entry:
    """One edit's part. due: the steps within its window at which its gate was open; acted: those at which it reached an
    attention; reached: the attentions; edited and seen: rows, of all model calls."""

    spec: EditSpec
    named: Sequence[BlockKey]
    due: set[int] = field(default_factory=set)
    acted: set[int] = field(default_factory=set)
    reached: dict[BlockKey, None] = field(default_factory=dict)
    installed: int = 0  # model calls
    open: int = 0  # those in which its gate lets it act on a row
    edited: int = 0
    seen: int = 0
    followed: bool = False  # whether a picture was led by the prompts that it edits
    other: str = ""  # the prompt that one followed instead, at a step at which it was due
    everywhere: bool = True  # whether it never looked where to act
    away: tuple[float, float] | None = None  # where the run's first and last step are, if none is within its window
    further: bool = False  # whether steps within its window follow in another run
    sums: dict[Size, Tensor] = field(default_factory=dict)  # [images, N], how often it acted there
    counts: dict[Size, Tensor] = field(default_factory=dict)  # [images], how often it might have

    def add(self, size: Size, images: int, image: Tensor, found: Tensor, might: Tensor) -> None:
        """found: [R, N], how often it acted at each position of its rows; might: [R], how often it might have;
        image: [R], whose row each is."""
        self.everywhere = False
        sums = self.sums.get(size, found.new_zeros(images, found.shape[-1]))
        counts = self.counts.get(size, might.new_zeros(images))
        if len(sums) < images:  # a context window shows further ones
            sums, counts = (F.pad(x, [0, 0] * (x.ndim - 1) + [0, images - len(x)]) for x in (sums, counts))
        self.sums[size], self.counts[size] = sums.index_add_(0, image, found), counts.index_add_(0, image, might)

    @property
    def found(self) -> float | None:
        """The share of the positions of its rows that it found and acted on; None: all, it does not choose."""
        counts = sum(float(n.sum()) * h * w for (h, w, _), n in self.counts.items())
        return sum(float(x.sum()) for x in self.sums.values()) / counts if counts else None

    @property
    def missed(self) -> list[BlockKey]:
        return [key for key in self.named if key not in self.reached]

    @property
    def ignored(self) -> bool:
        """Whether it acted, and no picture can show it."""
        return bool(self.acted and self.other and not self.followed)

    def heat(self, images: int, height: int, width: int) -> Tensor:
        """How often it acted where, from 0 to 1: [images, height, width]."""
        maps = []
        for (h, w, tiles), acted in self.sums.items():
            if tiles == 1:  # which tile is where, only the pack knows
                share = (acted / self.counts[h, w, tiles].clamp_min(1)[:, None]).unflatten(-1, (h, w))
                share = F.pad(share, (0, 0, 0, 0, 0, images - len(share)))
                maps.append(F.interpolate(share[None], (height, width), mode="bilinear", align_corners=False)[0])
        if maps:
            return torch.stack(maps).mean(0)
        share = float(bool(self.acted)) if self.everywhere else self.found or 0.0
        return torch.full((images, height, width), share)

    def line(self, steps: int) -> str:
        """For people, on one line."""
        spec = self.spec
        if spec.idle:
            return "off: " + ("the gate is closed" if spec.strength and not any(spec.gate.values) else "nothing to do")
        if not self.due:
            if spec.gate.inflight is not None and self.away is None:
                return "did not act: its gate flagged no image"
            said = f"did not act: none of {steps} steps lies between {spec.start_percent:g} and {spec.end_percent:g}"
            return said if self.away is None else f"{said}: they lie from {self.away[0]:.2g} to {self.away[1]:.2g}"
        said = f"acted in {len(self.acted)} of {steps} steps, {len(self.reached)} of {len(self.named)} blocks"
        if left := len(self.due - self.acted):
            said += f" ({left} more step{'s' * (left > 1)} of its window were left out by a cache or another node)"
        share = self.found
        if share is None:
            return said
        if share < LITTLE:
            return (
                f"{said}; found in {percent(share)} of positions: nothing in these pictures is like "
                f'"{spec.source.name}". If they show it, try another phrasing, or a lower floor'
            )
        return f"{said}; found in {percent(share)} of positions"

    def document(self, steps: int) -> dict[str, Any]:
        spec = self.spec
        return {
            "node": spec.node,
            "method": spec.how.label,
            "source": spec.source.name,
            "strength": spec.strength,
            "window": [spec.start_percent, spec.end_percent],
            "blocks": {"named": len(self.named), "reached": len(self.reached)},
            "steps": {"all": steps, "due": len(self.due), "acted": len(self.acted)},
            "rows": {"edited": self.edited, "seen": self.seen, "for": spec.rows},
            "found": None if (share := self.found) is None else round(share, 4),
        }


@dataclass
class Noted:
    """Where some edits of one model call found what they look for, in one attention. found: [K, R, N, ..], of K
    phrases, in any of its heads; owner: the edit of each phrase, by its place in the plan."""

    size: Size
    rows: Rows
    owner: Sequence[int]
    found: Tensor


@dataclass
class Held:
    """What one model call found. entries: of its edits, by their place in the plan; images: of the run, as far as the
    call shows them. The rows of its notes tell which edits and images it was for."""

    entries: Sequence[Entry | None]
    images: int
    noted: Sequence[Noted]


class Account(Shared):
    """specs: the edits that the MODEL carries; schedule: the noise levels of the steps, the last being where the run
    ends; windows: of each edit, the noise levels (start, end); ends: the percents of the first and the last step, asked
    for where an edit's window holds none."""

    def __init__(
        self,
        specs: Sequence[EditSpec],
        backbone: Backbone,
        schedule: Sequence[float],
        windows: Mapping[EditSpec, tuple[float, float]] = MappingProxyType({}),
        ends: Callable[[], tuple[float, float]] = lambda: (0.0, 1.0),
    ) -> None:
        self.schedule, self.end = list(schedule[:-1]), schedule[-1] if schedule else 0.0
        empty = [spec for spec, (high, low) in windows.items() if not any(low < each <= high for each in self.schedule)]
        self.away = dict.fromkeys(empty, ends()) if empty else {}
        self.further = {spec for spec, (_, low) in windows.items() if low < self.end}
        self.backbone = backbone
        self.specs = tuple(specs)
        self.gates: dict[str, dict[str, Any]] = {}
        self.trouble = ""
        self.brought: tuple[str, ...] = ()  # what positive prompts bring past their texts, for people
        self._last = math.nan, 0  # a noise level, and its step
        self.clear()

    def clear(self) -> None:
        """Before the first step, also when a run begins again."""
        self.entries = {
            spec: Entry(spec, self._named(spec), away=self.away.get(spec), further=spec in self.further)
            for spec in self.specs
        }
        self.prompts: dict[str, int] = {}  # rows of each, by the guider's names
        self.edited: set[str] = set()  # those that were taken for conditional
        self.made: list[tuple[str | None, Tensor]] = []  # what each prompt predicts, in one guided prediction
        self.calls = 0
        self.references = False  # whether the model reads reference pictures that no edit reaches
        self._held: list[Held] = []  # of model calls whose findings are not added up yet
        self._numbers = 0  # in them

    def _named(self, spec: EditSpec) -> Sequence[BlockKey]:
        chosen = self.backbone.chosen(spec.blocks, spec.node)
        return [key for key in self.backbone.blocks if key in chosen]

    @property
    def steps(self) -> int:
        return len(self.schedule)

    def step(self, sigma: float) -> int:
        """The step that a noise level belongs to: samplers also call between the steps."""
        if sigma != self._last[0]:  # asked three times a step
            self._last = sigma, min(range(self.steps), key=lambda i: abs(self.schedule[i] - sigma), default=0)
        return self._last[1]

    # -- while the run goes on -----------------------------------------------------------------------------------------

    def due(self, specs: Sequence[EditSpec], sigma: float) -> None:
        """These edits, as the MODEL carries them, are to act at this noise level."""
        for spec in specs:
            if spec in self.entries:
                self.entries[spec].due.add(self.step(sigma))

    def called(self, served: Served) -> None:
        """A model call has come through, whoever it is for."""
        self.calls += 1
        for name, edited in zip(served.names, served.edited, strict=True):
            name = name or UNNAMED
            self.prompts[name] = self.prompts.get(name, 0) + served.images * served.tiles
            if edited:
                self.edited.add(name)

    def acted(self, call: Any, origin: Mapping[EditSpec, EditSpec], sigma: float) -> None:
        """What the edits of one model call (run.Call) reached; origin: of each edit, the one that the MODEL carries."""
        plan, step = call.plan, self.step(sigma)
        rows = plan.rows(call.served, call.served.batch)
        entries = [self.entries.get(origin.get(spec, spec)) for spec in plan.specs]
        for i, entry in enumerate(entries):
            if entry is None:
                continue
            entry.installed += 1
            entry.seen += call.served.batch
            if rows is None or not rows.on[i]:
                continue
            entry.open += 1
            reached = call.read if i in plan.texts else call.reached
            if reached.keys() - entry.reached.keys():  # most calls reach what the first one did
                entry.reached.update((key, None) for key in reached if key in plan.chosen[i])
            if any(key in plan.chosen[i] for key in reached):
                entry.acted.add(step)
                entry.edited += rows.on[i]
        if call.noted:
            self._hold(Held(entries, max(call.served.shown) + 1, call.noted))

    def _hold(self, held: Held) -> None:
        """Keeps what a model call found as it is: many small tensors are added up at once in the time of a few."""
        self._held.append(held)
        self._numbers += sum(noted.found.numel() for noted in held.noted)
        if self._numbers > HELD:
            self._add_up()

    def _add_up(self) -> None:
        """Adds up where edits found something, all attentions of one size and of all calls alike at once."""
        alike: dict[tuple[Any, ...], tuple[Held, list[Noted]]] = {}
        for held in self._held:
            for noted in held.noted:
                alike.setdefault((noted.size, tuple(noted.owner), id(noted.rows)), (held, []))[1].append(noted)
        for (size, owner, _), (held, group) in alike.items():
            rows = group[0].rows
            found = torch.stack([noted.found for noted in group])  # [calls x blocks, K, R, N, ..]
            found = found if found.ndim == 4 else found.flatten(4).amax(4)
            for i in sorted(set(owner)):
                if (entry := held.entries[i]) is None:
                    continue
                own = found[:, [k for k, edit in enumerate(owner) if edit == i]].amax(1).sum(0)  # [R, N]
                on = (rows.s[i] != 0).to(own.dtype)
                entry.add(size, held.images, rows.image, own * on[:, None], on * len(group))
        self._held, self._numbers = [], 0

    def guided(self, spec: EditSpec, step: int, rows: int) -> None:
        """An edit has changed the prediction of a positive prompt: as good as in all attentions."""
        if (entry := self.entries.get(spec)) is not None:
            entry.installed += 1
            entry.seen += rows
            entry.edited += rows
            entry.acted.add(step)
            entry.reached.update(dict.fromkeys(entry.named))

    def predicted(self, names: Sequence[str | None], out: Sequence[Tensor]) -> None:
        """What the prompts of one call of the host's batching predict, as the edits leave it."""
        if not all(entry.followed for entry in self.entries.values()):
            self.made += zip(names, out, strict=True)

    def guided_to(self, denoised: Tensor, sigma: float) -> None:
        """What guidance made of it: look, until an edit's pictures are seen to follow its prompts, whether they follow
        another one alone."""
        made, self.made = self.made, []
        if not made:
            return
        step = self.step(sigma)
        here = [e for e in self.entries.values() if step in e.due and not e.followed and e.spec.rows != "all"]
        if not here:
            return
        alike = [name for name, out in made if same(out, denoised)]
        alone = bool(alike) and not any(map(positive, alike))
        for entry in here:
            entry.followed = not alone
            entry.other = (alike[0] or UNNAMED) if alone else entry.other

    def absorb(self, other: Account) -> None:
        """Count what a run within this one did with the same edits."""
        for spec, entry in self.entries.items():
            if (inner := other.entries.get(spec)) is not None and inner.acted:
                entry.reached.update(inner.reached)
                entry.acted.update(entry.due or {0})
                entry.installed += inner.installed
                entry.edited += inner.edited
                entry.seen += inner.seen
                self.calls += other.calls

    def gate(self, id: str, **what: Any) -> None:
        """What an in-flight gate decided, and when; in the finished pictures, what it saw."""
        self.gates.setdefault(id, {}).update(what)

    # -- when it has ended ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Adds up what is left, and takes the sums off the device."""
        self.made = []
        self._add_up()
        for entry in self.entries.values():
            entry.sums = {size: x.cpu() for size, x in entry.sums.items()}
            entry.counts = {size: n.cpu() for size, n in entry.counts.items()}

    @property
    def applied(self) -> bool:
        """Whether every edit acted wherever it was due."""
        return not self.trouble and all(entry.acted or not entry.due for entry in self.entries.values())

    def complaint(self, entry: Entry) -> str | None:
        """What went wrong with an edit, without the cause; None if nothing did."""
        if not entry.due or entry.spec.idle:
            return None
        if not entry.installed and self.calls and not self.edited and entry.spec.rows != "all":
            return f"found no prompt to act on: the model was called for {', '.join(self.prompts)} alone"
        if not entry.installed:
            return "reached no call of the model"
        if not entry.open and entry.spec.gate.drawn:
            return None  # none of the images drew it
        if not entry.reached:
            return f"reached none of {len(entry.named)} blocks"
        if entry.missed:
            missed = ", ".join(dict.fromkeys(f"{key[0]}.{key[1]}" for key in entry.missed))
            return f"reached {len(entry.reached)} of {len(entry.named)} blocks, and never {missed}"
        if entry.ignored:
            return f"acted, and the picture does not follow it: the guidance goes by the prompt {entry.other} alone"
        return None

    def lines(self) -> list[tuple[Entry, str]]:
        """Each edit, and what it did, for people; and what its gate sees all the same."""
        unknown = self.prompts.get(UNNAMED, 0)
        more = f"; left alone {unknown} rows of prompts that the guider does not name" if unknown else ""
        lines = [(entry, entry.line(self.steps)) for entry in self.entries.values()]
        lines = [(entry, line + more * (bool(entry.acted) and entry.spec.rows != "all")) for entry, line in lines]
        beside = BESIDE * self.references + "".join(f"; {each}" for each in self.brought)
        lines = [(entry, line + beside * bool(entry.acted) + self.left(entry.spec)) for entry, line in lines]
        return [(entry, line + FURTHER * (entry.further and bool(entry.acted or entry.away))) for entry, line in lines]

    def left(self, spec: EditSpec) -> str:
        """What an edit's gate still sees in the finished pictures, for people."""
        flight = spec.gate.inflight
        if flight is None or flight.threshold == 0 or spec.gate.drawn or spec.how.adds(spec):
            return ""  # to whom it says nothing that it still sees it
        seen = self.gates.get(flight.id, {}).get("left")
        values = spec.gate.per_image(len(seen)) if seen else ()
        left = sum(bool(value and there) for value, there in zip(values, seen or (), strict=True))
        return f"; its gate sees it in {left} of {len(values)} finished pictures" if left else ""

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "applied": self.applied,
            "steps": self.steps,
            "prompts": {name: {"rows": n, "edited": name in self.edited} for name, n in self.prompts.items()},
            "gates": [rounded(gate) for gate in self.gates.values()],
            "edits": [{**entry.document(self.steps), "said": line} for entry, line in self.lines()],
        }


class Accounts(Shared):
    """Of the last runs of one MODEL and of its clones, each with the digest of the latents that it made."""

    def __init__(self) -> None:
        self.runs: deque[tuple[str, Account]] = deque(maxlen=KEPT)

    def of(self, digest: str) -> Account | None:
        """The account of the run that made these latents; if none did, the last."""
        mine = [account for made, account in self.runs if made == digest]
        return mine[-1] if mine else self.runs[-1][1] if self.runs else None


Listener = Callable[[Account], None]
LISTENERS: list[Listener] = []  # told of every run's account at its end


def rounded(gate: Mapping[str, Any]) -> dict[str, Any]:
    """A gate's part of a document: confidences of four places."""
    return {name: [round(x, 4) for x in each] if name == "finished" else each for name, each in gate.items()}


def same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 or not share else f"{100 * share:.2g} %"
