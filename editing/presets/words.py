"""Presets in plain words, for people to read before they trust one."""

from __future__ import annotations

import re

from .document import (
    CREEdit,
    DirectionEdit,
    Edit,
    EIUPEdit,
    ImageGate,
    InFlightGate,
    KPOPEdit,
    LearnedFile,
    Preset,
    Words,
    bytes_of,
    learned_files,
    parsed,
)


def described(preset: Preset) -> list[str]:
    """What each edit will do, a line each."""
    return [f"{_what(edit)}, {_when(edit)}{_where(edit)}{_whether(edit)}." for edit in preset.edits]


def _what(edit: Edit) -> str:
    if isinstance(edit, KPOPEdit):
        return f"Puts the learned prompt {edit.prompt.file} back (KPOP, strength {edit.strength:g})"
    if isinstance(edit, DirectionEdit):
        return f"Moves the prompt along {edit.direction.file} (safe region, strength {edit.strength:g})"
    assert isinstance(edit, CREEdit | EIUPEdit)
    if isinstance(edit.concept, LearnedFile):
        thing = f"the concept in {edit.concept.file}"
    else:
        thing = f'"{edit.concept.name}"'
        if edit.concept.phrases != (edit.concept.name,):
            thing += " (" + "; ".join(edit.concept.phrases) + ")"
    if isinstance(edit, CREEdit):
        kept = edit.concept.keep if isinstance(edit.concept, Words) else ()
        thing += f", but not {'; '.join(kept)}" if kept else ""
        return f"{'Erases' if edit.strength else 'Leaves'} {thing} (CRE, strength {edit.strength:g})"
    weights = ", ".join(f"{weight:g}" for weight in edit.weights)
    verb = "Adds" if all(weight > 0 for weight in edit.weights) else "Weakens or adds"
    verb = "Takes away" if all(weight <= 0 for weight in edit.weights) else verb
    scaled = "" if edit.strength == 1 else f", strength {edit.strength:g}"
    return f"{verb} what attends to {thing} (EIUP, weight {weights}{scaled})"


def _when(edit: Edit) -> str:
    if edit.start_percent >= edit.end_percent:
        return "never active"
    if (edit.start_percent, edit.end_percent) == (0, 1):
        return "through the whole sampling"
    return f"from {100 * edit.start_percent:g} % to {100 * edit.end_percent:g} % of the timesteps"


def _where(edit: Edit) -> str:
    return "" if edit.blocks.strip() == "all" else f", in {edit.blocks}"


def _whether(edit: Edit) -> str:
    gate = edit.gate
    if gate is None:
        return ""
    judge = gate.discriminator.file if gate.discriminator is not None else "its likeness to the concept"
    shown = f"({judge}, from {gate.threshold:g}{', the surer the stronger' if gate.soft else ''})"
    if isinstance(gate, InFlightGate):
        again = "; it then begins again" if gate.restart else ""
        return f", only in pictures that show it at {100 * gate.at_percent:g} % of the timesteps {shown}{again}"
    if isinstance(gate, ImageGate):
        return f", only if {'any' if gate.decides == 'any' else 'the'} reference picture shows it {shown}"
    return f", only if the prompt asks for it {shown}"


def brought(preset: Preset) -> list[str]:
    """The learned files that it needs, a line each."""
    along = {file.sha256: file for file in preset.files}
    lines = []
    for file, kind in dict(learned_files(preset)).items():
        if (found := along.get(file.sha256)) is None:
            lines.append(f"Needs the {kind} {file.file} of the models folder (sha256 {file.sha256[:12]}..).")
            continue
        data = bytes_of(found)
        about = parsed(found, kind)
        name = re.sub(r"[^\w .,()'+-]", "?", about.name)[:80]  # a file's own text is nobody's but its maker's
        lines.append(f'Brings along the {kind} {file.file}, "{name}" ({max(1, len(data) // 1024)} KB).')
    return lines
