"""Discriminators of prompts: how sure it is that a text asks for the concept, by what its encoder makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.digest import Shared, digest
from ..edits.encode import encode, own_tokens
from ..edits.spec import Concept, apart
from .discriminator import LEAST, Discriminator, Report, calibrate, fit, measured, split, threshold_for

PROBE = "a watercolour of a lighthouse at dusk"


class Text(Shared):
    """The host's CLIP: mean and greatest of a prompt's own tokens, [2 W]. Looks at prompts, not at pictures."""

    kind = "text"
    name = "the connected CLIP"
    size = 0
    models: tuple[Any, ...] = ()

    def __init__(self, clip: Any) -> None:
        if clip is None:
            raise ValueError("clip is empty: the checkpoint has no text encoder; connect a CLIP loader")
        self.clip = clip

    def of(self, text: str) -> Tensor:
        found = encode(self.clip, text)[0]
        tokens = found[list(own_tokens(self.clip, text, len(found))) or [0]]
        return torch.cat([tokens.mean(0), tokens.amax(0)])

    @cached_property
    def probe(self) -> Tensor:
        return self.of(PROBE)

    @property
    def width(self) -> int:
        return len(self.probe)

    @cached_property
    def key(self) -> str:
        return digest((self.probe,))

    def __call__(self, x: Tensor) -> Tensor:
        return x


def prompt_scores(discriminator: Discriminator, clip: Any, texts: Sequence[str]) -> list[float]:
    """Confidence in each prompt; an empty one asks for nothing."""
    features = Text(clip)
    if features.key != discriminator.features.key and features.width != discriminator.features.width:
        raise ValueError(
            f'discriminator "{discriminator.name}" was trained with a text encoder of width '
            f"{discriminator.features.width // 2}, and clip has {features.width // 2}; connect that one"
        )
    scores = discriminator.judge(torch.stack([features.of(text) for text in texts]))
    return [score if text.strip() else 0.0 for score, text in zip(scores, texts, strict=True)]


def train_prompts(
    concept: Sequence[str],
    others: Sequence[str],
    clip: Any,
    name: str = "concept",
    rate: float = 0.01,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Discriminator, Report]:
    """A discriminator of two classes of prompts, and what held-out ones say about it."""
    for what, texts in (("of the concept", concept), ("of other things", others)):
        if len(texts) < LEAST:
            raise ValueError(f"{len(texts)} prompts {what} are too few; give at least {LEAST}, one a line")
    features, rng = Text(clip), torch.Generator().manual_seed(seed)
    parts: dict[str, tuple[list[Tensor], list[float]]] = {part: ([], []) for part in ("fit", "calibrate", "measure")}
    for label, texts in ((1.0, concept), (0.0, others)):
        each = split(len(texts), rng)
        for part, (x, y) in parts.items():
            for i in getattr(each, part):
                x.append(features.of(texts[i]))
                y.append(label)
                progress()
    data = {part: (torch.stack(x), torch.tensor(y)) for part, (x, y) in parts.items()}
    head = calibrate(fit(*data["fit"]), *data["calibrate"])
    held, there = data["calibrate"]
    threshold = threshold_for(torch.sigmoid(head.logits(held[there == 0])).tolist(), rate)
    found = Discriminator(name, features, head, threshold)
    return found, measured(found, data["measure"], data["measure"])


def likeness(clip: Any, text: str, concept: Concept) -> float:
    """How much of one of the concept's phrases the prompt holds, from 0 to 1.

    Of each of the phrase's own tokens the cosine to the prompt's token that is most like it, both without what all
    tokens of an empty prompt share; the mean over the phrase, the most over the phrases.
    """
    prompt = encode(clip, text)[0]
    own = list(own_tokens(clip, text, len(prompt)))
    if not own:
        return 0.0
    if prompt.shape[-1] != concept.width:
        raise ValueError(
            f'concept "{concept.name}" was made with a text encoder of width {concept.width}, and clip has '
            f"{prompt.shape[-1]}; make it with this clip"
        )
    common, phrases = concept.apart or apart(concept.phrases, encode(clip, ""))
    there = F.normalize(prompt[own] - common, dim=-1).T
    found = torch.stack([(wanted @ there).amax(1).mean() for wanted in phrases])
    return float(found.amax().clamp(0, 1))
