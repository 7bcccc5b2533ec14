"""The papers' figures beside ours: what each says, of what, and what the same question gives in the demo world.

Theirs are of Kosmos-G and SD 1.4 with ImageNet's classes, ours of a small model of drawings: what can be compared is
the order of the methods and what a change of a setting does, not the figures. The papers on EIUP and on safe regions
print no figure in what could be read of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from .table import Record, Row

CRE, KPOP = "CRE (NeurIPS 2024)", "KPOP (arXiv 2403.12326)"


@dataclass(frozen=True)
class Figure:
    """One figure of a paper and the cell of ours that answers the same question."""

    paper: str
    where: str
    what: str
    theirs: str
    table: str
    column: str
    row: Mapping[str, Any] = field(default_factory=dict)  # of ours: the cells that name it

    def ours(self, folder: Path) -> Any:
        file = folder / f"{self.table}.json"
        rows: Sequence[Row] = Record.read(file).rows if file.exists() else ()
        found = [row for row in rows if all(row.get(k) == v for k, v in self.row.items()) and self.column in row]
        return found[-1][self.column] if found else "not measured"


def of_peers(method: str) -> dict[str, str]:
    return {"architecture": "unet", "method": method}


FIGURES = (
    *(
        Figure(CRE, "table 1", f"objects that come as a picture: {what}", theirs, "mitigation-picture", column, drawn)
        for drawn in ({"reference": "as drawn"},)
        for what, theirs, column in (
            ("unedited", "36.3 %", "by picture, unedited"),
            ("CRE", "0 %", "by picture, gated"),
        )
    ),
    *(
        Figure(CRE, "table 1", f"objects: {what}; ours by name", theirs, "peers", "named left", of_peers(method))
        for what, theirs, method in (("SLD", "22.5 %", "SLD, max"), ("ProtoRe", "1.7 %", "ProtoRe"))
    ),
    *(
        Figure(CRE, "table 2", f"styles: {what}; ours by name", theirs, "peers", "styles left", of_peers(method))
        for what, theirs, method in (
            ("unedited", "32.6 %", "unedited"),
            ("SLD", "24.9 %", "SLD, max"),
            ("ProtoRe", "14.0 %", "ProtoRe"),
            ("CRE", "2.1 %", "CRE"),
        )
    ),
    *(
        Figure(
            CRE,
            "table 3",
            f"{edit}, {'one concept' if governed == 'single' else 'several at once'}",
            theirs,
            "mitigation-several",
            "concepts found",
            {"edit": edit, "governed": governed},
        )
        for edit, governed, theirs in (
            ("negative prompt", "single", "(SLD) 24.9 %"),
            ("negative prompt", "multiple", "(SLD) +1.9 points"),
            ("CRE", "single", "2.1 %"),
            ("CRE", "multiple", "+0.1 points"),
        )
    ),
    *(
        Figure(CRE, "table 4", f"never named, implied: {what}", theirs, "peers", "in scenes left", of_peers(method))
        for what, theirs, method in (
            ("SLD", "19 %", "SLD, max"),
            ("ProtoRe", "9 %", "ProtoRe"),
            ("CRE", "6 %", "CRE"),
        )
    ),
    *(
        Figure(
            CRE,
            "figure 5",
            f"references {way}",
            "removed",
            "mitigation-picture",
            "by picture, gated",
            {"reference": way},
        )
        for way in ("blurred", "turned, cropped, from the side", "light and saturation", "grain", "all of these")
    ),
    Figure(
        CRE,
        "figure 5",
        "what stands beside the concept is kept",
        "shown",
        "mitigation-precise",
        "other object found",
        {"edit": "CRE"},
    ),
    Figure(
        CRE,
        "section 5",
        "time of a picture over an unedited one's",
        "1.088",
        "overhead-time",
        "times unedited",
        {"edit": "CRE, 1 concept"},
    ),
    *(
        Figure(KPOP, "table 2", f"{what}: {column}", theirs, "kpop", column, {"method": method})
        for what, method, both in (
            ("unedited", "unedited", {"PSR-1": "78.0 %", "PSR-5": "97.6 %"}),
            (
                "KPOP",
                "KPOP, and keeping what is preserved",
                {"ESR-1": "99.2 %", "ESR-5": "97.3 %", "PSR-1": "75.3 %", "PSR-5": "98.0 %"},
            ),
        )
        for column, theirs in both.items()
    ),
    *(
        Figure(KPOP, "table 2", f"UCE: {what}", theirs, "peers", column, of_peers("UCE"))
        for what, theirs, column in (
            ("ESR-1; ours: named left", "100 %", "named left"),
            ("PSR-1; ours: others kept", "62.1 %", "others kept"),
        )
    ),
    *(
        Figure(KPOP, where, f"{method}: {column}", theirs, "kpop-ablations", column, {"method": method})
        for where, method, both in (
            ("table 5", "size 1", ("98.6 %", "84.8 %")),
            ("table 5", "size 10, all blocks, lambda 0.3", ("98.8 %", "81.7 %")),
            ("table 5", "size 100", ("99.7 %", "82.7 %")),
            ("table 5", "additive", ("96.4 %", "84.5 %")),
            ("table 6", "middle", ("98.8 %", "81.7 %")),
            ("table 6", "middle and up", ("99.6 %", "75.7 %")),
            ("table 6", "size 10, all blocks, lambda 0.3", ("99.7 %", "59.0 %")),
        )
        for column, theirs in zip(("ESR-1", "PSR-1"), both, strict=True)
    ),
    *(
        Figure(KPOP, "figure 5", f"{method}: {column}", theirs, "kpop-ablations", column, {"method": method})
        for method, column, theirs in (
            ("lambda 0.01", "PSR-1", "81.6 %"),
            ("lambda 10", "PSR-1", "about 86 %"),
            ("lambda 10", "ESR-5", "about 40 %"),
        )
    ),
)


def rows(folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """Each paper and its figures, beside the records' in `folder`."""
    for paper, figures in groupby(FIGURES, lambda figure: figure.paper):
        yield (
            paper,
            [
                {
                    "where": figure.where,
                    "what": figure.what,
                    "theirs": figure.theirs,
                    "ours": figure.ours(folder),
                    "table": figure.table,
                }
                for figure in figures
            ],
        )
