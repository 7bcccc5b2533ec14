"""What a report found, as a preset carries it."""

from __future__ import annotations

from typing import Any

from ...editing.presets.document import Measured, Preset, read, write
from .page import KEPT, LEFT
from .work import EDITED


def measured(card: dict[str, Any]) -> Measured:
    """Of report.json. Raises ValueError for one that counts nothing."""
    found = {each["name"]: each for each in card["figures"] if each["side"] == EDITED}
    rates = [(found[name], i) for i, name in enumerate(KEPT) if name in found]
    if LEFT not in found or not rates:
        raise ValueError(
            "the report counts nothing that a preset could carry; give prompts of what is to go and of what is to stay"
        )
    left, (kept, newly) = found[LEFT], rates[0]
    value, count = 1 - kept["value"] if newly else kept["value"], kept["n"]
    name, sha256 = card["checkpoint"], card["checkpoint_sha256"]
    return Measured(checkpoint=name, sha256=sha256, left=left["value"], left_of=left["n"], kept=value, kept_of=count)


def carried(preset: Preset, card: dict[str, Any]) -> str:
    """The preset's document with the report; an older one of the same checkpoint goes."""
    new = measured(card)
    others = [each for each in preset.measured if each.sha256 != new.sha256]
    return write(read(write(preset.model_copy(update={"measured": (*others, new)}))))
