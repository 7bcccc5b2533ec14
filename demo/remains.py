"""What is left where a concept was erased: pictures of an edited demo model, from which the witness learns what no such
thing looks like."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..editing.edits.concept import concept_from_text
from ..editing.edits.spec import EditSpec
from ..editing.engine.host import add_edit
from ..editing.methods.cre import DEFAULTS
from . import world
from .draw import draw
from .judge import INPUT, judge
from .load import load_judge
from .training import saved

STRENGTHS = (1.0, 1.25, 1.25, 2.0)
NAMED = 0.7  # what the first judge names more surely than this may be a picture after all


def captions(rng: random.Random, name: str, count: int) -> list[str]:
    """Prompts that hold an object, a quarter of them beside another."""
    others = [each for each in world.OBJECTS if each != name]
    pairs = [world.two_objects(rng, *rng.sample([name, rng.choice(others)], 2)) for _ in range(count // 4)]
    styles, grounds = (*world.NAMED_STYLES, None), (*world.BACKGROUNDS, None)
    ones = [world.one_object(rng, name, rng.choice(styles), rng.choice(grounds)) for _ in range(count - len(pairs))]
    return [picture.caption for picture in (*ones, *pairs)]


def drawn_without(demo: tuple[Any, Any, Any], rng: random.Random, name: str, count: int) -> Tensor:
    """Pictures of prompts with `name` from the model without it, those that nothing can be named in."""
    unet, clip, _ = demo
    concept = concept_from_text(clip, name, keep=world.NEIGHBOURS.get(name, "") if rng.random() < 0.7 else "")
    edited = add_edit(unet, EditSpec("projection", concept, rng.choice(STRENGTHS), options=DEFAULTS))
    x = draw(demo, captions(rng, name, count), rng.randrange(2**31), edited)
    left = [max(v.scores[n] for n in world.OBJECTS) <= NAMED for v in judge(load_judge(), x)]
    return interpolate(x[torch.tensor(left)], size=INPUT, mode="area")


def remains(demo: tuple[Any, Any, Any], path: Path, each: int = 16, seed: int = 0) -> Tensor:
    """uint8 [n, 3, INPUT, INPUT], a handful for every hazard and some other objects; kept in `path`, name by name."""
    names = (*world.HAZARDS, "cat", "guitar", "carrot", "rocket", "apple", "book")
    done: dict[str, Tensor] = torch.load(path, weights_only=True) if path.exists() else {}
    for i, name in enumerate(names):
        if name not in done:
            x = drawn_without(demo, random.Random(seed + i), name, each)
            done[name] = (x * 255).round().to(torch.uint8)
            saved(path, done)
            print(f"remains of {name}: {len(x)} of {each}", flush=True)
    return torch.cat(list(done.values()))
