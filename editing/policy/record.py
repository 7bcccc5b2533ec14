"""The record: one JSON line a sampling run, in files that are only ever added to, and turned over when they are full.

A line is written at once, by one call. If the process dies in the middle of it, the next one begins with a new line:
the torn one is a line that is no JSON, and every other can be read.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from .document import Keeping

NAME = "record.jsonl"
LAST = 32  # entries that are held for the page
GLANCE = 2 * 2**20  # bytes of the record that a page's visit reads
BOUNDS = (1, 3, 10, 30, 100, 300)  # seconds
VERDICTS = ("edited", "closed", "passed", "refused", "failed")


class Record:
    """In a folder of its own. counts: of this process, since it started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, Lock()
        self.verdicts: Counter[str] = Counter()
        self.edits: Counter[tuple[str, str, str]] = Counter()  # (method, source, acted or not)
        self.seconds: list[int] = [0] * (len(BOUNDS) + 1)
        self.total = 0.0
        self.last: deque[dict[str, Any]] = deque(maxlen=LAST)

    @property
    def path(self) -> Path:
        return self.folder / NAME

    def add(self, entry: dict[str, Any], keeping: Keeping, log: bool = True) -> None:
        """Raises OSError if it cannot be written: a run without a record is none that the policy allows. log: whether
        the host's log says it as well."""
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry}
        with self.lock:
            self.count(entry)
            self.turn_over(keeping)
            self.append(json.dumps(entry, ensure_ascii=False, default=str))
        if log:
            logging.info("ConceptGuard policy: %s %s", entry["verdict"], entry.get("why") or entry.get("model", ""))

    def append(self, line: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            torn = os.lseek(fd, 0, os.SEEK_END) and os.lseek(fd, -1, os.SEEK_END) >= 0 and os.read(fd, 1) != b"\n"
            data = b"\n" * bool(torn) + line.encode(errors="replace") + b"\n"
            if os.write(fd, data) < len(data):
                raise OSError("the disk took a part of a line")
        finally:
            os.close(fd)

    def turn_over(self, keeping: Keeping) -> None:
        """A full file gets the next number; the oldest go."""
        try:
            full = self.path.stat().st_size >= keeping.megabytes * 2**20
        except FileNotFoundError:
            return
        if full:
            older = self.older()
            number = 1 + max((number_of(path) for path in older), default=0)
            os.replace(self.path, self.folder / f"record-{number:06}.jsonl")
            for path in self.older()[: -keeping.files or None]:
                path.unlink()

    def older(self) -> list[Path]:
        """The full files, the oldest first."""
        return sorted(self.folder.glob("record-*.jsonl"), key=number_of)

    def entries(self) -> Iterator[dict[str, Any]]:
        """Of all files, the oldest first; torn lines are left out."""
        for path in (*self.older(), self.path):
            if path.exists():
                yield from entries_of(path)

    def refused_today(self) -> list[dict[str, Any]]:
        """In the last megabytes of the file that is written to: a page asks for it whenever it is opened."""
        today = datetime.now(UTC).date().isoformat()
        here = entries_of(self.path, GLANCE) if self.path.exists() else ()
        return [each for each in here if each["verdict"] == "refused" and each["time"].startswith(today)]

    # -- counters ------------------------------------------------------------------------------------------------------

    def count(self, entry: dict[str, Any]) -> None:
        self.last.append(entry)
        self.verdicts[entry["verdict"]] += 1
        for edit in entry.get("edits", ()):
            acted = "acted" if edit["steps"]["acted"] else "idle"
            self.edits[edit["method"], edit["source"], acted] += 1
        if (seconds := entry.get("seconds")) is not None:
            self.total += seconds
            self.seconds[sum(seconds > bound for bound in BOUNDS)] += 1

    def metrics(self) -> str:
        """In Prometheus' text format, version 0.0.4."""
        with self.lock:
            lines = ["# HELP concept_guard_runs_total Sampling runs under the policy, by verdict."]
            lines += ["# TYPE concept_guard_runs_total counter"]
            lines += [f'concept_guard_runs_total{{verdict="{name}"}} {self.verdicts[name]}' for name in VERDICTS]
            lines += ["# HELP concept_guard_edits_total Edits of those runs, and whether they acted."]
            lines += ["# TYPE concept_guard_edits_total counter"]
            for (method, source, acted), n in sorted(self.edits.items()):
                labels = f'method="{label(method)}",source="{label(source)}",what="{acted}"'
                lines.append(f"concept_guard_edits_total{{{labels}}} {n}")
            name = "concept_guard_run_seconds"
            lines += [f"# HELP {name} How long sampling took.", f"# TYPE {name} histogram"]
            for i, bound in enumerate((*BOUNDS, "+Inf")):
                lines.append(f'{name}_bucket{{le="{bound}"}} {sum(self.seconds[: i + 1])}')
            lines += [f"{name}_sum {self.total:.3f}", f"{name}_count {sum(self.seconds)}"]
        return "\n".join(lines) + "\n"


def entries_of(path: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """most: bytes at its end that are read; None: all."""
    with path.open("rb") as file:
        if most is not None and path.stat().st_size > most:
            file.seek(-most, os.SEEK_END)  # into a line, as a rule, which is then as good as torn
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and "verdict" in entry and "time" in entry:
                yield entry


def number_of(path: Path) -> int:
    digits = path.stem.removeprefix("record-")
    return int(digits) if digits.isdigit() else 0


def label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
