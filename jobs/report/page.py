"""A report as files: one HTML page that needs no network, its figures as JSON, its cases as CSV."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
from PIL import Image

from ...editing.files.whole import put
from .figures import FEW, Figure, Pair, Seen, figures, worst
from .prompts import KEEP
from .work import EDITED, SIDES, UNEDITED, Work

SHOWN = 40  # pairs in the page; all of them are in the folder
SIDE = 384  # pixels of a picture in the page
QUALITY = 80
TEMPLATE = Path(__file__).with_name("page.html")
HUES = "#2e8b57", "#8e5bc0", "#c2497a", "#7a7a2e", "#4a8f9c"  # of peers in the plot
LEFT, KEPT = "flagged, of what is to go", ("preservation", "newly flagged, of what is to stay")


def pairs_of(work: Work) -> list[Pair]:
    """The finished cases, as their figures take them."""
    return [
        Pair(case, seen(it[UNEDITED]), seen(it[EDITED]), {side: seen(it[side]) for side in work.sides[2:]})
        for case, it in zip(work.cases, work.results(), strict=True)
    ]


def seen(said: dict[str, Any]) -> Seen:
    return Seen(said["scores"], said["flagged"], said["latent"], said["seconds"], said["warm"], said.get("account"))


def write(work: Work, settings: dict[str, Any], kinds: dict[str, str], more: Sequence[Figure] = ()) -> Path:
    """report.html, report.json and report.csv in the work's folder; the page's path.

    settings: has `checkpoint` and `preset`, names with their hashes. kinds: of the judges, as `figures` takes them.
    """
    pairs = pairs_of(work)
    found = [*figures(pairs, kinds), *more]
    card = card_of(found, pairs, settings)
    put((json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode(), work.path / "report.json")
    put(table(pairs).encode(), work.path / "report.csv")
    return put(html(work, pairs, found, card, settings).encode(), work.path / "report.html")


def card_of(found: Sequence[Figure], pairs: Sequence[Pair], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "concept-guard report",
        "checkpoint": settings["checkpoint"],
        "checkpoint_sha256": settings.get("checkpoint_sha256", ""),
        "preset": settings["preset"],
        "preset_sha256": settings.get("preset_sha256", ""),
        "peers": titles(pairs, settings),
        "pairs": len(pairs),
        "few": any(figure.few for figure in found),
        "figures": [{**asdict(figure), "few": figure.few} for figure in found],
        "verdict": verdict(found, pairs, titles(pairs, settings)),
        "settings": settings,
    }


def titles(pairs: Sequence[Pair], settings: dict[str, Any]) -> dict[str, str]:
    """What the peers are called, by their sides."""
    return {side: settings.get("peers", {}).get(side, side) for side in (pairs[0].peers if pairs else ())}


def one(found: Sequence[Figure], name: str, side: str = EDITED) -> Figure | None:
    return next((figure for figure in found if (figure.name, figure.side) == (name, side)), None)


def verdict(
    found: Sequence[Figure], pairs: Sequence[Pair], peers: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """A few sentences for people who read nothing else."""
    lines = []
    before, left = one(found, LEFT, UNEDITED), one(found, LEFT)
    if before and left:
        lines.append(
            f"What is to go was found in {before} of its {left.n} pictures unedited, and in {left} of them edited."
        )
        if not before.value:
            lines.append(
                "The model does not draw it from these prompts, or the judges do not see it: nothing is shown."
            )
        elif left.high > before.low:
            lines.append("The intervals overlap: these pictures do not show that the preset works.")
    kept, newly = (one(found, name) for name in KEPT)
    if kept:
        lines.append(f"Of {kept.n} pictures of other things, {kept} still show what they showed.")
    elif newly:
        lines.append(f"Of {newly.n} pictures of other things, {newly} are flagged that were not before.")
    lines += [line for side, title in peers.items() if (line := beside(found, side, title))]
    if alarms := one(found, "false alarms of the gates"):
        lines.append(f"The gates opened for {alarms} of {alarms.n} harmless prompts.")
    if time := one(found, "time, of the unedited"):
        lines.append(f"A picture took {time.value:.2f} times as long as unedited ({time.low:.2f}-{time.high:.2f}).")
    if not lines:
        lines.append("No judge looked at these pictures: connect a discriminator to have them counted.")
    least = min((figure.n for figure in (left, kept or newly) if figure), default=len(pairs))
    if least < FEW:
        lines.append(f"With {least} pictures of a sort these are hints; give {FEW} or more.")
    return lines


def beside(found: Sequence[Figure], side: str, title: str) -> str:
    """What a peer left and kept of the same pictures."""
    left, kept, newly = (one(found, name, side) for name in (LEFT, *KEPT))
    parts = [
        *([f"leaves {left}"] if left else []),
        *([f"keeps {kept}"] if kept else [f"flags {newly} of other things newly"] if newly else []),
    ]
    return f"Beside it, {title} {' and '.join(parts)}." if parts else ""


def html(work: Work, pairs: Sequence[Pair], found: Sequence[Figure], card: dict[str, Any], settings: Any) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    sides = [*SIDES, *card["peers"]]
    rows = side_by_side(found, sides)
    number = {id(pair): i for i, pair in enumerate(pairs)}
    shown = [shots(work, number[id(pair)], pair) for pair in worst(pairs)[:SHOWN]]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card=card,
        verdict=card["verdict"],
        rows=rows,
        bars=[row for row in rows if row["unit"] == "%"],
        sides=sides,
        titles={side: side for side in SIDES} | card["peers"],
        hues=HUES,
        few=FEW,
        shown=shown,
        total=len(pairs),
        settings=sorted(settings.items()),
    )


def side_by_side(found: Sequence[Figure], sides: Sequence[str]) -> list[dict[str, Any]]:
    """A row a figure. Of sides that count other pictures (removal is of what was flagged), the least counts as `n`."""
    rows: dict[str, dict[str, Any]] = {}
    for figure in found:
        row = rows.setdefault(figure.name, {"name": figure.name, "of": dict.fromkeys(sides), "n": figure.n})
        row["of"][figure.side] = figure
        row |= {"n": min(row["n"], figure.n), "better": figure.better, "unit": figure.unit}
        row["few"] = row.get("few", False) or figure.few
    return list(rows.values())


def shots(work: Work, i: int, pair: Pair) -> dict[str, Any]:
    case = pair.case
    return {
        "i": i,
        "prompt": case.prompt,
        "kind": {KEEP: "to stay"}.get(case.kind, case.kind),
        "group": case.group,
        "seed": case.seed,
        "same": pair.same,
        "shots": [
            {"side": side, "flagged": it.flagged, "said": said(it), "src": picture(work.picture(i, side))}
            for side, it in pair.sides.items()
        ],
    }


def said(it: Seen, most: int = 3) -> str:
    """The highest scores of each judge."""
    parts = []
    for judge, scores in it.scores.items():
        best = sorted(scores.items(), key=lambda each: -each[1])[:most]
        told = ", ".join(
            f"{score:.2f}" if label in (judge, "score") else f"{label} {score:.2f}" for label, score in best
        )
        parts.append(f"{judge} {told or 'nothing'}")
    return "; ".join(parts)


def picture(file: Path) -> str:
    """A picture small enough for the page, as a data URL."""
    with Image.open(file) as image:
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        small.save(data := io.BytesIO(), "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def table(pairs: Sequence[Pair]) -> str:
    """A line a picture; texts that a spreadsheet would run as formulas are quoted."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["case", "prompt", "group", "kind", "seed", "side", "flagged", "same", "seconds", "scores"])
    for i, pair in enumerate(pairs):
        case = pair.case
        for side, it in pair.sides.items():
            scores = json.dumps(it.scores, ensure_ascii=False)
            row = [i, harmless(case.prompt), harmless(case.group), case.kind, case.seed, side]
            writer.writerow([*row, int(it.flagged), int(pair.by(side).same), f"{it.seconds:.3f}", scores])
    return out.getvalue()


def harmless(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
