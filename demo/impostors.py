"""Pictures that show no such thing, though a careless judge would name one: what edits and weak models leave behind."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

SHUFFLES = (3, 4, 4, 6, 8)  # patches a side


def _colour(rng: random.Random) -> Tensor:
    return torch.tensor([rng.random() for _ in range(3)]).view(3, 1, 1)


def _mesh(size: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(size) / size
    return at.view(-1, 1), at.view(1, -1)


def _field(rng: random.Random, cells: int, size: int, channels: int) -> Tensor:
    """Smooth noise around 0: `cells` x `cells` numbers scaled up to [channels, size, size]."""
    numbers = torch.randn(1, channels, cells, cells, generator=torch.Generator().manual_seed(rng.getrandbits(40)))
    return interpolate(numbers, size=size, mode="bicubic")[0]


def blend(rng: random.Random, one: Tensor, other: Tensor) -> Tensor:
    """Two drawings half through each other."""
    share = rng.uniform(0.35, 0.65)
    return share * one + (1 - share) * other


def shuffled(rng: random.Random, x: Tensor, cells: int | None = None) -> Tensor:
    """The picture's squares in another order, each elsewhere."""
    n = cells or rng.choice(SHUFFLES)
    side = x.shape[-1] // n
    tiles = x[:, : n * side, : n * side].unfold(1, side, side).unfold(2, side, side).reshape(3, n * n, side, side)
    order = list(range(n * n))
    rng.shuffle(order)
    turn = {a: b for a, b in zip(order, [*order[1:], order[0]], strict=True)}  # one cycle: nothing stays
    tiles = tiles[:, [turn[i] for i in range(n * n)]].view(3, n, n, side, side)
    return interpolate(tiles.permute(0, 1, 3, 2, 4).reshape(1, 3, n * side, n * side), size=x.shape[-1])[0]


def smear(rng: random.Random, x: Tensor) -> Tensor:
    """A drawing whose parts ran: blurred past knowing, or drawn along a field of displacements, or both."""
    size = x.shape[-1]
    if rng.random() < 0.4:
        small = interpolate(x[None], size=rng.randint(4, 8), mode="area")
        return interpolate(small, size=size, mode="bicubic")[0].clamp(0, 1)
    y, u = _mesh(size)
    grid = torch.stack([u.expand(size, size), y.expand(size, size)], -1) * 2 - 1
    moved = grid + rng.uniform(0.35, 0.8) * _field(rng, rng.randint(3, 6), size, 2).permute(1, 2, 0)
    x = grid_sample(x[None], moved[None], padding_mode="border", align_corners=False)
    if rng.random() < 0.6:
        x = interpolate(interpolate(x, size=rng.randint(10, 24), mode="area"), size=size, mode="bilinear")
    return x[0].clamp(0, 1)


def shape(rng: random.Random, ground: Tensor) -> Tensor:
    """A disc, ellipse, ring or box of one colour, or a few, on a ground: what a judge of outlines takes for a thing."""
    size, x = ground.shape[-1], ground
    y, u = _mesh(size)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        a, b = (rng.uniform(0.15, 0.45) for _ in range(2))
        b = a if rng.random() < 0.6 else b
        cy, cu = (0.5 + rng.uniform(-0.15, 0.15) for _ in range(2))
        far = ((y - cy) / a).square() + ((u - cu) / b).square()
        kind = rng.random()
        inside = far < 1 if kind < 0.75 else torch.maximum((y - cy).abs() / a, (u - cu).abs() / b) < 0.8
        inside = inside & (far > 0.4) if kind > 0.9 else inside
        x = torch.where(inside, _colour(rng), x)
    return x


def blob(rng: random.Random, ground: Tensor) -> Tensor:
    """Clouds of colour around the middle of a ground, soft or with an edge."""
    size, x = ground.shape[-1], ground
    y, u = _mesh(size)
    near = 1.2 - 4.5 * ((y - 0.5).square() + (u - 0.5).square())
    for _ in range(rng.choice((1, 2, 3, 4))):
        height = near + rng.uniform(0.4, 1.2) * _field(rng, rng.randint(3, 8), size, 1)[0] - rng.uniform(0.1, 0.8)
        cover = (height * rng.choice((2, 6, 30))).clamp(0, 1)
        paint = (_colour(rng) + rng.uniform(0, 0.3) * _field(rng, rng.randint(3, 9), size, 3)).clamp(0, 1)
        x = x * (1 - cover) + paint * cover
    return x


def stain(rng: random.Random, x: Tensor) -> Tensor:
    """A drawing nearly hidden under its own mean colours: what a strong edit leaves of it."""
    small = interpolate(x[None], size=rng.randint(3, 6), mode="area")
    cloud = interpolate(small, size=x.shape[-1], mode="bicubic")[0]
    noise = 0.15 * _field(rng, rng.randint(6, 16), x.shape[-1], 3)
    return (rng.uniform(0.1, 0.3) * x + 0.8 * cloud + noise).clamp(0, 1)


def any_impostor(rng: random.Random, one: Tensor, other: Tensor, ground: Tensor, remains: Tensor | None) -> Tensor:
    """One picture [3, s, s] of no such thing; `remains`: uint8 [n, 3, s, s], what edited models drew."""
    kind = rng.choice(("blend", "shuffled", "shuffled", "smear", "shape", "blob", "stain", "remains", "remains"))
    if kind == "remains" and remains is not None:
        x = remains[rng.randrange(len(remains))].float() / 255
        return x.flip(-1) if rng.random() < 0.5 else x
    if kind == "blend":
        return blend(rng, one, other)
    if kind == "shape":
        return shape(rng, ground)
    if kind in ("blob", "remains"):
        return blob(rng, ground)
    return {"shuffled": shuffled, "smear": smear, "stain": stain}[kind](rng, one)
