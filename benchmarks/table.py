"""What a benchmark is: a table, the rows that its code yields, and the record of a run of it.

A record is what a run leaves: `output/bench/NAME.json`, and `docs/measured/NAME.json` once it is to be kept, of which
measured.py makes the page.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..demo.load import MODEL_FILE
from ..editing.files.whole import put
from ..jobs.measure import Rate
from ..tools.environment import ROOT

Row = dict[str, Any]
Rows = Callable[..., Iterable[Row]]


@dataclass(frozen=True)
class Table:
    """A table of figures: `full` yields the rows that are kept, `quick` a few of few samples, to see that it runs.

    key: the columns that name a row, of a table whose `full` can yield a part of its rows; total: of all others, a last
    row, wherever they were measured.
    """

    name: str  # of its files, and what `--only` asks for
    title: str
    about: str  # what a figure says
    full: Rows
    quick: Rows
    key: tuple[str, ...] = ()
    total: Callable[[Sequence[Row]], Row] | None = None

    def same(self, one: Row, other: Row) -> bool:
        """Whether two rows are of one name."""
        return bool(self.key) and all(one[k] == other[k] for k in self.key)

    def totalled(self, rows: Sequence[Row]) -> list[Row]:
        """With the last row made anew."""
        if self.total is None:
            return list(rows)
        name = self.total(rows)
        parts = [row for row in rows if not self.same(row, name)]
        return [*parts, self.total(parts)]

    @property
    def command(self) -> str:
        return f'make bench ARGS="--only {self.name}"'


@dataclass(frozen=True)
class Record:
    """A run of a table."""

    table: str
    command: str
    about: str
    settings: str  # of the sampler and the machine
    commit: str
    finished: bool
    notes: tuple[str, ...]  # what a reader must know beside the figures; written by hand
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, file: Path) -> Record:
        held = json.loads(file.read_text(encoding="utf-8"))
        rows = tuple({column: found(value) for column, value in row.items()} for row in held.pop("rows"))
        return cls(**{**held, "notes": tuple(held["notes"]), "rows": rows})

    def write(self, folder: Path) -> None:
        """Whole or not at all."""
        rows = [{column: plain(value) for column, value in row.items()} for row in self.rows]
        text = json.dumps({**vars(self), "rows": rows}, indent=1, ensure_ascii=False) + "\n"
        put(text.encode(), folder / f"{self.table}.json")


def plain(value: Any) -> Any:
    return value.json() if isinstance(value, Rate) else value


def found(value: Any) -> Any:
    """What `plain` made plain."""
    return Rate(value["hits"], value["n"]) if isinstance(value, Mapping) else value


def run(
    table: Table,
    quick: bool,
    notes: Sequence[str] = (),
    part: Mapping[str, Any] | None = None,
    held: Sequence[Row] = (),
) -> Iterator[Record]:
    """The record after each row, and at last the finished one. part: which of its rows, as `full` takes it; of those of
    before, `held`, the ones stay whose key no new one has."""
    settings, commit = machine(), head()
    done: list[Row] = list(held)

    def record(finished: bool) -> Record:
        return Record(table.name, table.command, table.about, settings, commit, finished, tuple(notes), tuple(done))

    for row in table.quick() if quick else table.full(**part or {}):
        done = table.totalled([other for other in done if not table.same(other, row)] + [row])
        yield record(False)
    yield record(True)


def machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    made = f"{platform.machine()} CPU, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"
    return f"{made}, {weights()}"


@cache
def weights() -> str:
    """The demo model by the first digits of its file's SHA-256."""
    return f"demo model {hashlib.sha256(MODEL_FILE.read_bytes()).hexdigest()[:8]}"


def head() -> str:
    """The commit that is checked out, and whether anything differs from it; nothing outside a repository."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
