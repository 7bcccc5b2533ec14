"""What a server's policy costs where it has nothing to do: whole runs of the demo model, with and without it."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from ..editing.policy.enforce import Enforcement
from ..editing.policy.file import PolicyFile
from ..editing.policy.govern import Files
from ..editing.policy.record import Record
from ..editing.presets.apply import nowhere
from ..tools.environment import ROOT
from .sampling import CFG, SAMPLER, SCHEDULER, demo
from .table import Row, Table

PRESETS = ("no-weapons", "no-gore", "no-nudity")
NEVER = {"kind": "prompt", "threshold": 1.0}  # of a prompt that does not hold the very phrase


def gated(name: str) -> str:
    """A preset of the pack behind gates of its own."""
    preset = json.loads((ROOT / "presets" / f"{name}.json").read_text(encoding="utf-8"))
    preset["edits"] = [{**edit, "gate": NEVER} for edit in preset["edits"]]
    return json.dumps(preset)


def enforcement(folder: Path) -> Enforcement:
    for name in PRESETS:
        (folder / f"{name}.json").write_text(gated(name), encoding="utf-8")
    rules = [{"presets": [f"{name}.json" for name in PRESETS]}]
    (folder / "policy.json").write_text(json.dumps({"on": True, "rules": rules}), encoding="utf-8")
    return Enforcement(PolicyFile(folder / "policy.json", ROOT / "presets"), Record(folder / "record"), Files(nowhere))


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it makes, and its CPU time: whatever else the machine does."""
    start = time.process_time()
    return run(), time.process_time() - start


def cost(steps: int, pairs: int) -> Iterator[Row]:
    own, latent = demo(), torch.zeros(1, 4, 16, 16)
    noise = comfy.sample.prepare_noise(latent, 1)

    def encode(text: str) -> Any:
        return own.clip.encode_from_tokens_scheduled(own.clip.tokenize(text))

    def run(conds: tuple[Any, Any]) -> Tensor:
        return comfy.sample.sample(
            own.model, noise, steps, CFG, SAMPLER, SCHEDULER, *conds, latent, disable_pbar=True, seed=1
        )

    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        policy = enforcement(Path(name))
        plain = encode("a blue teapot"), encode("")
        policy.refresh()
        try:
            governed = encode("a blue teapot"), encode("")  # in a server it has been on from the start
            run(governed)
            ratios, same = [], True
            for _ in range(pairs):
                policy.off()
                first, before = timed(partial(run, plain))
                policy.on()
                second, during = timed(partial(run, governed))
                policy.off()
                _, after = timed(partial(run, plain))
                ratios.append(2 * during / (before + after))
                same = same and torch.equal(first, second)
            verdicts = {entry["verdict"] for entry in policy.record.entries()}
        finally:
            policy.off()
    yield {
        "policy": f"{len(PRESETS)} presets behind closed gates",
        "steps": steps,
        "time over a run without": statistics.median(ratios),
        "goal": 1.02,
        "the same picture": same and verdicts == {"closed"},
    }


TABLES = (
    Table(
        "policy",
        "What a server's policy costs",
        "Whole runs of the demo model with and without a policy of three presets whose prompt gates stay closed; each "
        "run under it over the runs before and after, CPU time, medians.",
        partial(cost, 20, 15),
        partial(cost, 2, 1),
    ),
)
