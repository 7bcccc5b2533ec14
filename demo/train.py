"""`make train-demo`: rebuild the demo data and weights from scratch. Each stage goes on where it was stopped.

Stages, each with its checkpoint in output/train-demo/ (or `--folder`): autoencoder, latents (the painted world as the
UNet sees it), unet with its text encoder, judge; `--only` runs one of them, after what it needs.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..tools.environment import ROOT
from . import autoencoder, export, judge, mix, train_autoencoder, train_flow, train_unet, training, witness, world
from .glyphs import VERSIONS, Painter
from .load import JUDGE_FILE, MODEL_FILE, WEIGHTS, WITNESS_FILE, load, load_judge, part, read
from .remains import remains
from .training import saved
from .transformers import CONFIGS

FOLDER = ROOT / "output" / "train-demo"
PICTURES, SEED = 60000, 0
DECODED = 800  # drawings through the autoencoder that the witness learns from
STEPS = {
    "autoencoder": 4000,
    "unet": 16000,
    "judge": 4500,
    "witness": 3000,
    "flux": 40000,
    "lumina": 40000,
}  # from scratch; fewer do where the shipped weights go on


def tokenizer() -> Any:
    """CLIP's ids of a text without start, end and padding."""
    from comfy.sd1_clip import SD1Tokenizer

    from .model import END, START

    clip = SD1Tokenizer()
    return lambda text: [t for t, _ in clip.tokenize_with_weights(text)["l"][0] if t not in (START, END)]


def training_pictures() -> list[world.Picture]:
    rng = random.Random(SEED)
    return [mix.any_picture(rng) for _ in range(PICTURES)]


def first_autoencoder(painter: Painter, go_on: bool) -> nn.Module:
    """The written encoder and a decoder that has learned nothing; `go_on`: the shipped ones."""
    vae = autoencoder.build().requires_grad_(False)
    if go_on:
        vae.load_state_dict(part(read(MODEL_FILE), "vae."))
        p, mean = autoencoder.read_encoder(vae)
    else:
        autoencoder.initialise(vae)
        train_autoencoder.silence(autoencoder.halves(vae)[1])
        rng = random.Random(SEED)
        p, mean = autoencoder.principal_components(
            autoencoder.paint_set(painter, [world.any_picture(rng) for _ in range(2000)])
        )
    autoencoder.write_encoder(vae, p, mean)
    return vae


def autoencoder_stage(folder: Path, painter: Painter, steps: int, go_on: bool, encoder_learns: bool) -> nn.Module:
    lr = train_autoencoder.LEARN_ON if go_on else train_autoencoder.LEARN
    vae = first_autoencoder(painter, go_on)
    trainer = train_autoencoder.AutoencoderTrainer(vae, painter, steps, SEED, lr, encoder_learns)
    training.run(trainer, folder / "autoencoder.pt")
    print(json.dumps(train_autoencoder.quality(vae, painter)), flush=True)
    return vae.requires_grad_(False)


def linear_encoder(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a written encoder does to pixels in [0, 1], as one matrix product."""
    p, mean = autoencoder.read_encoder(vae)
    return lambda x: autoencoder.encode((x * 255).round().to(torch.uint8), p, mean)


@torch.no_grad()
def latents_stage(folder: Path, painter: Painter, encode: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The training pictures' latents, fp16 [n, 4, 16, 16], and their reference pictures, uint8 [r, 3, 64, 64].

    Pictures that differ in their captions alone are encoded once.
    """
    path = folder / "latents.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    pictures, start = training_pictures(), time.time()
    first = {(p.layers, p.background): p for p in pictures}
    row, found = {key: i for i, key in enumerate(first)}, []
    once = list(first.values())
    for i in range(0, len(once), 64):
        x = torch.stack([painter(p) for p in once[i : i + 64]])
        found.append(encode(x).half())
        if i % 6400 == 0:
            print(f"latents {i}/{len(once)} {time.time() - start:.0f}s", flush=True)
    shown = torch.stack([painter(p.reference) for p in pictures if p.reference])
    shown = torch.nn.functional.interpolate(shown, size=64, mode="area")
    latents = torch.cat(found)[[row[p.layers, p.background] for p in pictures]]
    return saved(path, {"latents": latents, "references": (shown * 255).round().to(torch.uint8)})


def unet_stage(folder: Path, data: dict[str, Tensor], steps: int, go_on: bool) -> dict[str, Any]:
    trainer = train_unet.Trainer(training_pictures(), data["latents"], data["references"], tokenizer(), SEED)
    if go_on:
        trainer.start_from(read(MODEL_FILE))
    peak = 5e-4 if go_on else 8e-4
    train_unet.train(trainer, steps, peak=peak, words=0 if go_on else 500, checkpoint=folder / "unet.pt")
    return trainer.state()


def flow_stage(architecture: str, folder: Path, data: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """A transformer, which reads by the encoders that the UNet's training had when the first transformer's began.

    Remove readers.pt to let the transformers read on by what the UNet has learned since.
    """
    path = folder / "readers.pt"
    if not path.exists():
        unet = torch.load(folder / "unet.pt", weights_only=True)
        kept = {k: v for k, v in unet["average"].items() if k.startswith(train_flow.READERS)}
        saved(path, {"weights": kept, "used": unet["used"], "step": unet["step"]})
    read_by = torch.load(path, weights_only=True)
    print(f"{architecture} reads by the encoders of the UNet at step {read_by['step']}", flush=True)
    trainer = train_flow.FlowTrainer(
        architecture,
        training_pictures(),
        data,
        train_flow.readers(read_by["weights"], read_by["used"]),
        tokenizer(),
        steps,
        SEED,
    )
    training.run(trainer, folder / f"{architecture}.pt")
    return trainer.average


def judge_stage(folder: Path, painter: Painter, steps: int) -> dict[str, Tensor]:
    path = folder / "judge.pt"
    if not path.exists():
        model = judge.train(painter, steps, SEED + 1)
        print(json.dumps({"judge on unseen renderings": judge.accuracy(model, painter, damage=False)}), flush=True)
        saved(path, model.state_dict())
    return torch.load(path, weights_only=True)


def witness_stage(folder: Path, painter: Painter, steps: int) -> dict[str, Tensor]:
    """The second judge; the shipped demo model draws the remains that it learns from, the first judge lends eyes."""
    left, path, shown = remains(load(), folder / "remains.pt"), folder / "decoded.pt", witness.views(DECODED, SEED + 2)
    if not path.exists():
        saved(path, witness.decoded(first_autoencoder(painter, True), painter, shown))
    lessons = witness.Lessons(left, torch.load(path, weights_only=True), shown)
    trainer = witness.WitnessTrainer(painter, steps, lessons, load_judge(), SEED + 1)
    training.run(trainer, folder / "witness.pt")
    model = witness.calibrate(trainer.model.eval(), painter)
    print(json.dumps(witness.blind_spots(model, painter)), flush=True)
    return model.state_dict()


def write_weights(folder: Path, painter: Painter, vae: nn.Module, unet: dict[str, Any]) -> None:
    """The finished stages as weights files in `folder`."""
    about = {
        "seed": str(SEED),
        "pictures": str(PICTURES),
        "steps": str(unet["step"]),
        "icons": json.dumps(VERSIONS),
        "licence": "CC-BY-4.0 (drawings: CC-BY-4.0, Apache-2.0, MIT)",
    }
    rng = random.Random(SEED)
    pixels = autoencoder.paint_set(painter, [world.any_picture(rng) for _ in range(500)])
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode_with(vae, x.float() / 255) for x in pixels.split(50)])
    rgb = export.latent_rgb(latents, pixels)
    tensors = export.model_tensors(unet["average"], unet["used"], vae.state_dict(), rgb)
    export.write(folder / MODEL_FILE.name, tensors, about)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make train-demo", description=__doc__)
    parser.add_argument("--only", choices=tuple(STEPS), help="run one stage and write no weights")
    parser.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="train the shipped autoencoder and UNet further instead of anew, and keep the judge",
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where checkpoints and icons are kept")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the weights files are written")
    parser.add_argument(
        "--encoder-learns", action="store_true", help="train the encoder with its decoder, before the UNet"
    )
    for name, steps in STEPS.items():
        parser.add_argument(f"--{name}-steps", type=int, default=steps, metavar="N")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    painter = Painter(args.folder / "icons")
    if args.only == "judge":
        judge_stage(args.folder, painter, args.judge_steps)
        return
    if args.only == "witness":
        weights = witness_stage(args.folder, painter, args.witness_steps)
        export.save_judge(args.weights / WITNESS_FILE.name, weights, {"seed": str(SEED + 1)})
        return

    def whole_autoencoder() -> nn.Module:
        return autoencoder_stage(args.folder, painter, args.autoencoder_steps, args.go_on, args.encoder_learns)

    if args.only == "autoencoder":
        whole_autoencoder()
        return
    # A written encoder's latents do not wait for its decoder.
    if args.encoder_learns:
        encode: Callable[[Tensor], Tensor] = partial(autoencoder.encode_with, whole_autoencoder())
    else:
        encode = linear_encoder(first_autoencoder(painter, args.go_on))
    data = latents_stage(args.folder, painter, encode)
    if args.only in CONFIGS:
        flow_stage(args.only, args.folder, data, getattr(args, f"{args.only}_steps"))
        return
    unet = unet_stage(args.folder, data, args.unet_steps, args.go_on)
    if args.only:
        return
    vae = whole_autoencoder()
    write_weights(args.weights, painter, vae, unet)
    if not args.go_on:
        about = {"seed": str(SEED + 1), "icons": json.dumps(VERSIONS)}
        export.save_judge(args.weights / JUDGE_FILE.name, judge_stage(args.folder, painter, args.judge_steps), about)
    print(f"wrote {args.weights}/")


if __name__ == "__main__":
    main()
