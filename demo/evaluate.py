"""What a demo model can draw, by the witness: `sh tools/start.sh environment.py demo.evaluate --model FILE`.

Prints a rate a kind of prompt with its 95 % interval, and writes a contact sheet of each kind beside --sheet.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..jobs.measure import Rate, Sampling
from . import mix, phrases, world
from .draw import HOW, draw
from .load import MODEL_FILE, WITNESS_FILE, load, load_transformer, load_witness, part, read
from .transformers import CONFIGS
from .witness import Testimony, Witness, testify

Right = Callable[[world.Picture, Testimony], bool]


def named(p: world.Picture, v: Testimony) -> bool:
    return all(v.found(name) for name in p.objects)


def both(p: world.Picture, v: Testimony) -> bool:
    return (v.left, v.right) == (p.objects[0], p.objects[-1]) and named(p, v)


def in_style(p: world.Picture, v: Testimony) -> bool:
    return v.style == p.style


def natural(p: world.Picture, v: Testimony) -> bool:
    return v.natural


def situations(count: int, seed: int) -> dict[str, tuple[list[world.Picture], dict[str, Right]]]:
    """Kind of prompt -> its pictures, and what is asked of each."""
    rng, names = random.Random(seed), list(world.OBJECTS)

    def look() -> tuple[str, str]:
        return rng.choice(world.NAMED_STYLES), rng.choice(list(world.BACKGROUNDS))

    def name(i: int) -> str:
        return names[(i + seed) % len(names)]

    kinds: dict[str, tuple[Callable[[int], world.Picture], dict[str, Right]]] = {
        "object": (
            lambda i: world.one_object(rng, name(i), *look()),
            {"named": named, "in style": in_style, "natural": natural},
        ),
        "bare object": (lambda i: world.one_object(rng, name(i)), {"named": named, "in style": in_style}),
        "two objects": (lambda i: world.two_objects(rng, *rng.sample(names, 2)), {"both": both}),
        "two of a kind": (lambda i: mix.two_of(rng, rng.choice(mix.COUNTABLE)), {"both": both}),
        "other words": (lambda i: mix.said_otherwise(rng, name(i)), {"named": named}),
        "held-out words": (lambda i: mix.held_out(rng, name(i)), {"named": named}),
        "two, held-out words": (
            lambda i: mix.two_of(rng, rng.choice(mix.COUNTABLE), counts=phrases.TWO_HELD_OUT),
            {"both": both},
        ),
        "scene": (lambda i: world.scene(rng, list(world.SCENES)[i % 8]), {"concept seen": named}),
        "left out": (
            lambda i: mix.left_out(
                rng, world.maybe(rng, 0.5, world.NAMED_STYLES), world.maybe(rng, 0.5, world.BACKGROUNDS)
            ),
            {"natural": natural, "in style": in_style},
        ),
        "person": (lambda i: world.person(rng, list(world.ROLES)[i % 10]), {"role": lambda p, v: v.role == p.role}),
    }
    return {kind: ([make(i) for i in range(count)], asked) for kind, (make, asked) in kinds.items()}


def sheet(pictures: Tensor, path: Path, across: int = 12) -> None:
    """The first pictures, tiled."""
    x = (pictures[: 3 * across] * 255).round().byte()
    rows = [torch.cat(list(x[i : i + across]), 2) for i in range(0, len(x) - len(x) % across, across)]
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy()).save(path)


def evaluate(
    demo: tuple[Any, Any, Any],
    witness: Witness,
    count: int,
    seed: int,
    how: Sampling = HOW,
    only: Sequence[str] = (),
    to: Path | None = None,
) -> dict[str, dict[str, Rate]]:
    out: dict[str, dict[str, Rate]] = {}
    for kind, (pictures, asked) in situations(count, seed).items():
        if only and kind not in only:
            continue
        x = draw(demo, [p.caption for p in pictures], seed, how=how)
        seen = testify(witness, x)
        out[kind] = {k: Rate.of([f(p, v) for p, v in zip(pictures, seen, strict=True)]) for k, f in asked.items()}
        print(f"{kind}: " + ", ".join(f"{k} {rate}" for k, rate in out[kind].items()), flush=True)
        if to:
            sheet(x, to / f"{kind.replace(' ', '-')}.png")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FILE, help="the weights file of a model")
    parser.add_argument("--transformer", type=Path, help="the weights file of a transformer that draws in its place")
    parser.add_argument("--architecture", choices=tuple(CONFIGS), default="flux", help="of the transformer")
    parser.add_argument("--witness", type=Path, default=WITNESS_FILE, help="the weights file of the second judge")
    parser.add_argument("--count", type=int, default=50, help="pictures a kind")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--steps", type=int, default=HOW.steps)
    parser.add_argument("--only", nargs="*", default=(), help="kinds of prompt")
    parser.add_argument("--sheets", type=Path, help="a folder for contact sheets")
    args = parser.parse_args()
    if args.sheets:
        args.sheets.mkdir(parents=True, exist_ok=True)
    demo = load(args.model)
    if args.transformer:
        weights = part(read(args.transformer), "unet.")
        unet = load_transformer(args.architecture, weights, read(args.model), args.transformer)
        demo = unet, *demo[1:]
    rates = evaluate(
        demo,
        load_witness(args.witness),
        args.count,
        args.seed,
        replace(HOW, steps=args.steps),
        args.only,
        args.sheets,
    )
    print(json.dumps({kind: {k: rate.json() for k, rate in row.items()} for kind, row in rates.items()}))


if __name__ == "__main__":
    main()
