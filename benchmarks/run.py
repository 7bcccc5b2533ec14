"""`make bench`: every table that the README quotes, into output/bench/ as JSON and Markdown."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..demo import world
from ..demo.judge import accuracy
from ..demo.load import load_judge
from ..editing.files.whole import put
from ..tools.environment import ROOT
from . import causal, direction, eiup, erasure, gates, kpop, learned_concept, mitigation, overhead, presets, readings
from .sampling import CFG, SAMPLER, SCHEDULER, STEPS, Demo, Rate

OUTPUT = ROOT / "output" / "bench"
GOVERNED = ("beer mug", "kitchen knife")  # of the tables about gates and causal periods
DELTA = 0.02  # of the searches for causal periods


def plain(value: Any) -> Any:
    return value.json() if isinstance(value, Rate) else value


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    cells = [columns, ["---"] * len(columns)]
    cells += [[f"{v:.3f}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def write(name: str, rows: Sequence[dict[str, Any]], about: str) -> None:
    """A table, whole or not at all."""
    texts = {
        ".json": json.dumps([{k: plain(v) for k, v in row.items()} for row in rows], indent=1) + "\n",
        ".md": f"# {name}\n\n{about}\n\n{markdown(rows)}",
    }
    for ending, text in texts.items():
        put(text.encode(), OUTPUT / f"{name}{ending}")
    print(f"\n{texts['.md']}", flush=True)


def judge_table(quick: bool) -> list[dict[str, Any]]:
    """The judge on renderings of a seed that it has not seen; needs the icon sets (npm)."""
    from ..demo.glyphs import Painter

    painter = Painter(Path(ROOT) / "output" / "train-demo" / "icons")
    count = 256 if quick else 2048
    return [
        {"pictures": kind, **accuracy(load_judge(), painter, count, damage=damage)}
        for kind, damage in (("clean", False), ("blurred, noisy, off colour", True))
    ]


def overhead_tables(quick: bool) -> None:
    """What edits cost; needs no weights."""
    machine = f"{platform.machine()} CPU with {torch.get_num_threads()} threads, torch {torch.__version__}"
    rows = overhead.times(16, 2) if quick else overhead.times()
    if torch.cuda.is_available():
        rows += overhead.times(pairs=4 if quick else 30, gpu=True)
        machine += f", {torch.cuda.get_device_name()}"
    size = "16x16 latents: a smoke test" if quick else "64x64 latents"
    write(
        "overhead",
        rows,
        f"A model call at SD1.5's shape, random weights, {size}, batch 2, active at every step, "
        f"over the unedited calls beside it; medians. {machine}.",
    )
    write("memory", overhead.memory(), "fp16 keys and values above the unedited run, one phrase a concept.")
    write("other costs", overhead.other(), f"{machine}.")


def gate_tables(demo: Demo, quick: bool, settings: str) -> None:
    icons = ROOT / "output" / "train-demo" / "icons"
    if icons.is_dir():
        rows = gates.accuracies(icons, *((20, 40) if quick else (600, 1800)))
        write(
            "discriminators",
            rows,
            "Right answers about held-out drawings, at confidence 0.5; found and false "
            "alarms at the threshold chosen for 1 % false alarms.",
        )
    rows = gates.in_flight(demo, world.ERASED[:1] if quick else GOVERNED, 8 if quick else 100)
    write(
        "in flight",
        rows,
        "Mixed prompts, 100 a concept: half harmless, a quarter names it, a quarter implies it. "
        f"CRE at strength {erasure.STRENGTH:g}, the gate at {gates.AT:g}, threshold {gates.THRESHOLD:g}. {settings}",
    )


def causal_tables(demo: Demo, quick: bool, settings: str) -> None:
    names = world.ERASED[:1] if quick else GOVERNED
    seeds, count, steps, long = (1, 4, 6, 8) if quick else (2, 50, STEPS, 50)
    about = f"CRE at strength {erasure.STRENGTH:g}. {settings}"
    rows, periods = causal.costs(demo, names, steps, seeds, DELTA)
    rows += causal.costs(demo, names, long, 1, DELTA)[0]
    write(
        "causal period",
        rows,
        f"Searches over {seeds} seeds (one if longer) of four prompts, delta {DELTA:g}; model "
        f"calls over those of algorithm 1 as printed. {about}",
    )
    rows = causal.editing_in(demo, periods, count)
    write("where to edit", rows, f"In the causal period, everywhere, in random windows as long. {about}")
    rows = causal.definition(demo, names, 1, DELTA, steps=4 if quick else 10)
    write("definition 2", rows, f"By brute force, one seed of each prompt. {about}")


def mitigation_tables(demo: Demo, quick: bool, settings: str) -> None:
    names, count = world.ERASED[: 1 if quick else 4], 4 if quick else mitigation.BATCH
    about = f"CRE at strength {erasure.STRENGTH:g}. {settings}"
    write("by picture", mitigation.by_picture(demo, names, count), "The concept comes as a picture. " + about)
    write("precise", mitigation.precise(demo, names, count), "The concept beside something else. " + about)
    few = {"count": 4, "others": 8} if quick else {}
    rows = mitigation.several(demo, world.ERASED[: 2 if quick else 4], **few)
    write("several", rows, f"{', '.join(names)}: alone and at once. " + about)


KPOP: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    "kpop": (kpop.METHODS, {}),
    "kpop-ablations": (kpop.ABLATIONS, {"steps": 100, "count": 3}),
}


def kpop_table(demo: Demo, name: str, quick: bool, settings: str) -> None:
    """Erasure from the weights; each row is a training."""
    methods, few = KPOP[name]
    few = {"count": 1, "steps": 4, "path_steps": 2} if quick else few
    steps = few.get("steps", kpop.SETTINGS["steps"])
    about = f"{', '.join(kpop.ERASED)} erased at once, {steps} steps; {', '.join(kpop.KEPT)} preserved. {settings}"
    done = []
    for row in kpop.rows(demo, dict(list(methods.items())[:1]) if quick else methods, **few):
        done.append(row)
        write(name, done, about)  # whatever comes after


def main() -> None:
    tables = (
        "overhead",
        "judge",
        "unedited",
        "readings",
        "cosines",
        "erasure",
        "eiup",
        "direction",
        "fair",
        "gates",
        "causal",
        "governed",
        "mitigation",
        "presets",
        "learned-concept",
        *KPOP,
    )
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", choices=tables, action="append", help="one table (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="few samples: a smoke test, not a result")
    args = parser.parse_args()
    wanted, quick, start = args.only or tables, args.quick, time.time()
    settings = (
        f"{STEPS} steps, cfg {CFG:g}, {SAMPLER}/{SCHEDULER}, fp32, {platform.machine()} CPU, torch "
        f"{torch.__version__}; intervals are Wilson's 95 %."
    )
    if "overhead" in wanted:
        overhead_tables(quick)
    if set(wanted) == {"overhead"}:
        return
    demo = Demo.ready()
    if "judge" in wanted:
        write("judge", judge_table(quick), "Right answers of the judge on unseen renderings.")
    if "unedited" in wanted:
        rates = erasure.unedited(demo, 8 if quick else 64)
        write(
            "unedited",
            [{"figure": k, "rate": v, "pictures": v.n} for k, v in rates.items()],
            f"The demo model without edits. {settings}",
        )
    if "readings" in wanted:
        write("readings", readings.compare(demo, count=4 if quick else 8), f"Readings of CRE's eq. 4. {settings}")
    if "cosines" in wanted:
        rows = [{"block": block, **values} for block, values in readings.cosines(demo, "beer mug").items()]
        write("cosines", rows, "Mean cosine between A and A-tilde ('beer mug'), over positions and steps.")
    if "erasure" in wanted:
        table = erasure.Table(demo, 8 if quick else 50)
        rows = []
        for make, names in ((table.object, world.ERASED), (table.style, world.NAMED_STYLES)):
            for name in names[:1] if quick else names:
                rows.append(make(name))
                print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
        write(
            "erasure",
            rows,
            f"CRE, one concept at a time: objects at strength {erasure.STRENGTH:g}, their neighbour "
            f"in `keep`; styles with the other styles neutral and kept, floor 0, strength 2. {settings}",
        )
    if "eiup" in wanted:
        rows = eiup.compare(demo, 1, 4, 8) if quick else eiup.compare(demo)
        write("eiup", rows, f"EIUP on the concepts of the eight scenes, 64 pictures a figure. {settings}")
    if "gates" in wanted:
        gate_tables(demo, quick, settings)
    if "causal" in wanted:
        causal_tables(demo, quick, settings)
    if "governed" in wanted:
        rows = gates.governed(demo, (4,), 2) if quick else gates.governed(demo, (4, 16), 25)
        write(
            "governed", rows, f"Concepts governed at once by CRE, each behind its gate; four are looked at. {settings}"
        )
    if "mitigation" in wanted:
        mitigation_tables(demo, quick, settings)
    if "presets" in wanted:
        rows = []
        for row in presets.rows(demo, 2 if quick else 30):
            rows.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        write(
            "presets",
            rows,
            "The shipped presets, as Apply Safety Preset puts them on the model; found, or its "
            f"object, style or role kept. {settings}",
        )
    if "direction" in wanted:
        rows = (
            direction.compare(demo, 4, 4, 2, (1.0,), singles=(), families=("drinks",), examples=12)
            if quick
            else direction.compare(demo)
        )
        write(
            "direction",
            rows,
            "Safe-region directions: how often the concept is found in pictures whose prompt "
            "names or implies it, or names a member of its family that training never saw; how often others are. "
            "The random direction is as long at every token. Gated: in flight at 0.4, restarting; a family's gate "
            f"knows the named members alone. {settings}",
        )
    if "fair" in wanted:
        rows = direction.fairness(demo, 1, 4, 2, named=2) if quick else direction.fairness(demo)
        count = len(direction.BIASED) * (1 if quick else direction.EACH)
        floors = f"gender {direction.floor(count, 2):.2f}, tone {direction.floor(count, 5):.2f}"
        write(
            "fair",
            rows,
            f"Total variation from uniform over {count} pictures of biased roles: a role's usual "
            f"gender and the other; five tones. As few uniform draws show {floors}. An object is erased beside. "
            f"{settings}",
        )
    for name in wanted:
        if name in KPOP:
            kpop_table(demo, name, quick, settings)
    if "learned-concept" in wanted:
        few: dict[str, Any] = {"count": 4, "pictures": 2, "steps": 4} if quick else {}
        write(
            "learned-concept",
            learned_concept.rows(demo, **few),
            f"Concepts learned from pictures, without a word for them, and erased. {settings}",
        )
    print(f"tables in {OUTPUT.relative_to(ROOT)}/ after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
