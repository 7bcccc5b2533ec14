"""The judge: a classifier that says what is in a picture. It is never used as a gate, and learns from pictures placed,
scaled and spoiled in ways that the generator never sees."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from . import world
from .glyphs import Painter

NOTHING = "nothing"  # what a picture of a person, or an empty one, shows among the objects
HEADS: dict[str, tuple[str, ...]] = {
    "objects": (*world.OBJECTS, NOTHING),
    "style": tuple(world.STYLES),
    "background": tuple(world.BACKGROUNDS),
    "role": tuple(world.ROLES),
    "gender": tuple(world.GENDERS),
    "tone": tuple(world.TONES),
}
INPUT = 64  # pixels; larger pictures are scaled down
SIZES = (44, 52, 60, 72, 84, 92, 100, 108)


class Judge(nn.Module):
    """[b, 3, h, w] in [0, 1] -> {head: logits [b, n]}; two objects in a picture share the objects' softmax."""

    def __init__(self) -> None:
        super().__init__()

        def conv(i: int, o: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

        self.trunk = nn.Sequential(
            *conv(3, 24, 2),
            *conv(24, 48, 2),
            *conv(48, 96, 1),
            *conv(96, 192, 2),
            *conv(192, 192, 1),
            *conv(192, 256, 2),
        )
        self.heads = nn.ModuleDict({k: nn.Linear(512, len(v)) for k, v in HEADS.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(interpolate(x, size=INPUT, mode="area") - 0.5).flatten(2)
        h = torch.cat([h.mean(2), h.amax(2)], 1)
        return {k: head(h) for k, head in self.heads.items()}


@dataclass(frozen=True)
class Verdict:
    """What the judge saw in one picture: the objects from most to least certain, and one answer a head."""

    objects: tuple[str, ...]
    scores: dict[str, float]  # object -> probability
    style: str
    background: str
    role: str
    gender: str
    tone: str

    def found(self, name: str, among: int = 1) -> bool:
        """Whether `name` is among the `among` most certain objects (top-1 for a picture of one thing)."""
        return name in self.objects[:among]


@torch.no_grad()
def judge(model: Judge, pictures: Tensor) -> list[Verdict]:
    """Verdicts on pictures [n, 3, h, w] in [0, 1]."""
    out = []
    for x in pictures.split(64):
        logits = model(x.float())
        order = logits["objects"].argsort(1, descending=True).tolist()
        scores = logits["objects"].softmax(1).tolist()
        best = {k: v.argmax(1).tolist() for k, v in logits.items() if k != "objects"}
        names = HEADS["objects"]
        out += [
            Verdict(
                tuple(names[j] for j in order[i]),
                dict(zip(names, scores[i], strict=True)),
                *(HEADS[k][best[k][i]] for k in ("style", "background", "role", "gender", "tone")),
            )
            for i in range(len(x))
        ]
    return out


def rearranged(rng: random.Random, picture: world.Picture) -> world.Picture:
    """The same things elsewhere and at other sizes, now and then with nothing at all."""
    if rng.random() < 0.03:
        return replace(picture, layers=(), objects=(), style=None, role=None, gender=None, tone=None)
    two = len(picture.layers) == 2
    layers = []
    for i, layer in enumerate(picture.layers):
        size = rng.choice(SIZES[:3] if two else SIZES)
        x = rng.randint(-4, max(64 - size, 0) + 4) + 64 * i if two else rng.randint(-6, world.SIZE - size + 6)
        layers.append(replace(layer, size=size, x=x, y=rng.randint(-6, world.SIZE - size + 6)))
    return replace(picture, layers=tuple(layers))


def spoil(x: Tensor) -> Tensor:
    """Blur by scaling down and up, colour and brightness shifts, noise: what a small generator does to a drawing."""
    small = int(torch.randint(18, 90, ()))
    if small < INPUT:
        x = interpolate(interpolate(x, size=small, mode="area"), size=INPUT, mode="bilinear")
    b = len(x)
    x = (x - 0.5) * (0.75 + 0.5 * torch.rand(b, 1, 1, 1)) + 0.5 + 0.1 * torch.randn(b, 3, 1, 1) * torch.rand(b, 1, 1, 1)
    return (x + 0.08 * torch.rand(b, 1, 1, 1) * torch.randn_like(x)).clamp(0, 1)


def labels(pictures: list[world.Picture]) -> dict[str, Tensor]:
    """Targets a head: shares of the objects, class numbers elsewhere (-100 where a picture has none)."""
    out = {"objects": torch.zeros(len(pictures), len(HEADS["objects"]))}
    for i, p in enumerate(pictures):
        for name in p.objects or (NOTHING,):
            out["objects"][i, HEADS["objects"].index(name)] = 1 / max(len(p.objects), 1)
    for head in list(HEADS)[1:]:
        values = [getattr(p, head) for p in pictures]
        out[head] = torch.tensor([-100 if v is None else HEADS[head].index(v) for v in values])
    return out


def any_view(rng: random.Random) -> world.Picture:
    """The world's mix, leaning towards people, whose small details are the judge's hardest task."""
    picture = world.any_picture(rng)
    if rng.random() < 0.3:
        picture = world.person(rng, *(rng.choice(list(v)) for v in (world.ROLES, world.GENDERS, world.TONES)))
    return rearranged(rng, picture)


def train(
    painter: Painter, steps: int, seed: int = 1, batch: int = 64, lr: float = 3e-3, save=lambda model: None
) -> Judge:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = Judge()
    opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
    start = time.time()
    for step in range(steps):
        pictures = [any_view(rng) for _ in range(batch)]
        x = interpolate(torch.stack([painter(p) for p in pictures]), size=INPUT, mode="area")
        target, logits = labels(pictures), model(spoil(x))
        loss = 2 * cross_entropy(logits["objects"], target["objects"])
        for head in list(HEADS)[1:]:
            if (target[head] >= 0).any():
                loss = loss + cross_entropy(logits[head], target[head])
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"judge {step}/{steps} loss {loss.item():.4f} {time.time() - start:.0f}s", flush=True)
            save(model)
    return model.eval()


def accuracy(
    look: Callable[[Tensor], Sequence[Verdict]],
    painter: Painter,
    count: int = 2000,
    seed: int = 99,
    damage: bool = True,
) -> dict[str, float]:
    """Share of right answers a head on `count` renderings of another seed; objects: all of a picture's in the top."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    right: dict[str, list[bool]] = {k: [] for k in HEADS}
    for _ in range(0, count, 64):
        pictures = [any_view(rng) for _ in range(64)]
        x = torch.stack([painter(p) for p in pictures])
        if damage:
            x = spoil(interpolate(x, size=INPUT, mode="area"))
        for p, v in zip(pictures, look(x), strict=True):
            if p.objects:
                right["objects"].append(all(v.found(name, len(p.objects)) for name in p.objects))
            for head in list(HEADS)[1:]:
                if getattr(p, head) is not None:
                    right[head].append(getattr(v, head) == getattr(p, head))
    return {k: sum(v) / len(v) for k, v in right.items()}
