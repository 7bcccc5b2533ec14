"""What a run's account costs: whole edited runs with it and without, in turns, by the CPU time of the process.

Without: the engine does all that it does, and nobody counts. The CPU time of one process leaves out what else runs on
the machine; each run with an account is compared with those before and after it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import comfy.sample
import torch
from torch import Tensor

from ..editing.engine import host
from ..editing.engine import run as runs
from ..editing.engine.account import Account
from ..editing.engine.host import add_edit
from .overhead import SHAPE, cre
from .sampling import CFG, SAMPLER, SCHEDULER, demo
from .shapes import build, conditioning
from .table import Row, Table

GOAL = 1.005


class Silent(Account):
    """An account that nothing is put down in."""

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    due = called = acted = guided = predicted = guided_to = _nothing


# Everything that only the account needs: in a step, and, the last, when the run has ended.
COUNTING: tuple[tuple[Any, str], ...] = (
    *((Account, name) for name in ("called", "acted", "guided", "predicted", "guided_to")),
    (runs.Call, "note"),
    (runs.Run, "due"),
    (Account, "close"),
    (host, "settle"),
)


class Clock:
    """Adds up the CPU time that functions take, or, empty, what it takes to ask for the time where they are called."""

    def __init__(self, empty: bool = False) -> None:
        self.empty, self.spent = empty, 0.0

    def on(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def clocked(*args: Any, **more: Any) -> Any:
            start = time.process_time()
            made = None if self.empty else function(*args, **more)
            self.spent += time.process_time() - start
            return function(*args, **more) if self.empty else made

        return clocked

    def seconds(self, run: Callable[[], Tensor]) -> float:
        self.spent = 0.0
        with ExitStack() as patched:
            for owner, name in COUNTING:
                patched.enter_context(patch.object(owner, name, self.on(getattr(owner, name))))
            run()
        return self.spent


def share(run: Callable[[], Tensor], rounds: int) -> float:
    """Of the CPU time, what goes by while the account counts: less than the noise of pairs."""
    times = [(Clock().seconds(run), Clock(empty=True).seconds(run), seconds(run)[1]) for _ in range(rounds)]
    counted, asked, whole = map(sum, zip(*times, strict=True))
    return (counted - asked) / whole


def uncounted(run: Callable[[], Tensor]) -> Tensor:
    silent = ((runs, "Account", Silent), (runs.Call, "note", Silent._nothing), (runs.Run, "due", Silent._nothing))
    with ExitStack() as patched:
        for replaced in silent:
            patched.enter_context(patch.object(*replaced))
        return run()


def seconds(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.process_time()
    return run(), time.process_time() - start


def cost(what: str, run: Callable[[], Tensor], pairs: int) -> Row:
    """run: samples with edits."""
    without = partial(uncounted, run)
    run()  # warms up
    (_, before), ratios, same = seconds(without), [], True
    times = [before]
    for _ in range(pairs):
        first, counted = seconds(run)
        second, after = seconds(without)
        ratios.append(2 * counted / (before + after))
        same = same and torch.equal(first, second)
        before = after
        times.append(after)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "runs of": what,
        "CPU time over a run without": middle,
        "quartiles": f"{low:.4f}-{high:.4f}",
        "pairs": pairs,
        "goal": GOAL,
        "share of its CPU time, by its own clock": share(run, max(1, pairs // 2)),
        "goal of the share": GOAL - 1,
        "a run without, CPU s": statistics.median(times),
        "the same picture": same,
    }


def sampled(model: Any, positive: Any, negative: Any, side: int, steps: int) -> Tensor:
    latent = torch.zeros(1, 4, side, side)
    noise = comfy.sample.prepare_noise(latent, 1)
    return comfy.sample.sample(
        model, noise, steps, CFG, SAMPLER, SCHEDULER, positive, negative, latent, disable_pbar=True, seed=1
    )


def of_demo(steps: int, pairs: int) -> Row:
    own = demo()
    edited = own.erase(own.concept("a beer mug"))
    prompts = own.encode("a beer mug beside a cat"), own.encode("")
    return cost(f"demo model, {steps} steps, CRE", lambda: sampled(edited, *prompts, 16, steps), pairs)


def of_shape(side: int, steps: int, pairs: int) -> Row:
    edited = build(SHAPE)
    for spec in cre(SHAPE, 1):
        edited = add_edit(edited, spec)
    positive, negative = ([[conditioning(SHAPE, 1, seed)[0], {}]] for seed in (1, 2))
    what = f"{SHAPE}'s shape, {side}x{side} latents, {steps} steps, CRE"
    return cost(what, lambda: sampled(edited, positive, negative, side, steps), pairs)


def rows(demo_pairs: int, side: int, pairs: int) -> Iterator[Row]:
    with torch.inference_mode():
        yield of_demo(20 if pairs > 2 else 2, demo_pairs)
        yield of_shape(side, 2, pairs)


TABLES = (
    Table(
        "overhead-account",
        "What the account of a run costs",
        "Whole edited runs over the same runs in which nothing is counted, by the CPU time of the process; each over "
        "those before and after it, medians of pairs in turns. Its own clock: what goes by while it counts, less "
        "what the clock itself takes at the same places.",
        partial(rows, 12, 32, 4),
        partial(rows, 2, 8, 2),
    ),
)
