"""Which edits a policy puts on one sampling run: its presets as edits, as strict as the run makes necessary.

What a gate cannot look at, it does not close for: a gate that asks for the prompt is open where the prompt is not
known, or where a picture says what the prompt need not say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..edits.spec import ROWS, EditSpec, Gate
from ..engine.account import Account
from ..files.artefacts import Artefact
from ..gates.features import Features
from ..presets.apply import Given, Maker, specs_of
from ..presets.document import Preset
from ..presets.parts import LearnedFile
from .document import Rule
from .encoders import Encoder, words_of
from .file import Loaded, Refused

NODE = "ConceptGuard policy"


@dataclass(frozen=True)
class Sampling:
    """One run, as far as a policy is concerned.

    text: of all positive prompts, None where one is not known; picture: whether it begins with one, or is led by one;
    image: that picture [B, h, w, 3] in [0, 1], if it can be looked at; whole: whether it has all of the timesteps;
    everyone: whether its guidance may follow other prompts than the positive.
    """

    family: str
    encoders: Sequence[Encoder]
    text: str | None = None
    picture: bool = False
    image: Tensor | None = None
    whole: bool = True
    everyone: bool = False


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
            "prompts with a CLIP of this model (CLIP Text Encode)"
        )
    made: dict[str, EditSpec] = {}
    encoders: Sequence[Encoder | None] = run.encoders or [None]
    for encoder in encoders:
        for preset in presets:
            for spec in of_preset(preset, rule, run, encoder, files):
                made.setdefault(spec.key, spec)
    return list(made.values())


def of_preset(preset: Preset, rule: Rule, run: Sampling, encoder: Encoder | None, files: Files) -> list[EditSpec]:
    clip = None if encoder is None else encoder.memory()
    text = run.text if clip is not None and not run.picture else None
    given = Given(
        clip,
        files.find,
        lambda artefact: files.encoder(artefact, clip),
        image=run.image,
        text=text,
        concept=None if encoder is None else encoder.concept,
    )
    strict = preset.model_copy(update={"edits": tuple(stricter(edit, run, given) for edit in preset.edits)})
    try:
        outer = Gate()
        if rule.gate is not None and can_look(rule.gate, given):
            if rule.gate.discriminator is None:
                raise ValueError("a rule's gate needs a discriminator, or give the gate to a preset's edits")
            outer = Maker(preset, given, 1.0, Gate(), NODE).gate(rule.gate, None)
        specs = specs_of(strict, given, rule.strength, outer, NODE)
    except ValueError as error:
        raise Refused(f'preset "{preset.name}": {str(error).removeprefix("preset: ")}') from None
    rows = ROWS[1] if run.everyone else None
    return [spec if rows is None or spec.how.stage == "guidance" else replace(spec, rows=rows) for spec in specs]


def stricter(edit: Any, run: Sampling, given: Given) -> Any:
    """An edit as this run needs it: through all steps of one that has some of them, without gates that see nothing."""
    more: dict[str, Any] = {}
    if run.picture or not run.whole:
        more |= {"start_percent": 0.0, "end_percent": 1.0}
    if edit.gate is not None and not can_look(edit.gate, given):
        more["gate"] = None
    return edit.model_copy(update=more)


def can_look(gate: Any, given: Given) -> bool:
    """Whether a preset's gate has what it decides by."""
    return {"prompt": given.text, "image": given.image}.get(gate.kind, gate) is not None


def together(carried: Sequence[EditSpec], ours: Sequence[EditSpec]) -> list[EditSpec]:
    """The edits that the graph brought and the policy's, none twice: of one concept by one method the policy's."""
    keys = {spec.key for spec in carried}
    new = [spec for spec in ours if spec.key not in keys]
    return [spec for spec in carried if not any(weaker(spec, other) for other in new)] + new


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
