"""Pictures from the demo model in bulk: one batch holds many prompts, and every condition uses the same noise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

from ..demo import world
from ..demo.load import load, load_witness, reference_prompt
from ..demo.witness import Testimony, testify
from ..editing.edits.concept import NEUTRAL, concept_from_text
from ..editing.edits.spec import Concept, EditSpec
from ..editing.engine.host import add_edit
from ..editing.methods.cre import DEFAULTS, CREOptions
from ..jobs.measure import Sampling, pictures

STEPS, CFG, SAMPLER, SCHEDULER = 20, 4.0, "euler", "normal"
BATCH = 25


@dataclass(eq=False)
class Demo:
    """The demo model with what measures it."""

    model: Any
    clip: Any
    vae: Any
    steps: int = STEPS
    _concepts: dict[tuple[str, ...], Concept] = field(default_factory=dict)

    @classmethod
    def ready(cls, architecture: str = "unet") -> Demo:
        return cls(*load(architecture=architecture))

    def encode(self, text: str) -> Any:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def encode_with(self, text: str, picture: Tensor) -> Any:
        """A prompt in which <image> stands for a picture [3, h, w]."""
        return reference_prompt(self.clip, picture.movedim(0, -1)[None], text)

    def concept(self, text: str, neutral: str = NEUTRAL, keep: str = "", instead: str = "") -> Concept:
        key = text, neutral, keep, instead
        if key not in self._concepts:
            self._concepts[key] = concept_from_text(self.clip, text, text, neutral, keep, instead)
        return self._concepts[key]

    def erase(
        self, concept: Concept, strength: float = 1.0, options: CREOptions = DEFAULTS, model: Any = None, **where: Any
    ) -> Any:
        """The MODEL with CRE on `concept`."""
        return add_edit(model or self.model, EditSpec("projection", concept, strength, options=options, **where))

    def pictures(self, model: Any, prompts: Sequence[str | Any], seed: int = 0, negative: str = "") -> Tensor:
        """One picture a prompt (text or CONDITIONING), [n, 3, 128, 128] in [0, 1]; picture i always gets noise i."""
        conds = [self.encode(p) if isinstance(p, str) else p for p in prompts]
        how = Sampling(self.steps, CFG, SAMPLER, SCHEDULER, BATCH)
        return pictures(model, self.vae, conds, self.encode(negative), (4, 16, 16), how, seed)

    def verdicts(self, model: Any, prompts: Sequence[str | Any], seed: int = 0, negative: str = "") -> list[Testimony]:
        return testify(load_witness(), self.pictures(model, prompts, seed, negative))


@cache
def demo() -> Demo:
    """The one that all tables share; the first pays for its loading."""
    return Demo.ready()


def object_prompts(names: Sequence[str], count: int, seed: int) -> list[world.Picture]:
    """`count` captions that name one object of `names` in turn, with and without a style and a background."""
    rng = random.Random(seed)
    return [
        world.one_object(
            rng,
            names[i % len(names)],
            world.maybe(rng, 0.5, world.NAMED_STYLES),
            world.maybe(rng, 0.5, world.BACKGROUNDS),
        )
        for i in range(count)
    ]


def style_prompts(style: str, count: int, seed: int) -> list[world.Picture]:
    """`count` captions in one style, over all objects."""
    rng = random.Random(seed)
    names = rng.sample(list(world.OBJECTS), len(world.OBJECTS))
    return [
        world.one_object(rng, names[i % len(names)], style, world.maybe(rng, 0.5, world.BACKGROUNDS))
        for i in range(count)
    ]
