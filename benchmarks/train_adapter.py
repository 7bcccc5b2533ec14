"""`make train-adapter`: learn EIUP's automatic weight on the demo model, and ship it beside the demo weights.

A pair is what the first step's attention finds of a concept in one picture (with evidence "alike", in what part of it),
and the weight that picture calls for: 0 where the judge does not find the concept anyway, else the weakest of a few
weights with which it is gone. Pictures are of prompts that name the concept, of scenes that hold it unnamed, and of
everything else.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ..demo import world
from ..editing.edits.spec import EditSpec
from ..editing.engine.backbones.unet import cross_attentions
from ..editing.engine.host import add_edit, add_watch
from ..editing.engine.watch import Watch
from ..editing.methods import eiup_weight as adapters
from ..editing.methods.eiup import EIUPOptions
from .eiup import WEIGHT_FILE
from .sampling import CFG, SAMPLER, SCHEDULER, Demo, object_prompts
from .table import Rate

GRID = (-1.0,)


def weakest(found: Callable[[float, list[int]], Sequence[bool]], n: int, grid: Sequence[float]) -> Tensor:
    """For each of n pictures the first weight, of 0 and the grid, with which the concept is not found; or the last.

    found(w, pictures): whether it is, in these of the pictures, edited with w.
    """
    w, left = torch.full((n,), grid[-1]), list(range(n))
    for weight in (0.0, *grid):
        gone = [i for i, seen in zip(left, found(weight, left), strict=True) if not seen] if left else []
        w[gone] = weight
        left = [i for i in left if i not in gone]
    return w


def first_look(model: Any, spec: EditSpec, positive: Any, negative: Any, noise: Tensor, steps: int) -> Tensor:
    """The features of the first of `steps` steps for each picture, as a run with an automatic weight sees them: [n, B].

    positive: one cond with a row for each picture; noise: [n, 4, h, w].
    """
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), SCHEDULER, steps)[:2]
    watched = add_watch(model, watch := Watch(spec.source, spec.node, evidence=spec.options.evidence))
    comfy.sample.sample(
        watched,
        noise,
        steps,
        CFG,
        SAMPLER,
        SCHEDULER,
        positive,
        negative,
        torch.zeros_like(noise),
        sigmas=sigmas,
        disable_pbar=True,
        seed=0,
    )
    return watch.features(cross_attentions(model.model.diffusion_model))[0]


def prompts(name: str, count: int, seed: int) -> list[str]:
    """Half of them show the concept, by name or in its scene; half are about something else."""
    rng = random.Random(seed)
    scenes = [scene for scene, (_, held) in world.SCENES.items() if held == name]
    named = object_prompts([name], count // 4 if scenes else count // 2, seed)
    held = [world.scene(rng, scenes[0]) for _ in range(count // 4)] if scenes else []
    rest = [n for n in world.OBJECTS if n != name]
    others = object_prompts(rng.sample(rest, len(rest)), count // 4, seed + 1)
    elsewhere = [world.scene(rng, s) for s in rng.choices([s for s in world.SCENES if s not in scenes], k=count // 4)]
    return [picture.caption for picture in (*named, *held, *others, *elsewhere)]


def pairs_of(
    demo: Demo, name: str, count: int, evidence: str, grid: Sequence[float], seed: int
) -> tuple[Tensor, Tensor]:
    """Mean attentions [n, B] and weights [n] for one concept."""
    texts, concept = prompts(name, count, seed), demo.concept(name)

    def spec(weight: float) -> EditSpec:
        options = EIUPOptions("separate", (weight,), evidence)
        return EditSpec("erasure", concept, options=options, node="train-adapter")

    def found(weight: float, chosen: list[int]) -> list[bool]:
        # All pictures each time: picture i has noise i.
        verdicts = demo.verdicts(add_edit(demo.model, spec(weight)), texts, seed)
        return [verdicts[i].found(name) for i in chosen]

    noise = torch.randn(len(texts), 4, 16, 16, generator=torch.Generator().manual_seed(seed))  # as Demo.pictures
    tokens = torch.cat([demo.encode(text)[0][0] for text in texts])
    looks = [
        first_look(demo.model, spec(-1.0), [[c, {}]], demo.encode(""), x, demo.steps)
        for c, x in zip(tokens.split(25), noise.split(25), strict=True)
    ]
    return torch.cat(looks), weakest(found, len(texts), grid)


def report(adapter: adapters.Regressor, x: Tensor, w: Tensor) -> dict[str, Any]:
    """How well pictures that it has not seen are told apart."""
    guess = adapter.weights(x)
    half = min(w.min().item(), -1e-6) / 2
    told = [bool(a) == bool(b) for a, b in zip(guess < half, w < half, strict=True)]
    return {
        "mean error": float((guess - w).abs().mean()),
        "mean error of one weight for all": float((w - w.mean()).abs().mean()),
        "strong or weak, told right": str(Rate.of(told)),
    }


def names_of(model: Any) -> list[str]:
    return [".".join(map(str, key)) for key in cross_attentions(model.model.diffusion_model)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make train-adapter", description=__doc__)
    parser.add_argument("--count", type=int, default=48, help="pictures of each concept")
    parser.add_argument("--evidence", choices=adapters.EVIDENCE, default="alike")
    parser.add_argument("--weights", default=",".join(f"{w:g}" for w in GRID), help="weights to try, weakest first")
    parser.add_argument("--steps", type=int, default=2000, help="of the regressor's training")
    parser.add_argument("--concepts", type=int, default=len(world.ERASED), help="how many of the demo world's concepts")
    parser.add_argument("--out", type=Path, default=WEIGHT_FILE)
    args = parser.parse_args()
    grid = tuple(float(w) for w in args.weights.split(","))
    demo, xs, ws = Demo.ready(), [], []
    for i, name in enumerate(world.ERASED[: args.concepts]):
        x, w = pairs_of(demo, name, args.count, args.evidence, grid, seed=100 + i)
        print(f"{name}: " + ", ".join(f"{(w == g).sum()} want {g:g}" for g in (0.0, *grid)), flush=True)
        xs.append(x)
        ws.append(w)
    x, w, blocks = torch.cat(xs), torch.cat(ws), names_of(demo.model)
    held_out = torch.arange(len(w)) % 5 == 0
    trial = adapters.train(x[~held_out], w[~held_out], blocks, args.evidence, args.steps)
    figures = report(trial, x[held_out], w[held_out])
    print(figures, flush=True)
    adapter = adapters.train(x, w, blocks, args.evidence, args.steps)
    about = {
        "pictures": str(len(w)),
        "concepts": ", ".join(world.ERASED[: args.concepts]),
        "grid": args.weights,
        "held out": str(figures),
    }
    adapters.save(adapter, args.out, about)
    print(f"wrote {args.out.name}")


if __name__ == "__main__":
    main()
