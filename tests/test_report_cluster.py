"""A report on Ray, by a stand-in for what it uses of Ray: tasks in processes, which are started anew if they die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from conceptguard.jobs.report.cluster import on_ray
from conceptguard.jobs.report.prompts import Case
from conceptguard.jobs.report.work import Work

CASES = [Case(f"a mug {i}", i) for i in range(12)]
FORK = multiprocessing.get_context("fork")


class RayError(Exception):
    pass


class Task:
    """Runs in a process of its own, and again if that is killed; what it raises is kept for `get`."""

    def __init__(self, hand: Callable[[Any], None], given: Any, retries: int) -> None:
        self.hand, self.given, self.retries, self.errors = hand, given, retries, FORK.SimpleQueue()
        self.start()

    def start(self) -> None:
        self.process = FORK.Process(target=self.run)
        self.process.start()

    def run(self) -> None:
        try:
            self.hand(self.given)
        except BaseException as error:
            self.errors.put(f"Traceback of Ray's\n{type(error).__name__}: {error}\n")
            os._exit(0)
        os._exit(0)

    def ended(self) -> bool:
        self.process.join(0.02)
        if self.process.exitcode is not None and self.process.exitcode < 0 and self.retries:
            self.retries -= 1
            self.start()
        return self.process.exitcode is not None


class Ray(types.ModuleType):
    def __init__(self, gpus: int = 0) -> None:
        super().__init__("ray")
        self.gpus, self.tasks, self.asked, self.closed = gpus, list[Task](), dict[str, Any](), 0
        self.by_value: list[Any] = []
        self.exceptions = types.SimpleNamespace(RayError=RayError)
        self.cloudpickle = types.SimpleNamespace(register_pickle_by_value=self.by_value.append)

    def init(self, **how: Any) -> None:
        self.asked["init"] = how

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0, **({"GPU": float(self.gpus)} if self.gpus else {})}

    def remote(self, **how: Any) -> Any:
        self.asked["task"] = how

        def of(hand: Any) -> Any:
            def started(given: Any) -> Task:
                self.tasks.append(Task(hand, given, how["max_retries"]))
                return self.tasks[-1]

            return types.SimpleNamespace(remote=started)

        return of

    def wait(self, tasks: list[Task], timeout: float) -> tuple[list[Task], list[Task]]:
        ended = next(([task] for task in tasks if task.ended()), [])
        return ended, [task for task in tasks if task not in ended]

    def get(self, tasks: list[Task]) -> None:
        for task in tasks:
            if not task.errors.empty():
                raise RayError(task.errors.get())

    def shutdown(self) -> None:
        self.closed += 1
        for task in self.tasks:
            task.process.kill()


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    monkeypatch.setitem(sys.modules, "ray", it := Ray())
    return it


def hand(given: Sequence[str]) -> None:
    """Draws case by case; the first worker that gets to case 4 dies there once, by the signal that nobody hears."""
    folder = Path(given[0])
    it = Work(folder, CASES, ("unedited", "edited"))

    def draw(case: Case, side: str, alive: Any) -> bytes:
        with open(folder / "log", "a") as log:
            log.write(f"{'twice' if it.picture(case.seed, side).exists() else 'draw'} {os.getpid()}\n")
        if case.seed == 4 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{case.seed} {side}".encode()

    it.run(draw, lambda data, _: {"seen": data.decode()}, lambda *_: None)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("[ps]*/[!.]*"))}


def test_workers_of_which_one_dies_end_as_a_single_run_does(tmp_path: Path, ray: Ray) -> None:
    (tmp_path / "ray").mkdir()
    looks: list[int] = []
    on_ray(hand, [str(tmp_path / "ray")], "local", 3, lambda: looks.append(1))
    single = tmp_path / "single"
    single.mkdir()
    (single / "died").touch()
    hand([str(single)])
    assert files(tmp_path / "ray") == files(single) and len(files(single)) == 48
    log = (tmp_path / "ray" / "log").read_text().splitlines()
    assert (tmp_path / "ray" / "died").exists() and len(log) == 25, "a case of the dead was drawn again, no other was"
    assert not [line for line in log if line.startswith("twice")] and len({line.split()[1] for line in log}) >= 2
    assert looks and ray.closed == 1 and list((tmp_path / "ray" / "claims").iterdir()) == []
    assert ray.asked["task"]["max_retries"] > 10 and ray.by_value == [sys.modules[__name__]]


@pytest.mark.parametrize(("gpus", "workers", "tasks", "gpu"), [(4, 0, 4, 1), (0, 0, 1, 0), (4, 2, 2, 1), (0, 3, 3, 0)])
def test_there_is_one_worker_a_gpu(gpus: int, workers: int, tasks: int, gpu: int, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", it := Ray(gpus))
    on_ray(lambda _: None, [], "auto", workers, lambda: None)
    assert len(it.tasks) == tasks and it.asked["task"]["num_gpus"] == gpu and it.asked["init"] == {"address": "auto"}
    on_ray(lambda _: None, [], "local", workers, lambda: None)
    assert it.asked["init"]["num_cpus"] == (workers or 1)


def failing(_: Any) -> None:
    raise ValueError("there is no checkpoint")


def test_a_task_that_fails_by_itself_ends_the_work(ray: Ray) -> None:
    with pytest.raises(RuntimeError, match="a worker on Ray failed: ValueError: there is no checkpoint"):
        on_ray(failing, [], "local", 2, lambda: None)
    assert ray.closed == 1


def test_an_interrupt_ends_ray(ray: Ray) -> None:
    def watch() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_ray(lambda _: None, [], "local", 2, watch)
    assert ray.closed == 1


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="the package ray is not installed; run `pip install ray`"):
        on_ray(hand, [], "local", 2, lambda: None)
