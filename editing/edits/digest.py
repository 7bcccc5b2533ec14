"""What all data of the engine has in common: clones share it, and it can be told apart by its numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def digest(parts: Iterable[object]) -> str:
    """The same text for the same numbers, in this process and the next: the last resort of every sort."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part.contiguous().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return h.hexdigest()


class Shared:
    """Data that clones share: the host deep-copies a model's options at every clone, and tensors with them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self
