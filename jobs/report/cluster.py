"""A report's work on Ray: a task a GPU, each of which draws what nobody has drawn yet, until nothing is left.

Ray does two things here: it finds the GPUs of its machines, and starts a task anew whose worker died. All else is in
the folder (work.py), which the machines share: pictures and scores are whole or not there, and a claim of a worker that
died is taken over. So the tasks take no pictures and give none back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from ...editing.gates.packages import installed

LIVES = 100  # times that a task is started anew, after which its machine is not to be trusted
LOOK = 2.0  # seconds between looks at how far they are
HERE = "local"  # the address that starts a Ray of this machine alone

Hand = Callable[[Sequence[str]], None]  # draws till nothing is left to draw; is run in a process of its own


def on_ray(hand: Hand, arguments: Sequence[str], address: str, workers: int, watch: Callable[[], None]) -> None:
    """Returns when all tasks have ended; raises RuntimeError if one failed by itself.

    hand: of a module that the workers cannot import, which therefore goes to them whole; workers: 0 is one a GPU.
    watch: is called now and then, and may raise to end the work.
    """
    ray = installed("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[hand.__module__])
    ray.init(address=address, **({"num_cpus": workers or 1, "include_dashboard": False} if address == HERE else {}))
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        task = ray.remote(num_gpus=min(gpus, 1), num_cpus=1, max_retries=LIVES)(hand)
        waiting: list[Any] = [task.remote(list(arguments)) for _ in range(workers or gpus or 1)]
        while waiting:
            ended, waiting = ray.wait(waiting, timeout=LOOK)
            watch()
            try:
                ray.get(ended)
            except ray.exceptions.RayError as error:
                raise RuntimeError(f"a worker on Ray failed: {last_line(error)}") from None
    finally:
        ray.shutdown()


def last_line(error: Exception) -> str:
    """What went wrong, without the ways to it."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
