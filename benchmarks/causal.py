"""Causal periods: what a search costs, whether definition 2 holds, and what editing in the period alone does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import comfy.samplers
import torch

from ..demo import world
from ..editing.causal import assess_with_exclusion, is_causal, naive_calls, windows
from ..editing.cre import DEFAULTS
from ..editing.spec import EditSpec
from ..nodes.causal_period import Task
from .erasure import named
from .gates import shipped
from .sampling import CFG, SAMPLER, SCHEDULER, Demo, Rate, object_prompts

Row = dict[str, Any]


def task(demo: Demo, name: str, steps: int, seeds: int, delta: float, search: str = "exclusion",
         seed: int = 11) -> Task:
    sigmas = comfy.samplers.KSampler(demo.model, steps, "cpu", SAMPLER, SCHEDULER).sigmas
    spec = EditSpec("projection", demo.concept(name), options=DEFAULTS, node="bench")
    latent = {"samples": torch.zeros(seeds, 4, 16, 16)}
    prompt = demo.encode(f"{world.article(name)} in the style of noto")
    return Task(demo.model, spec, shipped(name), prompt, demo.encode(""), demo.vae, latent, seed, CFG, SAMPLER, sigmas,
                delta, search)


def costs(demo: Demo, names: Sequence[str], steps: int, seeds: int, delta: float = 0.02) -> list[Row]:
    """Periods found step by step and by halving, and the model calls of each."""
    rows = []
    for name in names:
        row: Row = {"concept": name, "steps": steps}
        exact, calls = task(demo, name, steps, seeds, delta).found(lambda *_: None)
        halved, few = task(demo, name, steps, seeds, delta, "bisection").found(lambda *_: None)
        naive, literal = naive_calls(exact.probes, steps), naive_calls(exact.probes, steps, literal=True)
        row |= {"period": f"{exact.start}-{exact.end - 1}", "by halving": f"{halved.start}-{halved.end - 1}",
                "calls": calls, "calls by halving": few, "naive calls": naive, "naive, as printed": literal,
                "share of naive": calls / naive, "share as printed": calls / literal,
                "halving, share as printed": few / literal}
        rows.append(row)
    return rows


def definition(demo: Demo, names: Sequence[str], seeds: int, delta: float = 0.02, steps: int = 10) -> list[Row]:
    """All windows of a short schedule: is what algorithm 1 finds causal in the sense of definition 2?"""
    rows = []
    for name in names:
        table: dict[tuple[int, int], float] = {}
        every = task(demo, name, steps, seeds, delta)

        def all_windows(f: Any, count: int, delta: float = 0.0, table: Any = table) -> Any:
            table |= {w: f(*w) for w in windows(count)}
            return assess_with_exclusion(lambda a, b: table[a, b], count, delta)

        found, calls = every.found(lambda *_: None, all_windows)
        length = found.end - found.start
        best = min((w for w in table if w[1] - w[0] <= length), key=lambda w: table[w])
        causal = is_causal(partial(confidence_in, table), found.start, found.end, steps, -delta)
        rows.append({"concept": name, "found": f"{found.start}-{found.end - 1}",
                     "confidence": table[found.start, found.end], "best window as short": f"{best[0]}-{best[1] - 1}",
                     "its confidence": table[best], "causal within delta": causal, "windows": len(table),
                     "model calls": calls})
    return rows


def confidence_in(table: dict[tuple[int, int], float], a: int, b: int) -> float:
    return table[a, b]


def editing_in(demo: Demo, names: Sequence[str], steps: int, seeds: int, count: int, delta: float = 0.02) -> list[Row]:
    """Erasure and what survives: everywhere, in the period, and in random windows as long as it (appendix J)."""
    rng, rows = random.Random(0), []
    for name in names:
        asked = task(demo, name, steps, seeds, delta)
        found, _ = asked.found(lambda *_: None)
        length = found.end - found.start
        elsewhere = [a for a in range(steps - length + 1) if a != found.start]
        starts = rng.sample(elsewhere, min(3, len(elsewhere)))
        places = {"no edit": None, "every step": (0, steps), "causal period": (found.start, found.end),
                  **{f"random {i + 1}": (a, a + length) for i, a in enumerate(starts)}}
        own = object_prompts([name], count, 3)
        rest = object_prompts([n for n in world.OBJECTS if n != name], count, 4)
        for place, window in places.items():
            model = demo.model
            if window is not None:
                start, end = (asked.percents[edge] for edge in window)
                model = demo.erase(demo.concept(name), start_percent=start, end_percent=end)
            seen = demo.verdicts(model, [p.caption for p in own + rest], 3)
            rows.append({"concept": name, "edited in": place,
                         "steps": "" if window is None else f"{window[0]}-{window[1] - 1}",
                         "edited steps": 0.0 if window is None else (window[1] - window[0]) / steps,
                         "concept found": Rate.of([v.found(name) for v in seen[:count]]),
                         "others found": named(rest, seen[count:])})
    return rows
