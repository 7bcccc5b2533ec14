"""Which reading of CRE's equation 4 works best, and how alike A and A-tilde are: what CREOptions' defaults rest on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..demo import world
from ..editing.cre import DEFAULTS, CREOptions
from ..editing.run import OBSERVER
from .erasure import named
from .sampling import Demo, Rate, object_prompts, style_prompts

PRINTED = CREOptions(width="full", tokens="all", baseline="none", negative="keep", solve="sum")  # eq. 4 as it stands
READINGS: dict[str, tuple[CREOptions, float]] = {
    "as printed": (PRINTED, 1.0),
    "per head": (replace(PRINTED, width="head"), 1.0),
    "own tokens": (replace(PRINTED, tokens="own"), 1.0),
    "empty prompt subtracted": (replace(PRINTED, baseline="empty"), 1.0),
    "empty, clipped": (replace(PRINTED, baseline="empty", negative="clip"), 1.0),
    "empty, clipped, per head": (replace(PRINTED, baseline="empty", negative="clip", width="head"), 1.0),
    "empty, clipped, own tokens": (replace(PRINTED, baseline="empty", negative="clip", tokens="own"), 1.0),
    "as printed, strength 2": (PRINTED, 2.0),
    "own tokens, strength 2": (replace(PRINTED, tokens="own"), 2.0),
    "empty, clipped, strength 1.5": (replace(PRINTED, baseline="empty", negative="clip"), 1.5),
    "empty, clipped, strength 2": (replace(PRINTED, baseline="empty", negative="clip"), 2.0),
    "empty, clipped, per head, strength 2": (replace(PRINTED, baseline="empty", negative="clip", width="head"), 2.0),
}


def compare(demo: Demo, concepts: Sequence[str] = ("beer mug", "kitchen knife", "skull"), style: str = "noto",
            count: int = 16, seed: int = 5) -> list[dict[str, Any]]:
    """For each reading: what is left of three objects and a style, and what is left of everything else."""
    others = object_prompts([n for n in world.OBJECTS if n not in concepts], 32, seed)
    rows = []
    for name, (options, strength) in READINGS.items():
        left, kept, styled = [], [], []
        for text in concepts:
            edited = demo.erase(demo.concept(text), strength, options)
            own = object_prompts([text], count, seed)
            found = demo.verdicts(edited, [p.caption for p in own + others], seed)
            left += [v.found(text) for v in found[:count]]
            kept += [v.found(p.objects[0]) for p, v in zip(others, found[count:], strict=True)]
        own = style_prompts(style, count, seed)
        edited = demo.erase(demo.concept(f"in the style of {style}"), strength, options)
        styled = [v.style == style for v in demo.verdicts(edited, [p.caption for p in own], seed)]
        rows.append({"reading": name, "strength": strength, "object left": Rate.of(left),
                     "others found": Rate.of(kept), "style left": Rate.of(styled)})
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    unedited = named(others, demo.verdicts(demo.model, [p.caption for p in others], seed))
    return [{"reading": "unedited", "strength": 0.0, "object left": "", "others found": unedited, "style left": ""},
            *rows]


def cosines(demo: Demo, concept: str, count: int = 8, seed: int = 6) -> dict[str, dict[str, float]]:
    """Mean cosine between A and A-tilde per block, over positions and steps: on prompts that name the concept, on
    others, and on the latter after the empty prompt's attention is subtracted from both."""
    prompts = {"named": object_prompts([concept], count, seed),
               "others": object_prompts([n for n in world.OBJECTS if n != concept], count, seed)}
    out: dict[str, dict[str, float]] = defaultdict(dict)
    for label, pictures in prompts.items():
        for baseline in ("none", "empty"):
            sums: dict[str, list[float]] = defaultdict(list)

            def observe(A: Any, At: Any, A0: Any, block: Any, sums: Any = sums, **_: Any) -> None:
                a, x = A.flatten(-2).float(), At[0].flatten(-2).float()
                if A0 is not None:
                    a, x = a - A0.flatten(-2), x - A0.flatten(-2)
                sums[".".join(map(str, block))].append(torch.cosine_similarity(a, x, -1).mean().item())

            edited = demo.erase(demo.concept(concept), 1e-6, replace(DEFAULTS, baseline=baseline))
            edited.model_options["transformer_options"][OBSERVER] = observe
            demo.pictures(edited, [p.caption for p in pictures], seed)
            for block, values in sums.items():
                out[block][f"{label}, {baseline}"] = sum(values) / len(values)
    return dict(out)
