"""Causal periods: what a search costs, whether definition 2 holds, and what editing in the period alone does."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import comfy.samplers
import torch

from ..demo import world
from ..editing.causal.search import Period, assess_with_exclusion, is_causal, naive_calls, windows
from ..editing.edits.spec import EditSpec
from ..editing.methods.cre import DEFAULTS
from ..jobs.search import Task, prompts_of
from .erasure import STRENGTH, named, natural
from .gates import GOVERNED, shipped
from .sampling import CFG, SAMPLER, SCHEDULER, STEPS, Demo, demo, object_prompts
from .table import Rate, Row, Table

DELTA = 0.02


def task(
    demo: Demo, name: str, steps: int, seeds: int, delta: float, search: str = "exclusion", seed: int = 11
) -> Task:
    """A search over `seeds` pictures of each of the world's styles, as the node makes it."""
    sigmas = comfy.samplers.KSampler(demo.model, steps, "cpu", SAMPLER, SCHEDULER).sigmas
    spec = EditSpec("projection", demo.concept(name), STRENGTH, options=DEFAULTS, node="bench")
    latent = {"samples": torch.zeros(seeds, 4, 16, 16)}
    rng = random.Random(seed)
    styles = (None, *world.NAMED_STYLES)
    prompts = prompts_of([demo.encode(world.one_object(rng, name, style).caption)[0] for style in styles])
    return Task(
        demo.model,
        spec,
        shipped(name),
        prompts,
        demo.encode(""),
        demo.vae,
        latent,
        seed,
        CFG,
        SAMPLER,
        sigmas,
        delta,
        search,
    )


@cache
def costs(
    demo: Demo, names: tuple[str, ...], steps: int, seeds: int, delta: float
) -> tuple[list[Row], dict[str, Period]]:
    """Periods found step by step and by halving, and the model calls of each; and the periods themselves, in which
    another table edits."""
    rows: list[Row] = []
    periods: dict[str, Period] = {}
    for name in names:
        exact, calls = task(demo, name, steps, seeds, delta).found()
        halved, few = task(demo, name, steps, seeds, delta, "bisection").found()
        literal = naive_calls(exact.probes, steps, literal=True)
        rows.append(
            {
                "concept": name,
                "steps": steps,
                "period": f"{exact.start}-{exact.end - 1}",
                "by halving": f"{halved.start}-{halved.end - 1}",
                "calls, as printed": literal,
                "sampling each window once": naive_calls(exact.probes, steps) / literal,
                "sharing steps": calls / literal,
                "halving": few / literal,
            }
        )
        periods[name] = exact
    return rows, periods


def definition(demo: Demo, names: Sequence[str], seeds: int, delta: float, steps: int = 10) -> Iterator[Row]:
    """All windows of a short schedule: is what algorithm 1 finds causal in the sense of definition 2?"""
    for name in names:
        table: dict[tuple[int, int], float] = {}
        every = task(demo, name, steps, seeds, delta)

        def all_windows(f: Any, count: int, delta: float = 0.0, table: Any = table) -> Any:
            table |= {w: f(*w) for w in windows(count)}
            return assess_with_exclusion(lambda a, b: table[a, b], count, delta)

        found, calls = every.found(find=all_windows)
        length = found.end - found.start
        best = min((w for w in table if w[1] - w[0] <= length), key=lambda w: table[w])
        causal = is_causal(partial(confidence_in, table), found.start, found.end, steps, -delta)
        yield {
            "concept": name,
            "found": f"{found.start}-{found.end - 1}",
            "confidence": table[found.start, found.end],
            "best window as short": f"{best[0]}-{best[1] - 1}",
            "its confidence": table[best],
            "causal within delta": causal,
            "windows": len(table),
            "model calls": calls,
        }


def confidence_in(table: dict[tuple[int, int], float], a: int, b: int) -> float:
    return table[a, b]


def editing_in(demo: Demo, periods: Mapping[str, Period], count: int) -> Iterator[Row]:
    """Erasure and what survives: everywhere, in the period, and in random windows as long as it (appendix J)."""
    rng = random.Random(0)
    for name, found in periods.items():
        steps, length = found.steps, found.end - found.start
        percents = task(demo, name, steps, 1, 0.0).percents
        elsewhere = [a for a in range(steps - length + 1) if a != found.start]
        starts = rng.sample(elsewhere, min(2, len(elsewhere)))
        places = {
            "no edit": None,
            "every step": (0, steps),
            "causal period": (found.start, found.end),
            **{f"random {i + 1}": (a, a + length) for i, a in enumerate(starts)},
        }
        own = object_prompts([name], count, 3)
        rest = object_prompts([n for n in world.OBJECTS if n != name], count, 4)
        for place, window in places.items():
            model = demo.model
            if window is not None:
                start, end = (percents[edge] for edge in window)
                model = demo.erase(demo.concept(name), STRENGTH, start_percent=start, end_percent=end)
            seen = demo.verdicts(model, [p.caption for p in own + rest], 3)
            yield {
                "concept": name,
                "edited in": place,
                "steps": "" if window is None else f"{window[0]}-{window[1] - 1}",
                "edited steps": 0.0 if window is None else (window[1] - window[0]) / steps,
                "concept found": Rate.of([v.found(name) for v in seen[:count]]),
                "natural": natural(seen[:count]),
                "others found": named(rest, seen[count:]),
            }


def searched(names: tuple[str, ...], steps: int, seeds: int, long: int) -> Iterator[Row]:
    yield from costs(demo(), names, steps, seeds, DELTA)[0]
    yield from costs(demo(), names, long, 1, DELTA)[0]


def edited(names: tuple[str, ...], steps: int, seeds: int, count: int) -> Iterator[Row]:
    return editing_in(demo(), costs(demo(), names, steps, seeds, DELTA)[1], count)


def every_window(names: tuple[str, ...], steps: int) -> Iterator[Row]:
    return definition(demo(), names, 1, DELTA, steps)


TABLES = (
    Table(
        "causal-period",
        "Causal periods: what a search costs",
        f"Model calls over those of algorithm 1 as printed. CRE at strength {STRENGTH:g}, delta {DELTA:g}, in eight "
        "pictures: two seeds of four prompts, three of them a style's; one seed of each where there are 50 steps.",
        partial(searched, GOVERNED, STEPS, 2, 50),
        partial(searched, GOVERNED[:1], 6, 1, 8),
    ),
    Table(
        "causal-edit",
        "Causal periods: editing in them alone",
        "In the causal period, everywhere, in random windows as long; pictures of other seeds than those searched.",
        partial(edited, GOVERNED, STEPS, 2, 50),
        partial(edited, GOVERNED[:1], 6, 1, 4),
    ),
    Table(
        "causal-definition",
        "Causal periods: definition 2 by brute force",
        "All windows of 10 steps, one seed of each prompt.",
        partial(every_window, GOVERNED, 10),
        partial(every_window, GOVERNED[:1], 4),
    ),
)
