"""The `blocks` input: which cross-attentions an edit reaches, written as "all" or like "input.4,middle,output.3-5"."""

from __future__ import annotations

import re
from collections.abc import Collection

BlockKey = tuple[str, int, int]  # the host's: ("input" | "middle" | "output", block number, transformer in the block)
Part = tuple[str, int, int]  # a side of the UNet and the first and last block number on it

SIDES = ("input", "middle", "output")
LAST = 10**6


def parse_blocks(text: str) -> list[Part]:
    """The parts that `text` names. Raises ValueError, with the mend, for a part that cannot be read."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError('blocks is empty; write "all", or parts like "input.4,middle,output.3-5"')
    parts: list[Part] = []
    for word in (word.strip().lower() for word in text.split(",")):
        found = re.fullmatch(r"(all|input|middle|output)(?:\.(\d+)(?:-(\d+))?)?", word)
        if found is None or (found[1] == "all" and found[2]):
            raise ValueError(f'blocks: cannot read "{word}"; write "all", or parts like "input.4,middle,output.3-5"')
        first = int(found[2]) if found[2] else 0
        last = int(found[3]) if found[3] else first if found[2] else LAST
        if last < first:
            raise ValueError(f'blocks: "{word}" ends before it starts; write "{found[1]}.{last}-{first}"')
        parts += [(side, first, last) for side in (SIDES if found[1] == "all" else (found[1],))]
    return parts


def select_blocks(text: str, keys: Collection[BlockKey]) -> set[BlockKey]:
    """Those of a model's cross-attentions that `text` names; every part but "all" must name at least one."""
    chosen: set[BlockKey] = set()
    for side, first, last in parse_blocks(text):
        named = {key for key in keys if key[0] == side and first <= key[1] <= last}
        if not named and "all" not in text.lower():
            raise ValueError(f'blocks "{text}": this model has no cross-attention there; it has {listing(keys)}')
        chosen |= named
    return chosen


def listing(keys: Collection[BlockKey]) -> str:
    """Like "input.1, input.2, middle.0"."""
    return ", ".join(f"{side}.{i}" for side in SIDES for i in sorted({key[1] for key in keys if key[0] == side}))
