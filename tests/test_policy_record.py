"""The record of a policy: whole lines whatever happens to the process, files that turn over, counters."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conceptguard.editing.policy.document import Keeping
from conceptguard.editing.policy.record import Record

ROOT = Path(__file__).resolve().parent.parent
EDIT = {"method": "CRE", "source": 'a "knife"', "steps": {"all": 4, "due": 4, "acted": 3}}


def entry(i: int = 0, verdict: str = "edited", **more: Any) -> dict[str, Any]:
    return {"verdict": verdict, "number": i, **more}


def test_entries_come_back_in_their_order(tmp_path: Path) -> None:
    record = Record(tmp_path / "record")
    for i in range(5):
        record.add(entry(i, why="ä\n\u2028"), Keeping())
    assert [each["number"] for each in Record(tmp_path / "record").entries()] == [0, 1, 2, 3, 4]
    assert len(record.path.read_bytes().splitlines()) == 5 and record.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("torn", [b'{"verdict": "edi', b"\xff\xfe", b"{}", b'"verdict time"'])
def test_a_torn_line_costs_no_other(tmp_path: Path, torn: bytes) -> None:
    record = Record(tmp_path)
    record.add(entry(0), Keeping())
    with record.path.open("ab") as file:
        file.write(torn)
    record.add(entry(1), Keeping())
    assert [each["number"] for each in record.entries()] == [0, 1]


def test_it_survives_a_kill_in_the_middle(tmp_path: Path) -> None:
    """Of a process that writes without end, whose long lines are torn wherever the kill finds it."""
    script = (
        "import runpy; runpy.run_path('tools/run.py')['register'](); from pathlib import Path\n"
        "from conceptguard.editing.policy.record import Record\n"
        "from conceptguard.editing.policy.document import Keeping\n"
        f"r, i = Record(Path({str(tmp_path)!r})), 0\n"
        "while True: r.add({'verdict': 'edited', 'number': i, 'why': 'x' * 200_000}, Keeping()); i += 1"
    )
    record = Record(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        while not (record.path.exists() and record.path.stat().st_size > 2_000_000):
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    record.path.open("ab").write(b'{"verdict": "torn')  # the kill seldom hits within the one call
    record.add(entry(-1), Keeping())
    numbers = [each["number"] for each in record.entries()]
    assert numbers == [*range(len(numbers) - 1), -1] and len(numbers) > 9


def test_full_files_turn_over_and_the_oldest_go(tmp_path: Path) -> None:
    record, keeping = Record(tmp_path), Keeping(megabytes=0.001, files=2)
    for i in range(40):
        record.add(entry(i, why="x" * 200), keeping)
    assert [path.name for path in record.older()] == ["record-000008.jsonl", "record-000009.jsonl"]
    numbers = [each["number"] for each in record.entries()]
    assert numbers == list(range(numbers[0], 40)) and len(numbers) > 8
    record.add(entry(99, why="x" * 2000), Keeping(megabytes=0.001, files=0))
    record.add(entry(100), Keeping(megabytes=0.001, files=0))
    assert not record.older()


def test_several_writers_share_it(tmp_path: Path) -> None:
    records = [Record(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: records[i % 4].add(entry(i), Keeping()), range(100)))
    assert sorted(each["number"] for each in records[0].entries()) == list(range(100))


def test_a_disk_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "record").write_text("a file is in the folder's place")
    with pytest.raises(OSError):
        Record(tmp_path / "record").add(entry(), Keeping())


def test_what_was_refused_today(tmp_path: Path) -> None:
    record = Record(tmp_path)
    old = json.dumps({"time": "2020-01-01T00:00:00+00:00", "verdict": "refused", "why": "old"})
    record.append(old)
    record.add(entry(1, "refused", why="new"), Keeping())
    record.add(entry(2), Keeping())
    assert [each["why"] for each in record.refused_today()] == ["new"]


LINE = re.compile(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="(\\.|[^"\\\n])*"(,\w+="(\\.|[^"\\\n])*")*\})? [0-9.e+]+')


def test_counters_are_prometheus_text(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.add(entry(0, edits=[EDIT], seconds=2.5), Keeping())
    record.add(entry(1, edits=[{**EDIT, "steps": {"acted": 0}}], seconds=400.0), Keeping())
    record.add(entry(2, "refused", why="no"), Keeping())
    text = record.metrics()
    assert text.endswith("\n") and all(LINE.fullmatch(line) for line in text.splitlines())
    assert 'concept_guard_runs_total{verdict="edited"} 2' in text
    assert 'concept_guard_runs_total{verdict="refused"} 1' in text
    assert r'concept_guard_edits_total{method="CRE",source="a \"knife\"",what="acted"} 1' in text
    assert 'concept_guard_run_seconds_bucket{le="1"} 0' in text and 'seconds_bucket{le="3"} 1' in text
    assert 'concept_guard_run_seconds_bucket{le="+Inf"} 2' in text and "seconds_count 2" in text
    assert "seconds_sum 402.500" in text


def test_it_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.add(entry(), Keeping())
    fd = os.open(record.path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b'{"time": "half')
    assert [each["number"] for each in Record(tmp_path).entries()] == [0]
    os.close(fd)
