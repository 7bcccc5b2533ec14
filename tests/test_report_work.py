"""A report's work in its folder: killed at any time it goes on, with several workers it ends alike."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from conceptguard.jobs.report import work
from conceptguard.jobs.report.prompts import Case
from conceptguard.jobs.report.work import Work, claimed

ROOT = Path(__file__).resolve().parent.parent
COUNT, SIDES = 12, ("unedited", "edited")
CASES = [Case(f"a mug {i}", i) for i in range(COUNT)]

# Draws a case's number in 20 ms; each drawing leaves a line, and one of a picture that is there is a failure.
WORKER = """
import runpy, sys, time
runpy.run_path('tools/run.py')['register']()
from pathlib import Path
from conceptguard.jobs.report.prompts import Case
from conceptguard.jobs.report.work import Work
folder, count = Path(sys.argv[1]), int(sys.argv[2])
it = Work(folder, [Case(f'a mug {i}', i) for i in range(count)], ('unedited', 'edited'))
it.begin({'checkpoint': 'toy'})

def log(*words):
    with open(folder / 'log', 'a') as file:
        file.write(' '.join(map(str, words)) + chr(10))

def draw(case, side, alive):
    log('twice' if it.picture(case.seed, side).exists() else 'draw', case.seed, side)
    time.sleep(0.02)
    alive()
    return f'{case.seed} {side}'.encode()

def look(data, case):
    time.sleep(0.005)
    return {'seen': data.decode()}

print('begun', flush=True)
it.run(draw, look, lambda *_: None, patience=5)
log('end')
"""


def started(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(COUNT)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def begun(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdout.readline() == "begun\n"


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for kind in ("pictures", "scores") for path in (folder / kind).iterdir()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("single")
    assert started(folder).wait(60) == 0
    return files(folder)


@pytest.mark.slow
def test_killed_ten_times_it_draws_nothing_twice_and_loses_nothing(tmp_path: Path, single: dict[str, bytes]) -> None:
    rng, kills = random.Random(0), 0
    for _ in range(10):
        process = started(tmp_path)
        begun(process)
        time.sleep(rng.uniform(0.005, 0.08))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert started(tmp_path).wait(60) == 0
    log = (tmp_path / "log").read_text().splitlines()
    assert kills == 10 and files(tmp_path) == single and len(single) == 4 * COUNT
    assert not [line for line in log if line.startswith("twice")]
    assert sum(line.startswith("draw") for line in log) <= 2 * COUNT + kills
    assert list((tmp_path / "claims").iterdir()) == []


def test_three_workers_of_which_one_is_killed_end_as_one_does(tmp_path: Path, single: dict[str, bytes]) -> None:
    first = started(tmp_path)
    begun(first)
    others = [started(tmp_path) for _ in range(2)]
    while not (tmp_path / "log").exists():
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert [process.wait(60) for process in others] == [0, 0]
    log = [line for line in (tmp_path / "log").read_text().splitlines() if line != "end"]
    assert files(tmp_path) == single
    assert sum(Counter(log).values()) <= 2 * COUNT + 1 and not [line for line in log if line.startswith("twice")]


def test_a_claim_is_taken_over_from_the_dead_alone(tmp_path: Path) -> None:
    file = tmp_path / "claims" / "1"
    assert claimed(file) and file.read_text() == f"{socket.gethostname()} {os.getpid()}"
    file.write_text(f"{socket.gethostname()} 1")  # the first process of a machine lives
    assert not claimed(file, 0)
    file.write_text("elsewhere 1")
    assert not claimed(file, 60)
    os.utime(file, (time.time() - 61,) * 2)
    assert claimed(file, 60) and file.read_text() == f"{socket.gethostname()} {os.getpid()}"


def test_a_folder_of_another_report_is_refused(tmp_path: Path) -> None:
    it = Work(tmp_path, CASES, SIDES)
    it.begin({"steps": 20})
    it.begin({"steps": 20})
    with pytest.raises(ValueError, match="of other steps; choose another folder"):
        it.begin({"steps": 21})
    with pytest.raises(ValueError, match="of other cases"):
        Work(tmp_path, CASES[1:], SIDES).begin({"steps": 20})


def test_an_interrupt_keeps_what_is_there(tmp_path: Path) -> None:
    it, drawn = Work(tmp_path, CASES, SIDES), []

    def tell(done: int, most: int, words: str) -> None:
        assert most == COUNT and words
        if done == 2:
            raise KeyboardInterrupt

    def draw(case: Case, side: str, alive: work.Step) -> bytes:
        drawn.append((case.seed, side))
        return b"x"

    with pytest.raises(KeyboardInterrupt):
        it.run(draw, lambda *_: {}, tell)
    assert drawn == [(0, "unedited"), (0, "edited"), (1, "unedited"), (1, "edited")]
    with pytest.raises(ValueError, match="10 of 12 cases are not drawn yet"):
        it.results()
    it.score(0, "edited").unlink()  # as a kill between a picture and its scores leaves it
    it.run(draw, lambda *_: {}, lambda *_: None)
    assert len(drawn) == len(set(drawn)) == 2 * COUNT and len(it.results()) == COUNT


def test_the_disk_is_asked_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = Work(tmp_path, CASES, SIDES)
    need = 24 * (64 * 64 * 3 + work.SCORE_BYTES)
    assert it.check_room(64, 64).startswith(f"24 pictures to draw, at most {work.size(need)}")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(ValueError, match="make room, or give fewer prompts"):
        it.check_room(64, 64)


def test_a_damaged_score_is_told(tmp_path: Path) -> None:
    it = Work(tmp_path, CASES[:1], SIDES)
    it.run(lambda *_: b"x", lambda *_: {}, lambda *_: None)
    it.score(0, "edited").write_text(json.dumps([]))
    with pytest.raises(ValueError, match="is damaged; delete it"):
        it.results()
    it.score(0, "edited").write_text('{"a": 1, "a": 0}')
    with pytest.raises(ValueError, match="has the name 'a' twice in one place.; delete it"):
        it.results()
