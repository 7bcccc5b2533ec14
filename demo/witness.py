"""The second judge: what is in a picture, how surely, on which side, and whether it shows any such thing at all.

Each thing has a sigmoid of its own, so that two can be there, or none; "no such thing" is learned from pictures that
only look like one (impostors.py). Kept apart from every gate: no node uses it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from . import impostors, judge, mix, world
from .glyphs import Painter
from .judge import INPUT, Judge, Verdict, rearranged, spoil
from .training import cosine, device, dice, step_with, throw

# The props of scenes are things too: a pub's door may stand there alone.
PROPS = {prop: f"{word}'s prop" for word, (prop, _) in world.SCENES.items()}
THINGS = (*world.OBJECTS, *PROPS.values())
PERSON, NOTHING, NO_SUCH_THING = "person", "nothing", "no such thing"
SEEN = (*THINGS, PERSON, NOTHING, NO_SUCH_THING)
LOOKS = {k: v for k, v in judge.HEADS.items() if k != "objects"}  # style, background, role, gender, tone
THING_OF = {glyph: name for name, glyph in world.OBJECTS.items()} | PROPS

SURE = 0.5
IMPOSTORS = 0.3  # their share of a batch
DECODED = 0.4  # of the pictures in it, the share that an autoencoder gave back
BATCH, RATE = 64, 3e-3


class Witness(nn.Module):
    """[b, 3, h, w] in [0, 1] -> logits: seen [b, 75], left and right [b, 72], and one answer a look."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Judge().trunk
        self.seen, self.side = nn.Linear(512, len(SEEN)), nn.Linear(512, len(THINGS))
        self.looks = nn.ModuleDict({k: nn.Linear(512, len(v)) for k, v in LOOKS.items()})
        # The confidence that 95 % of clean drawings reach (`calibrate`): from there a picture counts as natural.
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(0.5))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and maxima of the trunk over the picture, its left and its right half: [b, 512] each."""
        h = self.trunk(interpolate(x, size=INPUT, mode="area") - 0.5)

        def pooled(h: Tensor) -> Tensor:
            return torch.cat([h.flatten(2).mean(2), h.flatten(2).amax(2)], 1)

        half = h.shape[-1] // 2
        return pooled(h), pooled(h[..., :half]), pooled(h[..., half:])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        whole, left, right = self.features(x)
        out = {"seen": self.seen(whole), "left": self.side(left), "right": self.side(right)}
        return out | {k: head(whole) for k, head in self.looks.items()}


@dataclass(frozen=True)
class Testimony(Verdict):
    """A verdict whose scores are probabilities each, none of which must be high; `found` asks for a sure one."""

    left: str
    right: str
    confidence: float  # of the surest thing or person
    natural: bool

    def found(self, name: str, among: int = 1) -> bool:
        """Whether the witness is sure of `name`, be it alone or beside others."""
        return self.scores[name] >= SURE


def scores_of(logits: dict[str, Tensor]) -> Tensor:
    """Probabilities [b, 75]: that of a thing is lowered by that of no such thing."""
    p = logits["seen"].sigmoid()
    return torch.cat([p[:, :-2] * (1 - p[:, -1:]), p[:, -2:]], 1)


def confidence_of(scores: Tensor) -> Tensor:
    return scores[:, :-2].amax(1)


@torch.no_grad()
def fingerprints(model: Witness, pictures: Tensor) -> Tensor:
    """Features [n, 512] for distances between sets of pictures, of mean square 1 each, so that KID's kernel is that of
    cosines."""
    x = torch.cat([model.features(part.float())[0] for part in pictures.split(64)])
    return x / x.square().mean(1, keepdim=True).sqrt()


@torch.no_grad()
def testify(model: Witness, pictures: Tensor) -> list[Testimony]:
    """Testimonies on pictures [n, 3, h, w] in [0, 1]."""
    out = []
    for x in pictures.split(64):
        logits = model(x.float())
        scores = scores_of(logits)
        sure = confidence_of(scores).tolist()
        order = scores.argsort(1, descending=True).tolist()
        sides = {k: logits[k].argmax(1).tolist() for k in ("left", "right")}
        best = {k: logits[k].argmax(1).tolist() for k in LOOKS}
        out += [
            Testimony(
                tuple(SEEN[j] for j in order[i]),
                dict(zip(SEEN, row, strict=True)),
                **{k: LOOKS[k][best[k][i]] for k in LOOKS},
                **{k: THINGS[sides[k][i]] for k in sides},
                confidence=sure[i],
                natural=sure[i] >= model.threshold.item(),
            )
            for i, row in enumerate(scores.tolist())
        ]
    return out


def any_view(rng: random.Random) -> world.Picture:
    """Half the world's own places, half things elsewhere and at other sizes; a third are people, the hardest task."""
    picture = mix.any_picture(rng)
    if rng.random() < 0.2:
        picture = world.person(rng, *(rng.choice(list(v)) for v in (world.ROLES, world.GENDERS, world.TONES)))
    return picture if rng.random() < 0.5 else rearranged(rng, picture)


def things_in(picture: world.Picture) -> list[str]:
    return [THING_OF[layer.glyph] for layer in picture.layers if layer.glyph in THING_OF]


def targets(pictures: list[world.Picture | None]) -> dict[str, Tensor]:
    """What each head should say; None is a picture of no such thing. Sides (-1: any answer) tell of pairs alone."""
    seen, sides = torch.zeros(len(pictures), len(SEEN)), torch.full((2, len(pictures)), -1)
    for i, p in enumerate(pictures):
        names = things_in(p) if p else [NO_SUCH_THING]
        names = names or ([PERSON] if p and p.role else [NOTHING])
        for name in names:
            seen[i, SEEN.index(name)] = 1
        if len(names) == 2:
            sides[:, i] = torch.tensor([THINGS.index(name) for name in names])
    out = {"seen": seen, "left": sides[0], "right": sides[1]}
    for k, values in LOOKS.items():
        told = [getattr(p, k) if p else None for p in pictures]
        out[k] = torch.tensor([-1 if v is None else values.index(v) for v in told])
    return out


@dataclass(frozen=True)
class Lessons:
    """Pictures, uint8 [n, 3, INPUT, INPUT], that are made before the training: what edited models left of concepts, and
    drawings as an autoencoder gives them back, with what they show."""

    remains: Tensor | None = None
    decoded: Tensor | None = None
    shown: tuple[world.Picture, ...] = ()


def views(count: int, seed: int) -> tuple[world.Picture, ...]:
    rng = random.Random(seed)
    return tuple(any_view(rng) for _ in range(count))


@torch.no_grad()
def decoded(vae: nn.Module, painter: Painter, pictures: tuple[world.Picture, ...]) -> Tensor:
    """The pictures through the host's encoder and decoder, uint8 [n, 3, INPUT, INPUT]."""
    out = []
    for i in range(0, len(pictures), 8):
        x = torch.stack([painter(p) for p in pictures[i : i + 8]])
        y = vae.decode(vae.encode(2 * x - 1)).add(1).div(2).clamp(0, 1)
        out.append((interpolate(y, size=INPUT, mode="area") * 255).round().to(torch.uint8))
    return torch.cat(out)


def batch_of(
    rng: random.Random, painter: Painter, size: int, lessons: Lessons
) -> tuple[Tensor, list[world.Picture | None]]:
    """Pictures [size, 3, INPUT, INPUT], the first of them of no such thing."""

    def small(picture: world.Picture) -> Tensor:
        return interpolate(painter(picture)[None], size=INPUT, mode="area")[0]

    seen: list[world.Picture | None] = []
    x = []
    for i in range(size):
        picture = any_view(rng)
        if i >= IMPOSTORS * size and lessons.decoded is not None and rng.random() < DECODED:
            j = rng.randrange(len(lessons.decoded))
            x.append(lessons.decoded[j].float() / 255)
            seen.append(lessons.shown[j])
        elif i < IMPOSTORS * size:
            ground = painter.paint((), picture.background)[:, :INPUT, :INPUT]
            x.append(impostors.any_impostor(rng, small(picture), small(any_view(rng)), ground, lessons.remains))
            seen.append(None)
        else:
            x.append(small(picture))
            seen.append(picture)
    return torch.stack(x), seen


def loss_of(logits: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    loss = 75 * binary_cross_entropy_with_logits(logits["seen"], target["seen"])
    for k in ("left", "right", *LOOKS):
        if (target[k] >= 0).any():
            loss = loss + cross_entropy(logits[k], target[k], ignore_index=-1)
    return loss


class WitnessTrainer:
    """`first`: a judge whose trunk learns on."""

    def __init__(
        self,
        painter: Painter,
        steps: int,
        lessons: Lessons = Lessons(),
        first: Judge | None = None,
        seed: int = 1,
    ) -> None:
        torch.manual_seed(seed)
        self.painter, self.lessons, self.steps, self.step = painter, lessons, steps, 0
        self.rng, self.model = random.Random(seed), Witness()
        if first:
            self.model.trunk.load_state_dict(first.trunk.state_dict())
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.02)

    def update(self) -> Tensor:
        x, views = batch_of(self.rng, self.painter, BATCH, self.lessons)
        with torch.autocast(device().type, torch.bfloat16):
            logits = self.model(spoil(x))
        loss = loss_of({k: v.float() for k, v in logits.items()}, targets(views))
        loss.backward()
        step_with(self.opt, cosine(self.step, self.steps, RATE))
        self.step += 1
        return loss.detach()

    def state(self) -> dict[str, Any]:
        return dice(self.rng) | {
            "step": self.step,
            "model": self.model.state_dict(),
            "opt": self.opt.state_dict(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        throw(state, self.rng)


@torch.no_grad()
def calibrate(model: Witness, painter: Painter, count: int = 2000, seed: int = 77) -> Witness:
    """Set the threshold to the confidence that 95 % of clean drawings reach, placed as the world places them."""
    rng, sure = random.Random(seed), []
    for _ in range(0, count, 50):
        x = torch.stack([painter(mix.any_picture(rng)) for _ in range(50)])
        sure.append(confidence_of(scores_of(model(x))))
    model.threshold.fill_(torch.cat(sure).quantile(0.05))
    return model


@torch.no_grad()
def blind_spots(model: Witness, painter: Painter, count: int = 200, seed: int = 99) -> dict[str, float]:
    """Shares on pictures that fooled the first judge, and on unseen drawings: of clean ones named right, of discs named
    at more than 0.6, of drawings named right though shuffled, of pairs whose concept is seen, on its side."""
    rng = random.Random(seed)
    ones = [
        world.one_object(rng, rng.choice(list(world.OBJECTS)), rng.choice(world.NAMED_STYLES)) for _ in range(count)
    ]
    pairs = [world.two_objects(rng, *rng.sample(list(world.OBJECTS), 2)) for _ in range(count)]
    clean = torch.stack([painter(p) for p in ones])
    grounds = [painter.paint((), rng.choice(list(world.BACKGROUNDS))) for _ in range(count)]
    discs = torch.stack([impostors.shape(rng, ground) for ground in grounds])
    mixed = torch.stack([impostors.shuffled(rng, x, 4) for x in clean])
    seen, disc, shuffle = (testify(model, x) for x in (clean, discs, mixed))
    of_pairs = testify(model, torch.stack([painter(p) for p in pairs]))
    return {
        "clean drawings named": sum(v.found(p.objects[0]) for p, v in zip(ones, seen, strict=True)) / count,
        "clean styles named": sum(v.style == p.style for p, v in zip(ones, seen, strict=True)) / count,
        "discs named": sum(v.confidence > 0.6 for v in disc) / count,
        "shuffled named right": sum(v.found(p.objects[0]) for p, v in zip(ones, shuffle, strict=True)) / count,
        "pairs seen": sum(v.found(p.objects[0]) for p, v in zip(pairs, of_pairs, strict=True)) / count,
        "sides right": sum((v.left, v.right) == p.objects for p, v in zip(pairs, of_pairs, strict=True)) / count,
        "natural": sum(v.natural for v in (*seen, *of_pairs)) / (2 * count),
    }
