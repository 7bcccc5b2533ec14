"""Pictures from a demo model in bulk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..jobs.measure import Sampling, pictures

LATENT = 4, 16, 16
HOW = Sampling(steps=20, cfg=4.0)


def draw(
    demo: tuple[Any, Any, Any], texts: Sequence[str], seed: int = 0, model: Any = None, how: Sampling = HOW
) -> Tensor:
    """One picture a prompt from the demo's MODEL or an edited one: [n, 3, 128, 128] in [0, 1]."""
    unet, clip, vae = demo
    *prompts, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (*texts, ""))
    return pictures(model or unet, vae, prompts, empty, LATENT, how, seed)
