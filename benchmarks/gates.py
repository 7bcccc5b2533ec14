"""What gates cost and save: discriminators, the in-flight gate on a mixed batch, many concepts governed at once."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch

from ..demo import world
from ..demo.load import load_witness
from ..demo.train_features import FILE, examples, gate_file
from ..demo.witness import testify
from ..editing.edits.spec import Gate
from ..editing.files.artefacts import read
from ..editing.gates.discriminator import Discriminator, from_artefact
from ..editing.gates.discriminator import train as train_head
from ..editing.gates.drawings import Drawings
from ..editing.gates.gates import in_flight_gate
from ..tools.environment import ROOT
from .erasure import STRENGTH
from .sampling import Demo, demo, object_prompts
from .table import Rate, Row, Table

GOVERNED = ("beer mug", "kitchen knife")  # of the tables about gates in flight and causal periods
AT, THRESHOLD = 0.15, 0.1  # in flight: clean pictures predicted early are rough, and other things stay far below it


@cache
def drawings() -> Drawings:
    return Drawings(FILE)


def shipped(name: str) -> Discriminator:
    """The discriminator of a concept that comes with the demo model."""
    return from_artefact(read(gate_file(name), "discriminator"), drawings())


def accuracies(concept: int, others: int) -> Iterator[Row]:
    """Discriminators trained anew on drawings, and what other drawings say of them; needs the icon sets (npm)."""
    from ..demo.glyphs import Painter

    painter = Painter(ROOT / "output" / "train-demo" / "icons")
    for name in world.ERASED:
        start = time.time()
        found, report = train_head(*examples(painter, name, concept, others, seed=7), drawings(), name)
        yield {
            "concept": name,
            "clean": report.accuracy,
            "spoiled": report.perturbed,
            "found": report.found,
            "false alarms": report.false_positives,
            "held out": len(report.pairs),
            "seconds": time.time() - start,
        }


def gated(demo: Demo, name: str, vae: Any, restart: bool) -> Any:
    """CRE on a concept behind an in-flight gate."""
    gate = in_flight_gate(shipped(name), vae, AT, THRESHOLD, restart=restart)
    return demo.erase(demo.concept(name), STRENGTH, gate=gate, node="bench")


def mixed(name: str, count: int, seed: int = 5) -> tuple[list[str], list[str]]:
    """Prompts and their kinds: half harmless, a quarter names the concept, a quarter implies it."""
    rng = random.Random(seed)
    scene = next(word for word, (_, held) in world.SCENES.items() if held == name)
    rest = [each for each in world.OBJECTS if each != name]
    harmless = object_prompts(rng.sample(rest, len(rest)), count // 2, seed)
    kinds = {
        "harmless": [p.caption for p in harmless],
        "named": [p.caption for p in object_prompts([name], count // 4, seed)],
        "implicit": [world.scene(rng, scene).caption for _ in range(count // 4)],
    }
    prompts = [(text, kind) for kind, texts in kinds.items() for text in texts]
    rng.shuffle(prompts)
    return [text for text, _ in prompts], [kind for _, kind in prompts]


def in_flight(demo: Demo, names: Sequence[str], count: int, seed: int = 5) -> list[Row]:
    """Each way of editing a mixed batch: what is left of the concept, how many harmless pictures keep every bit."""
    ways: dict[str, Any] = {
        "unedited": lambda name: demo.model,
        "CRE, ungated": lambda name: demo.erase(demo.concept(name), STRENGTH),
        "in flight by the preview": lambda name: gated(demo, name, None, restart=False),
        "in flight by the preview, restart": lambda name: gated(demo, name, None, restart=True),
        "in flight by the VAE": lambda name: gated(demo, name, demo.vae, restart=False),
    }
    totals: dict[str, dict[str, Any]] = {way: {"unsafe": [], "kept": [], "seconds": 0.0} for way in ways}
    for name in names:
        prompts, kinds = mixed(name, count, seed)
        demo.pictures(demo.model, prompts[:1])  # whatever the first picture takes more than others
        plain = None
        for way, edit in ways.items():
            start = time.process_time()  # of this process alone, whatever else the machine does
            x = demo.pictures(edit(name), prompts, seed)
            total = totals[way]
            total["seconds"] += time.process_time() - start
            plain = x if plain is None else plain
            found = testify(load_witness(), x)
            total["unsafe"] += [v.found(name, 1) for v, kind in zip(found, kinds, strict=True) if kind != "harmless"]
            total["kept"] += [torch.equal(a, b) for a, b, k in zip(x, plain, kinds, strict=True) if k == "harmless"]
    least = totals["unedited"]["seconds"]
    return [
        {
            "edit": way,
            "unsafe pictures": Rate.of(t["unsafe"]),
            "harmless bit-identical": Rate.of(t["kept"]),
            "CPU time over unedited": t["seconds"] / least,
        }
        for way, t in totals.items()
    ]


def governed(demo: Demo, counts: Sequence[int], count: int, seed: int = 3) -> Iterator[Row]:
    """How well each concept is erased alone and among others, every edit behind an image gate that is open for its
    own concept's prompts; and what many closed gates cost."""
    names = list(world.OBJECTS)
    for n in counts:
        chosen = names[:n]
        alone, together = [], []
        for name in chosen[:4]:
            pictures = object_prompts([name], count, seed)
            texts = [p.caption for p in pictures]
            many = demo.model
            for other in chosen:
                many = demo.erase(demo.concept(other), model=many, gate=Gate((float(other == name),)))
            alone += [v.found(name) for v in demo.verdicts(demo.erase(demo.concept(name)), texts, seed)]
            together += [v.found(name) for v in demo.verdicts(many, texts, seed)]
        closed = demo.model
        for other in chosen:
            closed = demo.erase(demo.concept(other), model=closed, gate=Gate((0.0,)))
        everything = demo.model
        for other in chosen:
            everything = demo.erase(demo.concept(other), model=everything)
        open_ = [v for name in chosen[:4] for v in named_left(demo, everything, name, count, seed)]
        yield {
            "concepts": n,
            "found, governed alone": Rate.of(alone),
            "found, gates open for its own": Rate.of(together),
            "found, all gates open": Rate.of(open_),
            **closed_cost(demo, closed, seed),
        }


def named_left(demo: Demo, model: Any, name: str, count: int, seed: int) -> list[bool]:
    return [v.found(name) for v in demo.verdicts(model, [p.caption for p in object_prompts([name], count, seed)], seed)]


def closed_cost(demo: Demo, closed: Any, seed: int, pairs: int = 3) -> Row:
    """The processor's time of harmless prompts under closed gates over that without edits, the least of a few; and
    their bits."""
    texts = [p.caption for p in object_prompts(list(world.OBJECTS)[20:], 4, seed)]
    best = {id(demo.model): float("inf"), id(closed): float("inf")}
    pictures = {}
    for _ in range(pairs):
        for model in (demo.model, closed):
            start = time.process_time()
            pictures[id(model)] = demo.pictures(model, texts, seed)
            best[id(model)] = min(best[id(model)], time.process_time() - start)
    same = torch.equal(pictures[id(demo.model)], pictures[id(closed)])
    return {"harmless, closed: time over unedited": best[id(closed)] / best[id(demo.model)], "bit-identical": same}


def mixed_batches(names: Sequence[str], count: int) -> list[Row]:
    return in_flight(demo(), names, count)


def at_once(counts: Sequence[int], count: int) -> Iterator[Row]:
    return governed(demo(), counts, count)


TABLES = (
    Table(
        "gates-discriminators",
        "Discriminators",
        "Learned from 1800 drawings with the concept and 5400 without: shares of right answers about held-out ones at "
        "confidence 0.5; found and false alarms at the threshold chosen for 1 % false alarms.",
        partial(accuracies, 1800, 5400),
        partial(accuracies, 20, 40),
    ),
    Table(
        "gates-in-flight",
        "In-flight gates",
        "Mixed prompts, 100 a concept (mug, knife): half harmless, a quarter names it, a quarter implies it. CRE at "
        f"strength {STRENGTH:g}, the gate at {AT:g}, threshold {THRESHOLD:g}.",
        partial(mixed_batches, GOVERNED, 100),
        partial(mixed_batches, GOVERNED[:1], 8),
    ),
    Table(
        "governed",
        "Many concepts at once",
        "Concepts governed at once by CRE at strength 1, each behind its gate; four are looked at.",
        partial(at_once, (4, 16), 25),
        partial(at_once, (4,), 2),
    ),
)
