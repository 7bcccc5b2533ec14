"""Presets in plain words, for people to read before they trust one."""

from __future__ import annotations

import re
from typing import Any

from ..edits.method import labelled
from .document import Preset, learned_files
from .parts import Edit, bytes_of, parsed


def described(preset: Preset) -> list[str]:
    """What each edit will do, a line each."""
    return [f"{_what(edit)}, {_when(edit)}{_where(edit)}{_whether(edit)}." for edit in preset.edits]


def _what(edit: Any) -> str:
    return labelled(edit.method).described(edit)


def _when(edit: Edit) -> str:
    if edit.start_percent >= edit.end_percent:
        return "never active"
    if (edit.start_percent, edit.end_percent) == (0, 1):
        return "through the whole sampling"
    return f"from {100 * edit.start_percent:g} % to {100 * edit.end_percent:g} % of the timesteps"


def _where(edit: Edit) -> str:
    blocks = "" if edit.blocks.strip() == "all" else f", in {edit.blocks}"
    return blocks if edit.rows == "conditional" else f"{blocks}, for the negative prompt as well"


def _whether(edit: Edit) -> str:
    return "" if edit.gate is None else edit.gate.said()


def measured(preset: Preset) -> list[str]:
    """What reports found, a line a checkpoint."""
    return [
        f"Measured on {each.checkpoint} (sha256 {each.sha256[:12]}..): {100 * each.left:.3g} % left "
        f"(n = {each.left_of}), {100 * each.kept:.3g} % kept (n = {each.kept_of})."
        for each in preset.measured
    ]


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
