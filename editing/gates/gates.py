"""Gates, each made of its rule and of what it looks at: pictures, the prompt, or what takes shape while sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..edits.spec import Concept, Gate, InFlight, Rule, opened
from .decoders import decoder
from .discriminator import Discriminator, Judge
from .prompts import likeness, prompt_scores

DECIDES = ("each", "any")
Report = Callable[[list[float], tuple[float, ...], bool], None]
Decided = tuple[Gate, list[float], tuple[float, ...]]  # with the confidences, and what each of them opens


def image_discriminator(given: Any) -> Judge:
    """Raises ValueError for what cannot judge pictures."""
    if not hasattr(given, "scores") or getattr(getattr(given, "features", None), "kind", "") == "text":
        raise ValueError(
            f"discriminator is a {type(given).__name__}, which does not look at pictures; connect the output of "
            "Train Discriminator or Load Discriminator"
        )
    return given


def image_gate(
    judge: Any, images: Tensor, threshold: float = 0.5, soft: bool = False, decides: str = "each"
) -> Decided:
    """By reference pictures [B, h, w, 3] in [0, 1]: each for the image of its number, or any of them for all."""
    if decides not in DECIDES:
        raise ValueError(f"decides is {decides!r}; choose one of {', '.join(DECIDES)}")
    scores = image_discriminator(judge).scores(images)
    values = opened(scores, threshold, soft)
    rule = Rule("image", judge, threshold, soft, {"decides": decides})
    return Gate(values if decides == "each" else (max(values),), rule=rule), scores, values


def prompt_gate(judge: Any, clip: Any, text: str, threshold: float = 0.5, soft: bool = False) -> Decided:
    """By the prompt: a discriminator of prompts, or its likeness to a concept."""
    if clip is None:
        raise ValueError("clip is empty: the checkpoint has no text encoder; connect a CLIP loader")
    if isinstance(judge, Concept):
        scores = [likeness(clip, text, judge)]
    elif judge is None:
        raise ValueError("nothing to decide by; connect a discriminator of prompts, or a concept")
    elif isinstance(judge, Discriminator) and judge.features.kind == "text":
        scores = prompt_scores(judge, clip, [text])
    else:
        raise ValueError("discriminator looks at pictures, not at prompts; connect it to an Image Gate")
    values = opened(scores, threshold, soft)
    return Gate(values, rule=Rule("prompt", judge, threshold, soft)), scores, values


def in_flight_gate(
    judge: Any,
    vae: Any = None,
    at_percent: float = 0.3,
    threshold: float = 0.5,
    soft: bool = False,
    restart: bool = True,
    report: Report | None = None,
) -> Gate:
    """By the clean pictures that the model predicts at a percent of the timesteps."""
    opened([0.0], threshold)
    look, key, models = decoder(image_discriminator(judge), vae)
    flight = InFlight(key, look, at_percent, threshold, soft, restart, models, report)
    options = {"at_percent": at_percent, "restart": restart, "decode": "preview" if vae is None else "vae"}
    return Gate(inflight=flight, rule=Rule("in-flight", judge, threshold, soft, options))
