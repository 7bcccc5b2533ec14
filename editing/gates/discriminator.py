"""Discriminators f: picture or prompt -> [0, 1], how sure it is that the concept is there (CRE paper, section 3.3).

A discriminator is features, which some encoder gives, and a head on them: a linear classifier, a few kilobytes, whose
output is calibrated on examples that it was not trained on (Platt scaling).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.digest import Shared, digest
from ..files.artefacts import Artefact
from ..training.mode import learns
from .augment import perturbed
from .features import Features, squared

LEAST = 4  # examples of a class
BINS = 10
ALIKE = 0.98  # cosine of what two encoders make of the same pattern, from which on they count as one


class Judge(Protocol):
    """Whatever may decide about pictures. models: patchers that the host should have loaded meanwhile."""

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def models(self) -> tuple[Any, ...]: ...
    def scores(self, images: Tensor) -> list[float]:
        """images: [B, h, w, 3] in [0, 1]; returns B numbers from 0 to 1."""


@dataclass(frozen=True, eq=False)
class Head(Shared):
    """sigmoid(w (x - mean) / spread + b). mean, spread, w: [F]; b: [1]; fp32 on the CPU."""

    mean: Tensor
    spread: Tensor
    w: Tensor
    b: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """x: [B, F]; returns [B]."""
        return ((x.float().cpu() - self.mean) / self.spread) @ self.w + self.b

    @cached_property
    def key(self) -> str:
        return digest((self.mean, self.spread, self.w, self.b))


@dataclass(frozen=True)
class Report:
    """What the held-out examples say. pairs: confidence and whether the concept was there, of each of them."""

    accuracy: float
    perturbed: float  # accuracy on spoiled copies
    false_positives: float  # share, at the threshold
    found: float  # share of the concept's examples, at the threshold
    pairs: tuple[tuple[float, bool], ...]

    def text(self, threshold: float) -> str:
        n = len(self.pairs)
        return (
            f"held out: {n} examples, {sum(there for _, there in self.pairs)} of the concept\n"
            f"accuracy at 0.5: {100 * self.accuracy:.1f} %, spoiled {100 * self.perturbed:.1f} %\n"
            f"at threshold {threshold:.3f}: finds {100 * self.found:.1f} %, "
            f"false alarms {100 * self.false_positives:.1f} %"
        )


@dataclass(frozen=True, eq=False)
class Discriminator(Shared):
    """A head on features, and the threshold that its training chose."""

    name: str
    features: Features
    head: Head
    threshold: float = 0.5
    about: dict[str, Any] = field(default_factory=dict)  # how it was trained: JSON
    artefact: Artefact | None = None  # what its file holds, if it came from one

    def __post_init__(self) -> None:
        if len(self.head.w) != self.features.width:
            raise ValueError(
                f'discriminator "{self.name}" was trained on {len(self.head.w)} features, but {self.features.name} '
                f"gives {self.features.width}; connect the encoder that it was trained with"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f'discriminator "{self.name}" has the threshold {self.threshold}, not one from 0 to 1')

    @cached_property
    def key(self) -> str:
        return digest((self.features.key, self.head.key))

    @property
    def models(self) -> tuple[Any, ...]:
        return self.features.models

    @torch.no_grad()
    def scores(self, images: Tensor) -> list[float]:
        """images: [B, h, w, 3] in [0, 1]; B numbers from 0 to 1."""
        if images.ndim != 4 or not len(images) or images.shape[-1] < 3:
            raise ValueError(f"the discriminator looks at pictures [B, h, w, 3], not {list(images.shape)}")
        return self.judge(squared(images, self.features.size))

    def judge(self, x: Tensor) -> list[float]:
        """x: what the features take, pictures [B, 3, size, size]."""
        return torch.sigmoid(self.head.logits(self.features(x))).tolist()


@learns
def fit(x: Tensor, y: Tensor, decay: float = 1e-3, steps: int = 60) -> Head:
    """Logistic regression, each class weighing the same. x: [n, F]; y: [n] of 0 and 1."""
    mean, spread = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    x = (x - mean) / spread
    weight = torch.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    w, b = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    minimise([w, b], lambda: F.binary_cross_entropy_with_logits(x @ w + b, y, weight) + decay * w.square().sum(), steps)
    return Head(mean, spread, w.detach(), b.detach())


@learns
def calibrate(head: Head, x: Tensor, y: Tensor) -> Head:
    """Platt scaling: the head with a slope a and an offset c found on examples that it has not seen, x [n, F], of which
    y [n] says 1 where the concept is there, else 0.

    Their targets are Platt's (n+ + 1) / (n+ + 2) and 1 / (n- + 2), so that a clean split asks for no endless slope.
    """
    z, counts = head.logits(x), (float(y.sum()), float((1 - y).sum()))
    target = torch.where(y > 0, (counts[0] + 1) / (counts[0] + 2), 1 / (counts[1] + 2))
    weight = torch.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    log_a, c = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    minimise([log_a, c], lambda: F.binary_cross_entropy_with_logits(z * log_a.exp() + c, target, weight), 50)
    a = log_a.detach().exp()
    return replace(head, w=head.w * a, b=head.b * a + c.detach())


def minimise(parameters: list[Tensor], loss: Callable[[], Tensor], steps: int) -> None:
    lbfgs = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        lbfgs.zero_grad()
        value = loss()
        value.backward()
        return value

    lbfgs.step(closure)


def threshold_for(scores: Sequence[float], rate: float) -> float:
    """The least threshold that at most `rate` of the scores, of examples without the concept, reach."""
    ordered = sorted(scores, reverse=True)
    allowed = int(rate * len(ordered))
    if allowed >= len(ordered):
        return 0.0
    return min(1.0, ordered[allowed] + 1e-6)


@dataclass(frozen=True)
class Split:
    """Which examples are for what: fit the head, calibrate it and choose the threshold, measure it."""

    fit: list[int]
    calibrate: list[int]
    measure: list[int]


def split(count: int, rng: torch.Generator) -> Split:
    order = torch.randperm(count, generator=rng).tolist()
    held = max(1, count // 5)
    return Split(order[2 * held :], order[:held], order[held : 2 * held])


def train(
    concept: Tensor,
    others: Tensor,
    features: Features,
    name: str = "concept",
    rate: float = 0.01,
    copies: int = 4,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Discriminator, Report]:
    """A discriminator of two classes of pictures, each [n, 3, size, size], and what held-out ones say about it.

    rate: the false positive rate that the threshold is chosen for. copies: spoiled copies of each picture, beside it.
    progress: called after each pass over the pictures; it may raise.
    """
    for what, pictures in (("of the concept", concept), ("of other things", others)):
        if len(pictures) < LEAST:
            raise ValueError(f"{len(pictures)} pictures {what} are too few; give at least {LEAST}, better 50 or more")
    if not 0 <= rate < 1:
        raise ValueError(f"false_positive_rate is {rate}; give a number from 0 to below 1")
    rng = torch.Generator().manual_seed(seed)
    splits = [split(len(pictures), rng) for pictures in (concept, others)]

    def of(part: str, spoiled: int, plain: bool = True) -> tuple[Tensor, Tensor]:
        """Features and labels of a part, with so many spoiled copies of each picture."""
        x, y = [], []
        for label, pictures, each in ((1.0, concept, splits[0]), (0.0, others, splits[1])):
            chosen = pictures[getattr(each, part)]
            for batch in [chosen] * plain + [perturbed(chosen, rng) for _ in range(spoiled)]:
                x.append(features(batch).float().cpu())
                y.append(torch.full((len(batch),), label))
                progress()
        return torch.cat(x), torch.cat(y)

    head = calibrate(fit(*of("fit", copies)), *of("calibrate", copies))
    x, y = of("calibrate", copies)
    harmless = torch.sigmoid(head.logits(x[y == 0])).tolist()
    found = Discriminator(name, features, head, threshold_for(harmless, rate))
    return found, measured(found, of("measure", 0), of("measure", 1, plain=False))


def measured(discriminator: Discriminator, clean: tuple[Tensor, Tensor], spoiled: tuple[Tensor, Tensor]) -> Report:
    """Features and labels of held-out examples -> what the discriminator makes of them."""
    head = discriminator.head
    right = [float(((torch.sigmoid(head.logits(x)) >= 0.5) == (y > 0)).float().mean()) for x, y in (clean, spoiled)]
    scores, there = torch.sigmoid(head.logits(clean[0])), clean[1] > 0
    over = (scores >= discriminator.threshold).float()
    pairs = tuple(zip(scores.tolist(), there.tolist(), strict=True))
    return Report(right[0], right[1], float(over[~there].mean()), float(over[there].mean()), pairs)


def reliability(pairs: Sequence[tuple[float, bool]]) -> list[tuple[float, float]]:
    """The calibration plot's points: mean confidence and share of the concept, in each tenth that holds examples."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for score, there in pairs:
        bins[min(BINS - 1, int(score * BINS))].append((score, there))
    return [(sum(s for s, _ in b) / len(b), sum(t for _, t in b) / len(b)) for b in bins if b]


def to_artefact(discriminator: Discriminator) -> Artefact:
    """As its file holds it; of the encoder, the file has what it makes of a fixed pattern alone."""
    if discriminator.artefact is not None:
        return discriminator.artefact
    head, features = discriminator.head, discriminator.features
    tensors = {"mean": head.mean, "spread": head.spread, "w": head.w, "b": head.b, "probe": features.probe}
    training = {**discriminator.about, "threshold": discriminator.threshold}
    return Artefact(
        "discriminator",
        discriminator.name,
        tensors,
        mechanism=features.kind,
        training=training,
        concepts=(discriminator.name,),
    )


def from_artefact(artefact: Artefact, features: Features | None) -> Discriminator:
    """features: what there is of the kind that the file was trained with. Raises ValueError if they are others."""
    tensors, kind = artefact.tensors, artefact.mechanism
    head = Head(*(tensors[key] for key in ("mean", "spread", "w", "b")))
    threshold = artefact.training.get("threshold")
    if not isinstance(threshold, float) or not 0 <= threshold <= 1 or not (head.spread > 0).all():
        raise ValueError(f'discriminator "{artefact.name}" is damaged (threshold or spread); fetch the file again')
    if features is None or features.kind != kind:
        socket = {"vision": "clip_vision", "text": "clip"}.get(kind)
        mend = f"connect the one that it was trained with to `{socket}`" if socket else "update ConceptGuard"
        raise ValueError(f'discriminator "{artefact.name}" needs an encoder that its file does not hold; {mend}')
    found = Discriminator(artefact.name, features, head, threshold, dict(artefact.training), artefact)
    if float(F.cosine_similarity(tensors["probe"], features.probe, 0)) < ALIKE:
        raise ValueError(
            f'discriminator "{artefact.name}" was trained on other weights than those of {features.name}, whose '
            "features mean other things; connect the one that it was trained with"
        )
    return found
