"""`make bench`: the tables of docs/measured.md, each into output/bench/ as JSON and Markdown."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..editing.files.whole import put
from ..tools.environment import ROOT
from . import (
    account,
    attack,
    causal,
    direction,
    eiup,
    erasure,
    gates,
    instead,
    kpop,
    learned_concept,
    memory,
    mitigation,
    overhead,
    peers,
    policy,
    presets,
    readings,
    sheet,
    transformers,
)
from .measured import KEPT, cell, section, write_page
from .table import Record, Table, run

OUTPUT = ROOT / "output" / "bench"
TABLES: tuple[Table, ...] = (
    *erasure.TABLES,
    *instead.TABLES,
    *attack.TABLES,
    *readings.TABLES,
    *eiup.TABLES,
    *overhead.TABLES,
    *account.TABLES,
    *transformers.TABLES,
    *gates.TABLES,
    *mitigation.TABLES,
    *causal.TABLES,
    *direction.TABLES,
    *kpop.TABLES,
    *learned_concept.TABLES,
    *presets.TABLES,
    *peers.TABLES,
    *memory.TABLES,
    *policy.TABLES,
)


def chosen(names: Sequence[str], tables: Sequence[Table] = TABLES) -> list[Table]:
    """The tables of these names; "causal" is every table whose name begins with "causal-"."""
    picked = []
    for name in names:
        found = [t for t in tables if t.name == name] or [t for t in tables if t.name.startswith(f"{name}-")]
        if not found:
            raise SystemExit(f"there is no table {name!r}; choose of: {', '.join(t.name for t in tables)}")
        picked += [t for t in found if t not in picked]
    return picked


def measure(table: Table, quick: bool, part: Mapping[str, Any]) -> Record:
    """Run a table, written anew after each row: whatever stops it leaves what was measured. Of a part of it, beside the
    other rows of the last run, or of the record that is kept."""
    file, last = KEPT / f"{table.name}.json", OUTPUT / f"{table.name}.json"
    before = next((Record.read(each).rows for each in (last, file) if each.exists()), ()) if part else ()
    record = None
    for record in run(table, quick, Record.read(file).notes if file.exists() else (), part, before):
        record.write(OUTPUT)
        put(section(table.title, record).encode(), OUTPUT / f"{table.name}.md")
        if not record.finished:
            print("  ".join(f"{k} {cell(v)}" for k, v in record.rows[-1].items()), flush=True)
    assert record is not None
    return record


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TABLE", help="one table, or those of one beginning (again)")
    parser.add_argument("--quick", action="store_true", help="few samples: a smoke test, not a result")
    parser.add_argument(
        "--methods", metavar="A;B", help="of `peers`, `attack`, `eiup` and `kpop`: these rows alone; the others stay"
    )
    parser.add_argument(
        "--architectures",
        metavar="A;B",
        help="of `peers`: the same, of these demo models; of `overhead-transformers`: of these",
    )
    parser.add_argument(
        "--concepts",
        metavar="A;B",
        help="of `instead-flux`, `instead-lumina`, `direction` and its combinations: the same, of these",
    )
    parser.add_argument("--count", type=int, metavar="N", help="of all of these: pictures of a kind for each concept")
    parser.add_argument("--keep", action="store_true", help="replace the table's record in docs/measured/")
    parser.add_argument("--page", action="store_true", help="measure nothing: write docs/measured.md from its records")
    parser.add_argument(
        "--sheet", action="store_true", help="measure nothing: draw docs/erasers.jpg and docs/erasure.jpg"
    )
    args = parser.parse_args()
    if args.sheet:
        return sheet.draw()
    if args.quick and args.keep:
        parser.error("--quick measures nothing worth keeping")
    part = {name: each.split(";") for name in ("methods", "architectures", "concepts") if (each := getattr(args, name))}
    part |= {"count": args.count} if args.count else {}
    tables = () if args.page else chosen(args.only) if args.only else TABLES
    if part and not (tables and all(table.key for table in tables)):
        parser.error("--methods, --architectures, --concepts and --count are of tables whose rows are measured apart")
    start = time.time()
    for table in tables:
        print(f"\n{table.name}: {table.about}", flush=True)
        record = measure(table, args.quick, part)
        if args.keep:
            record.write(KEPT)
            print(f"kept in {KEPT.relative_to(ROOT)}/; its notes are of the run before: read them again")
    write_page(TABLES)
    print(f"tables in {OUTPUT.relative_to(ROOT)}/ after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
