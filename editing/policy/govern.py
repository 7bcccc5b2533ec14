"""Which edits a policy puts on one sampling run: its presets as edits, as strict as the run makes necessary.

What a gate cannot look at, it does not close for: a gate that asks for the prompt is open where the prompt is not
known, or where a picture says what the prompt need not say; one that looks at the picture, where a prompt says more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..edits.spec import ROWS, EditSpec, Gate, InFlight, opened
from ..engine.account import Account
from ..files.artefacts import Artefact
from ..gates.features import Features
from ..presets.apply import Given, Maker, specs_of
from ..presets.document import Preset
from ..presets.parts import ImageGate, LearnedFile
from .document import Rule
from .encoders import Encoder, Memory, words_of
from .file import Loaded, Refused

NODE = "ConceptGuard policy"
Gates = Mapping[str, Mapping[str, Any]]
Look = Callable[[InFlight], list[float]]


HURRIED = 0.5  # of the steps that a window's share of the timesteps would have
Schedule = Callable[[float, float], float]  # the share of a run's steps between two percents of the timesteps


@dataclass(frozen=True)
class Sampling:
    """One run, as far as a policy is concerned.

    texts: of all prompts that it may follow, None where one is not known; picture: whether it begins with one, or is
    led by one; image: that picture [B, h, w, 3] in [0, 1], if it can be looked at; whole: whether it has all of the
    timesteps; steps: the share of them between two percents; everyone: whether its guidance may follow other prompts
    than the positive.
    """

    family: str
    encoders: Sequence[Encoder]
    texts: tuple[str, ...] | None = None
    picture: bool = False
    image: Tensor | None = None
    whole: bool = True
    steps: Schedule = lambda start, end: end - start
    everyone: bool = False

    @property
    def silent(self) -> bool:
        """Whether no prompt asks for anything."""
        return self.texts is not None and not any(text.strip() for text in self.texts)

    def hurries(self, start_percent: float, end_percent: float) -> bool:
        """Whether its schedule leaves a window as good as out."""
        share = end_percent - start_percent
        return share > 0 and self.steps(start_percent, end_percent) < HURRIED * share


@dataclass(frozen=True)
class Files:
    """find: reads a learned file that a preset names; encoder: what a discriminator's file was trained with."""

    find: Callable[[LearnedFile, str], Artefact]
    encoder: Callable[[Artefact, Any], Features | None] = lambda *_: None


def edits_for(loaded: Loaded, rule: Rule, run: Sampling, files: Files) -> list[EditSpec]:
    """The edits of the rule's presets. Raises Refused where they cannot be made."""
    presets = loaded.of(rule)
    if words_of(presets) and not run.encoders:
        raise Refused(
            "no text encoder is known that made this run's prompts, and the policy's words cannot be encoded; make the "
            "prompts with a CLIP of this model (CLIP Text Encode); those encoded before the policy came on are "
            "encoded anew when a letter of them changes"
        )
    made: dict[str, EditSpec] = {}
    encoders: Sequence[Encoder | None] = run.encoders or [None]
    for encoder in encoders:
        clip = None if encoder is None else encoder.memory()
        for preset in presets:
            for spec in of_preset(preset, rule, run, encoder, clip, files):
                made.setdefault(spec.key, spec)
    return list(made.values())


def of_preset(
    preset: Preset, rule: Rule, run: Sampling, encoder: Encoder | None, clip: Memory | None, files: Files
) -> list[EditSpec]:
    """Its edits. Prompt gates are asked about each prompt alone, for beside others it says less, and the one that opens
    them the most counts."""
    texts = run.texts if clip is not None and not run.picture else None
    try:
        found = [said_by(text, preset, rule, run, clip, encoder, files) for text in texts or (None,)]
    except ValueError as error:
        raise Refused(f'preset "{preset.name}": {str(error).removeprefix("preset: ")}') from None
    widest = [max(each, key=lambda spec: max(spec.gate.values)) for each in zip(*found, strict=True)]
    return [at_last(spec, run.everyone) for spec in widest]


def said_by(
    text: str | None, preset: Preset, rule: Rule, run: Sampling, clip: Any, encoder: Encoder | None, files: Files
) -> list[EditSpec]:
    """The edits of a preset as one prompt opens their gates."""
    given = Given(
        clip,
        files.find,
        lambda artefact: files.encoder(artefact, clip),
        image=run.image,
        text=text,
        concept=None if encoder is None else encoder.concept,
    )
    strict = preset.model_copy(update={"edits": tuple(stricter(edit, run, given) for edit in preset.edits)})
    outer = Gate()
    if rule.gate is not None and can_look(rule.gate, given, run):
        if rule.gate.kind == "prompt" and rule.gate.discriminator is None:
            raise ValueError("a rule's prompt gate needs a discriminator, or give the gate to a preset's edits")
        outer = Maker(preset, given, 1.0, Gate(), NODE).gate(rule.gate, None)
    return specs_of(strict, given, rule.strength, outer, NODE)


def at_last(spec: EditSpec, everyone: bool) -> EditSpec:
    """A policy's edit: it comes behind all those of the graph, so that none of them has the last word."""
    if not everyone:
        return replace(spec, last=True)
    if spec.how.stage == "guidance" and not spec.idle:
        raise Refused(
            f'"{spec.source.name}" is held by guidance ({spec.how.label}), and this run\'s picture may follow other '
            "prompts than the positive; use the host's plain CFG from 1 on, without nodes that change the guidance"
        )
    return replace(spec, last=True, rows=ROWS[1])


def stricter(edit: Any, run: Sampling, given: Given) -> Any:
    """An edit as this run needs it: through all steps of one that has some of them, or has too few of them in its
    window, and without gates that see nothing."""
    more: dict[str, Any] = {}
    if run.picture or not run.whole or run.hurries(edit.start_percent, edit.end_percent):
        more |= {"start_percent": 0.0, "end_percent": 1.0}
    if edit.gate is not None and not can_look(edit.gate, given, run):
        more["gate"] = None
    return edit.model_copy(update=more)


def can_look(gate: Any, given: Given, run: Sampling) -> bool:
    """Whether a preset's gate has all that it needs to close: the picture alone does not tell what a prompt adds."""
    if gate.kind == "image":
        return given.image is not None and run.silent
    return gate.kind != "prompt" or given.text is not None


def flags(gate: ImageGate, image: Tensor, loaded: Loaded, rule: Rule, files: Files) -> bool:
    """Whether a policy's gate flags one of the pictures [B, h, w, 3] in [0, 1] that a run begins with."""
    given = Given(None, files.find, lambda artefact: files.encoder(artefact, None), image=image)
    try:
        return any(Maker(loaded.of(rule)[0], given, 1.0, Gate(), NODE).gate(gate, None).values)
    except ValueError as error:
        raise Refused(f"pictures_gate: {error}") from None


def seen_at_last(specs: Sequence[EditSpec], gates: Gates, look: Look) -> tuple[list[EditSpec] | None, bool]:
    """The edits with their in-flight gates open for the images in whose finished picture they see what they missed on
    the way, None where they see nothing new; and whether those that take away see anything.

    gates: what the run's account tells of each gate, by its id; look: shows the pictures to one that saw them not yet.
    """
    again, missed, seen = list(specs), False, False
    for i, spec in enumerate(specs):
        flight = spec.gate.inflight
        if flight is None or spec.idle:
            continue
        told = gates.get(flight.id, {})
        scores = told["finished"] if "finished" in told else look(flight)
        now = opened(scores, flight.threshold, flight.soft)
        then = told.get("opens", (0.0,) * len(now))
        missed |= any(late and not early for late, early in zip(now, then, strict=True))
        seen |= flight.threshold > 0 and not spec.how.adds(spec) and any(now)
        again[i] = replace(spec, gate=spec.gate.decided(tuple(map(max, then, now))))
    return again if missed else None, seen


def together(carried: Sequence[EditSpec], ours: Sequence[EditSpec]) -> list[EditSpec]:
    """The edits that the graph brought and the policy's, none twice: of one concept by one method the policy's.

    Raises Refused for an edit of the graph that cancels one of the policy's.
    """
    keys = {spec.key for spec in carried}
    new = [spec for spec in ours if spec.key not in keys]
    others = [spec for spec in carried if not any(weaker(spec, other) for other in new)]
    for theirs in others:
        for own in ours:
            if theirs.how is own.how and theirs.how.adds(theirs) and not theirs.how.adds(own) and not theirs.idle:
                raise Refused(
                    f'the graph\'s edit of "{theirs.source.name}" adds it, and this server takes "{own.source.name}" '
                    f"away by the same sum ({own.how.label}), where neither has the last word; give the graph's edit "
                    "a weight below 0, or leave it out"
                )
    return others + new


def weaker(theirs: EditSpec, ours: EditSpec) -> bool:
    """Whether the graph's edit is one of the policy's with other numbers."""
    return (theirs.method, theirs.source.key) == (ours.method, ours.source.key)


def shown(accounts: Sequence[Account], ours: Sequence[EditSpec]) -> Account:
    """The account that shows the policy's edits. Raises Refused if none does."""
    live = [spec for spec in ours if not spec.idle]
    why = "nobody kept an account of this run"
    for account in accounts:
        lacks = {spec.source.name: lacking(account, spec) for spec in live}
        if not any(lacks.values()):
            return account
        why = "; ".join(f'"{name}" {lack}' for name, lack in lacks.items() if lack)
    raise Refused(f"there is no picture, for the account of this run does not show the policy's edits: {why}")


def lacking(account: Account, spec: EditSpec) -> str | None:
    """What an account does not show of an edit."""
    entry = next((entry for other, entry in account.entries.items() if other.key == spec.key), None)
    if entry is None:
        return "was not in it"
    flight = spec.gate.inflight
    if not entry.due and (flight is None or flight.id not in account.gates):
        what = "none of the steps lies in its window" if flight is None else "its gate never looked"
        return f"{what}; sample with more steps"
    return account.complaint(entry) or (account.trouble or None)
