"""`make train-features`: the network whose features discriminators of drawings use, and the demo world's own gates.

It begins as the demo model's reference encoder, and learns to name all objects and styles of pictures that are placed,
scaled and spoiled in many ways. The judge has no part in it: another network, other pictures, other damage.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from ..editing.files.artefacts import write
from ..editing.gates import discriminator
from ..editing.gates.augment import perturbed
from ..editing.gates.discriminator import Report
from ..editing.gates.drawings import Drawings, save
from ..editing.gates.features import NETWORK_WIDTH, SIDE, DrawingsNetwork
from ..tools.environment import ROOT
from . import world
from .glyphs import Painter
from .load import load_reference

ASSETS = ROOT / "assets"
FILE = ASSETS / "drawings.safetensors"
GATES = ASSETS / "gates"  # a discriminator of each concept of the erasure table
NAMES, STYLES = tuple(world.OBJECTS), tuple(world.STYLES)


def gate_file(name: str) -> Path:
    return GATES / f"{name.replace(' ', '-')}.safetensors"


def first() -> DrawingsNetwork:
    """The convolutions of the demo model's reference encoder, which learned to say objects and styles."""
    trunk, layers = DrawingsNetwork(), list(load_reference())
    for i, own in enumerate(trunk.layers):
        for k in range(2):  # convolution and norm
            own[k].load_state_dict(layers[3 * i + k].state_dict())
    return trunk


class Namer(nn.Module):
    """The trunk, and what makes it learn: logits of objects [B, 64] and of styles [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = first()
        self.objects, self.styles = nn.Linear(NETWORK_WIDTH, len(NAMES)), nn.Linear(NETWORK_WIDTH, len(STYLES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.objects(h), self.styles(h)


def moved(rng: random.Random, picture: world.Picture) -> tuple[world.Layer, ...]:
    """Its layers a little elsewhere and larger or smaller, each on its own side of a pair."""
    out = []
    for layer in picture.layers:
        size = max(40, int(layer.size * rng.uniform(0.7, 1.15)))
        shift = (layer.size - size) // 2
        x, y = (at + shift + rng.randint(-10, 10) for at in (layer.x, layer.y))
        out.append(world.Layer(layer.glyph, layer.style, size, x, y))
    return tuple(out)


def drawn(painter: Painter, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [n, 3, SIDE, SIDE] uint8, which objects they hold [n, 64], their style (-100: none)."""
    rng, pictures = random.Random(seed), []
    x = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    for i in range(count):
        pictures.append(picture := world.any_picture(rng))
        layers = picture.layers if rng.random() < 0.5 else moved(rng, picture)
        x[i] = (interpolate(painter.paint(layers, picture.background)[None], size=SIDE, mode="area")[0] * 255).byte()
    y = torch.tensor([[float(name in p.objects) for name in NAMES] for p in pictures])
    style = torch.tensor([STYLES.index(p.style) if p.style in STYLES and p.objects else -100 for p in pictures])
    return x, y, style


def train(painter: Painter, steps: int, pictures: int, seed: int = 0, batch: int = 64, lr: float = 4e-3) -> Namer:
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    x, y, style = drawn(painter, pictures, seed + 100)
    model, start = Namer(), time.time()
    adam = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, lr, total_steps=steps, pct_start=0.15)
    for step in range(steps):
        i = torch.randint(len(x), (batch,), generator=rng)
        seen = x[i].float() / 255
        seen = perturbed(seen, rng) if step % 4 else seen
        objects, styles = model(seen)
        loss = 20 * binary_cross_entropy_with_logits(objects, y[i]) + 0.5 * cross_entropy(styles, style[i])
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            right = (objects.argmax(1) == y[i].argmax(1))[y[i].sum(1) == 1].float().mean()
            print(
                f"features {step + 1}/{steps} loss {loss.item():.3f} named {right:.2f} {time.time() - start:.0f}s",
                flush=True,
            )
            save(model.trunk, FILE, {"steps": step + 1, "pictures": pictures, "seed": seed})
    return model.eval()


def examples(painter: Painter, name: str, concept: int, others: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures with an object, alone and in pairs, and of all else, its neighbour often: [n, 3, SIDE, SIDE] each."""
    rng = random.Random(seed)
    near = world.NEIGHBOURS.get(name)

    def look() -> tuple[str | None, str]:
        return world.maybe(rng, 0.7, world.NAMED_STYLES), rng.choice(list(world.BACKGROUNDS))

    def other() -> world.Picture:
        if near and rng.random() < 0.15:
            return world.one_object(rng, near, *look())
        while name in (picture := world.any_picture(rng)).objects:
            pass
        return picture

    def held() -> world.Picture:
        if rng.random() < 0.6:
            return world.one_object(rng, name, *look())
        left, right = rng.sample([name, rng.choice([each for each in NAMES if each != name])], 2)
        return world.two_objects(rng, left, right, *look())

    x = [
        torch.stack([interpolate(painter(make())[None], size=SIDE, mode="area")[0] for _ in range(n)])
        for make, n in ((held, concept), (other, others))
    ]
    return x[0], x[1]


def train_gate(painter: Painter, name: str, concept: int = 600, others: int = 1800, seed: int = 0) -> Report:
    """The discriminator of one object, into the weights; returns what held-out pictures say."""
    found, report = discriminator.train(*examples(painter, name, concept, others, seed), Drawings(FILE), name)
    about = {"accuracy": report.accuracy, "accuracy spoiled": report.perturbed, "pictures": concept + others}
    write(discriminator.to_artefact(replace(found, about=about)), gate_file(name))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="make train-features", description=__doc__)
    parser.add_argument("--icons", type=Path, default=ROOT / "output" / "train-demo" / "icons")
    parser.add_argument("--steps", type=int, default=4000, help="0: the reference encoder's network as it is")
    parser.add_argument("--pictures", type=int, default=20_000)
    args = parser.parse_args()
    painter = Painter(args.icons)
    train(painter, args.steps, args.pictures) if args.steps else save(first(), FILE, {"steps": 0})
    for name in world.ERASED:
        report = train_gate(painter, name)
        print(f"{name}: {100 * report.accuracy:.1f} % right, spoiled {100 * report.perturbed:.1f} %", flush=True)
    print(f"features and gates in {ASSETS.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
