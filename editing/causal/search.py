"""The causal period of a concept: the steps in which an edit has to act (CRE paper, definition 2 and algorithm 1).

Steps count from the noisiest, 0. f(a, b) is the discriminator's confidence in pictures whose steps a..b-1 were edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Confidence = Callable[[int, int], float]
Probe = tuple[int, int, float]  # a, b, f(a, b)

# Samplers that call the model once a step and remember nothing: they can go on from any step's latent. Others keep
# earlier predictions, draw noise in an order, or look at noise levels beyond their step, where an edit may not act.
MEMORYLESS = ("euler", "ddim", "euler_cfg_pp")


@dataclass(frozen=True)
class Period:
    """Steps start..end-1 of `steps`, and every window that was looked at on the way."""

    start: int
    end: int
    steps: int
    probes: tuple[Probe, ...] = ()


def assess_with_exclusion(f: Confidence, steps: int, delta: float = 0.0) -> Period:
    """Algorithm 1: leave out steps from the start while that raises f by no more than delta, then from the end.

    The printed inequality has delta on the other side, against its own prose; at the paper's delta, 0, both agree.

    No window that it looks at can be skipped: nothing is known of f. Of S steps, a share p left out at the start and q
    at the end, runs that share their prefixes (below) take (p - p^2/2 + q^2/2) / 2(p + q) of the printed algorithm's
    model calls, S being large: (1 - p/2) / 2 where nothing is left out at the end, a quarter for p = q.
    """
    probes: list[Probe] = []

    def look(a: int, b: int) -> float:
        probes.append((a, b, f(a, b)))
        return probes[-1][2]

    a, b = 0, steps
    now = look(a, b)
    while a + 1 < b and (then := look(a + 1, b)) <= now + delta:
        a, now = a + 1, then
    while a + 1 < b and (then := look(a, b - 1)) <= now + delta:
        b, now = b - 1, then
    return Period(a, b, steps, tuple(probes))


def bisect(f: Confidence, steps: int, delta: float = 0.0) -> Period:
    """The same by halving, assuming that leaving out more steps never lowers f.

    Where f is so and delta is 0 the answer is algorithm 1's; else it is a window at whose ends f rises above that of
    the whole run by more than delta (algorithm 1 lets every step raise it by delta).
    """
    probes: list[Probe] = []

    def look(a: int, b: int) -> float:
        probes.append((a, b, f(a, b)))
        return probes[-1][2]

    whole = look(0, steps)
    a = last(lambda k: look(k, steps) <= whole + delta, steps - 1)
    b = steps - last(lambda k: look(a, steps - k) <= whole + delta, steps - a - 1)
    return Period(a, b, steps, tuple(probes))


def last(holds: Callable[[int], bool], most: int) -> int:
    """The greatest k from 0 to `most` for which it holds, if it holds up to there; it does for 0."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def windows(steps: int) -> Iterator[tuple[int, int]]:
    return ((a, b) for a in range(steps) for b in range(a + 1, steps + 1))


def is_causal(f: Confidence, start: int, end: int, steps: int, delta: float = 0.0) -> bool:
    """Definition 2 by brute force: no other window, as long or shorter, is below f(start, end) + delta."""
    least = f(start, end) + delta
    others = (w for w in windows(steps) if w != (start, end) and w[1] - w[0] <= end - start)
    return all(f(*w) >= least for w in others)


def naive_calls(probes: Sequence[Probe], steps: int, literal: bool = False) -> int:
    """Model calls of the algorithm that samples every window from noise; `literal`: both sides of each comparison,
    as algorithm 1 is printed, rather than what it has seen before."""
    return steps * (2 * (len(probes) - 1) if literal else len(probes))


@dataclass
class Prefixes:
    """Latents of runs, by what was done up to there, so that runs share what they have in common.

    go_on: from the latent before step i, the edited steps (a, b), to the latents before steps i+1, .., steps.
    """

    go_on: Callable[[Tensor, int, tuple[int, int]], list[Tensor]]
    first: Tensor
    steps: int
    share: bool = True
    calls: int = 0
    known: dict[str, Tensor] = field(default_factory=dict)

    def run(self, a: int, b: int) -> Tensor:
        """The latent at the end of a run whose steps a..b-1 are edited."""
        history = "-" * a + "#" * (b - a) + "-" * (self.steps - b)
        i = next((i for i in range(self.steps, 0, -1) if history[:i] in self.known), 0) if self.share else 0
        if i == self.steps:
            return self.known[history]
        found = self.go_on(self.known[history[:i]] if i else self.first, i, (a, b))
        self.calls += self.steps - i
        if self.share:
            self.known |= {history[: i + n + 1]: x for n, x in enumerate(found)}
        return found[-1]


def edges(sigmas: Sequence[float], percent_to_sigma: Callable[[float], float]) -> list[float]:
    """The percents that lie between the steps of a schedule: [steps + 1], from 0 before the first to 1 after the last.

    sigmas: the schedule's noise levels, in units of the clean latent, 0 last. A window from edge a to edge b holds the
    steps a..b-1, by the engine's rule sigma(end) < sigma <= sigma(start).
    """
    inner = [between(*pair, percent_to_sigma) for pair in zip(sigmas[:-2], sigmas[1:-1], strict=True)]
    return [0.0, *inner, 1.0]


def between(high: float, low: float, percent_to_sigma: Callable[[float], float]) -> float:
    """A percent, of as few digits as will do, whose sigma lies between: low <= sigma < high."""
    p, q = 0.0, 1.0
    for _ in range(60):
        middle = (p + q) / 2
        p, q = (middle, q) if percent_to_sigma(middle) >= high else (p, middle)
    upper, lower = p, 1.0
    for _ in range(60):
        middle = (upper + lower) / 2
        upper, lower = (middle, lower) if percent_to_sigma(middle) >= low else (upper, middle)
    middle = (p + upper) / 2
    for digits in range(3, 12):
        if low <= percent_to_sigma(short := round(middle, digits)) < high:
            return short
    return middle
