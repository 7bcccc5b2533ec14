"""CASteer (ICLR 2026) as far as the table of erasers needs it: a trial, not a node.

In every cross-attention and at every step a unit vector s: the mean of what the picture finds in prompts with the
concept, less that in the same prompts without it. Then c <- c - beta max(<s, c>, 0) s behind the attention's output,
beta 2, in the conditional half alone, as the authors' later code has it. The pairs are two things and one of them; for
a style, a caption with it and without.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..demo import world
from ..editing.edits.spec import Concept
from .sampling import Demo

PAIRS, SEED, BETA = 10, 900, 2.0
Place = tuple[Any, ...]  # a block, its attention and the noise level


def place(extra: Mapping[str, Any]) -> Place:
    return (*extra["block"], extra["block_index"], round(float(extra["sigmas"][0]), 4))


def conditional(n: Tensor, extra: Mapping[str, Any]) -> slice:
    """Its rows in the batch."""
    parts = list(extra["cond_or_uncond"])
    each = len(n) // len(parts)
    return slice(parts.index(0) * each, (parts.index(0) + 1) * each)


def pairs(name: str) -> tuple[list[str], list[str]]:
    """Captions with the concept, and the same without it."""
    rng = random.Random(SEED)
    others = [thing for thing in world.OBJECTS if thing not in (name, world.NEIGHBOURS.get(name))]
    things = rng.sample(others, PAIRS)
    without = [world.one_object(rng, thing, "plain").caption for thing in things]
    if name in world.STYLES:
        return [world.one_object(rng, thing, name).caption for thing in things], without
    return [world.two_objects(rng, thing, name).caption for thing in things], without


def means(demo: Demo, captions: Sequence[str]) -> dict[Place, Tensor]:
    """Of what is found at every place, over pictures and their positions: [D] each."""
    found: dict[Place, Tensor] = {}

    def look(n: Tensor, extra: dict[str, Any]) -> Tensor:
        found[place(extra)] = n[conditional(n, extra)].float().mean((0, 1))
        return n

    model = demo.model.clone()
    model.set_model_attn2_output_patch(look)
    demo.pictures(model, captions, SEED)
    return found


class Steering:
    """The host's attn2_output_patch."""

    def __init__(self, demo: Demo, name: str) -> None:
        with_it, without = (means(demo, captions) for captions in pairs(name))
        self.vectors = {at: F.normalize(m - without[at], dim=0) for at, m in with_it.items()}

    def __call__(self, n: Tensor, extra: dict[str, Any]) -> Tensor:
        s, rows, n = self.vectors[place(extra)], conditional(n, extra), n.clone()
        n[rows] -= BETA * (n[rows] @ s).clamp_min(0)[..., None] * s
        return n


def steered(demo: Demo, model: Any, concept: Concept) -> Any:
    """A MODEL steered away from a concept whose text names a thing or a style of the demo world."""
    known = (*world.OBJECTS, *world.NAMED_STYLES)
    name = max((each for each in known if each in concept.phrases[0].text), key=len)
    steering = Steering(demo, name)
    if not steering.vectors:
        raise ValueError("CASteer steers what cross-attentions find, and this model has none")
    model = model.clone()
    model.set_model_attn2_output_patch(steering)
    return model


def carried(model: Any) -> int:
    """Bytes of a MODEL's vectors."""
    patches = model.model_options["transformer_options"].get("patches", {}).get("attn2_output_patch", ())
    vectors = [v for patch in patches if isinstance(patch, Steering) for v in patch.vectors.values()]
    return sum(v.numel() * 4 for v in vectors)
