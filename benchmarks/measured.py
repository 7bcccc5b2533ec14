"""docs/measured.md: every table that was kept, from docs/measured/*.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..editing.files.whole import put
from ..tools.environment import ROOT
from . import papers
from .table import Rate, Record, Row, Table, weights

KEPT = ROOT / "docs" / "measured"
PAGE = ROOT / "docs" / "measured.md"
WITHOUT_DEMO = ("judge", "overhead")  # tables that the demo model has no part in
HEAD = """\
# What was measured

Written by `make bench` from the records in [measured/](measured/), not by hand. A share stands with its 95 % interval
(Wilson's) and the number of pictures: "96.1 % (91-98) of 128". Pictures are the demo model's unless a table says
otherwise: 20 steps, cfg 4, euler/normal, fp32 on a CPU, seeds as in the code. Who looks at them is a classifier of
its own, the witness, which has no part in any edit. [What falls short](limits.md) of the goals is told apart.

A table names the demo model that it was measured on; those of an earlier one say so.

A new run of a table replaces its record only when asked: `make bench ARGS="--only NAME --keep"`.
"""
BESIDE = """
Theirs are of Kosmos-G and Stable Diffusion 1.4 and of photographs, ours of a small model of drawings: what can be
compared is the order of the methods and what a setting changes. Each of ours stands in the table that is named, with
its command. The papers on EIUP and on safe regions print no figure in what could be read of them.
"""


def cell(value: Any) -> str:
    if isinstance(value, Rate):
        return f"{value} of {value.n}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def grid(rows: Sequence[Row]) -> str:
    """A Markdown table; a column for each key that a row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(title: str, record: Record) -> str:
    end = "" if record.finished else " Stopped before its end."
    same = weights() in record.settings or record.table.startswith(WITHOUT_DEMO)
    older = "" if same else " **Of an earlier demo model**, to be measured again."
    facts = f"`{record.command}`; {record.settings}; commit {record.commit}.{end}{older}"
    notes = "\n".join(f"- {note}" for note in record.notes)
    return "\n\n".join(filter(None, (f"## {title}", record.about, facts, grid(record.rows), notes))) + "\n"


def sections(tables: Sequence[Table], folder: Path) -> Iterator[str]:
    for table in tables:
        file = folder / f"{table.name}.json"
        if file.exists():
            yield section(table.title, Record.read(file))


def beside_theirs(folder: Path) -> str:
    """The papers' own figures and ours."""
    parts = [f"### {paper}\n\n{grid(rows)}\n" for paper, rows in papers.rows(folder)]
    return "\n".join(["## The papers' figures and ours", BESIDE, *parts])


def page(tables: Sequence[Table], folder: Path = KEPT) -> str:
    return "\n".join([HEAD, *sections(tables, folder), beside_theirs(folder)])


def write_page(tables: Sequence[Table]) -> None:
    put(page(tables).encode(), PAGE)
