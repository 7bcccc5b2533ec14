"""The `blocks` input: which attentions an edit reaches, written as "all" or like "input.4,middle,output.3-5"."""

from __future__ import annotations

import re
from collections.abc import Collection

BlockKey = tuple[str, int, int]  # the host's: (side, block number, transformer in the block)
Part = tuple[str, int, int]  # a side of the model, or "all", and the first and last block number on it

# The sides of a UNet; other kinds of models add theirs (engine/backbone.py), in their order.
SIDES = ["input", "middle", "output"]
LAST = 10**6
MEND = 'write "all", or parts like "input.4,middle,output.3-5"'


def know_sides(*sides: str) -> None:
    """Let `blocks` name these as well."""
    SIDES.extend(side for side in sides if side not in SIDES)


def parse_blocks(text: str) -> list[Part]:
    """The parts that `text` names. Raises ValueError, with the mend, for a part that cannot be read."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"blocks is empty; {MEND}")
    parts: list[Part] = []
    for word in (word.strip().lower() for word in text.split(",")):
        found = re.fullmatch(r"([a-z]+)(?:\.(\d+)(?:-(\d+))?)?", word)
        if found is None or found[1] not in ("all", *SIDES) or (found[1] == "all" and found[2]):
            raise ValueError(f'blocks: cannot read "{word}"; {MEND}')
        first = int(found[2]) if found[2] else 0
        last = int(found[3]) if found[3] else first if found[2] else LAST
        if last < first:
            raise ValueError(f'blocks: "{word}" ends before it starts; write "{found[1]}.{last}-{first}"')
        parts.append((found[1], first, last))
    return parts


def within(key: BlockKey, part: Part) -> bool:
    """Whether a part names this attention."""
    side, first, last = part
    return side in ("all", key[0]) and first <= key[1] <= last


def select_blocks(text: str, keys: Collection[BlockKey]) -> set[BlockKey]:
    """Those of a model's attentions that `text` names; every part must name at least one."""
    chosen: set[BlockKey] = set()
    for part in parse_blocks(text):
        named = {key for key in keys if within(key, part)}
        if not named:
            raise ValueError(f'blocks "{text}": this model has no cross-attention there; it has {listing(keys)}')
        chosen |= named
    return chosen


def listing(keys: Collection[BlockKey]) -> str:
    """Like "input.1, input.2, middle.0"."""
    return ", ".join(f"{side}.{i}" for side in SIDES for i in sorted({key[1] for key in keys if key[0] == side}))
