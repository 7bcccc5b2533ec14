"""`make train-demo`: rebuild the demo data and weights from scratch. Each stage goes on where it was stopped.

Stages, each with its checkpoint in output/train-demo/ (or `--folder`): autoencoder, unet with its text encoder, flux
and lumina (transformers that read by that text encoder), judge, witness (the second judge), and weights, which writes
files from the checkpoints as they stand. `--only` runs one of them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..tools.environment import ROOT
from . import autoencoder, export, judge, mix, train_autoencoder, train_flow, train_unet, training, witness, world
from .glyphs import VERSIONS, Painter
from .load import JUDGE_FILE, MODEL_FILE, WEIGHTS, WITNESS_FILE, load, load_judge, part, read, transformer_file
from .redraw import Redraw
from .remains import remains
from .training import saved
from .transformers import CONFIGS

FOLDER = ROOT / "output" / "train-demo"
PICTURES, SEED = 60000, 0
WORDS = 500  # steps in which a text encoder that knows nothing learns to read, before its UNet's first
DECODED = 800  # drawings through the autoencoder that the witness learns from
STEPS = {
    "unet": 16000,
    "autoencoder": 4000,
    "flux": 40000,
    "lumina": 40000,
    "judge": 4500,
    "witness": 3000,
}  # from scratch; fewer do where the shipped weights go on


def tokenizer() -> Any:
    """CLIP's ids of a text without start, end and padding."""
    from comfy.sd1_clip import SD1Tokenizer

    from .model import END, START

    clip = SD1Tokenizer()
    return lambda text: [t for t, _ in clip.tokenize_with_weights(text)["l"][0] if t not in (START, END)]


def linear_encoder(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a written encoder does to pixels in [0, 1], as one matrix product."""
    p, mean = autoencoder.read_encoder(vae)
    return lambda x: autoencoder.encode((x * 255).round().to(torch.uint8), p, mean)


@dataclass(frozen=True)
class Stages:
    """What trains, from which checkpoints and how long. go_on: from the shipped weights instead of from nothing."""

    folder: Path
    weights: Path
    steps: dict[str, int]
    go_on: bool = False
    encoder_learns: bool = False
    batch: int = train_flow.BATCH

    @cached_property
    def painter(self) -> Painter:
        return Painter(self.folder / "icons")

    @cached_property
    def pictures(self) -> list[world.Picture]:
        rng = random.Random(SEED)
        return [mix.any_picture(rng) for _ in range(PICTURES)]

    def checkpoint(self, name: str) -> Any:
        return torch.load(self.folder / f"{name}.pt", weights_only=True, map_location="cpu")

    def first_autoencoder(self) -> nn.Module:
        """The written encoder, and a decoder that has learned nothing or is the shipped one."""
        vae = autoencoder.build().requires_grad_(False)
        if self.go_on:
            vae.load_state_dict(part(read(MODEL_FILE), "vae."))
            p, mean = autoencoder.read_encoder(vae)
        else:
            autoencoder.initialise(vae)
            train_autoencoder.silence(autoencoder.halves(vae)[1])
            rng = random.Random(SEED)
            some = autoencoder.paint_set(self.painter, [world.any_picture(rng) for _ in range(2000)])
            p, mean = autoencoder.principal_components(some)
        autoencoder.write_encoder(vae, p, mean)
        return vae

    def autoencoder(self) -> nn.Module:
        """The decoder, which learns to draw what the UNet meant where that is there already; or both halves, before."""
        lr = train_autoencoder.LEARN_ON if self.go_on else train_autoencoder.LEARN
        vae = self.first_autoencoder()
        redraw = None
        if not self.encoder_learns and (self.folder / "unet.pt").exists():
            redraw = Redraw(self.checkpoint("unet"), tokenizer())
        trainer = train_autoencoder.AutoencoderTrainer(
            vae, self.painter, self.steps["autoencoder"], SEED, lr, self.encoder_learns, redraw
        )
        training.run(trainer, self.folder / "autoencoder.pt")
        return vae.requires_grad_(False)

    @torch.no_grad()
    def latents(self) -> dict[str, Tensor]:
        """The training pictures' latents, fp16 [n, 4, 16, 16], and their reference pictures, uint8 [r, 3, 64, 64].

        Pictures that differ in their captions alone are encoded once. A written encoder does not wait for its decoder.
        """
        if (self.folder / "latents.pt").exists():
            return self.checkpoint("latents")
        if self.encoder_learns:
            encode: Callable[[Tensor], Tensor] = partial(autoencoder.encode_with, self.autoencoder())
        else:
            encode = linear_encoder(self.first_autoencoder())
        start, found = time.time(), []
        first = {(p.layers, p.background): p for p in self.pictures}
        row, once = {key: i for i, key in enumerate(first)}, list(first.values())
        for i in range(0, len(once), 64):
            found.append(encode(torch.stack([self.painter(p) for p in once[i : i + 64]]).to(training.device())).half())
            if i % 6400 == 0:
                print(f"latents {i}/{len(once)} {time.time() - start:.0f}s", flush=True)
        shown = torch.stack([self.painter(p.reference) for p in self.pictures if p.reference])
        shown = torch.nn.functional.interpolate(shown, size=64, mode="area")
        latents = torch.cat(found)[[row[p.layers, p.background] for p in self.pictures]]
        data = {"latents": latents, "references": (shown * 255).round().to(torch.uint8)}
        return saved(self.folder / "latents.pt", data)

    def unet(self) -> None:
        data = self.latents()
        trainer = train_unet.Trainer(
            self.pictures, data["latents"], data["references"], tokenizer(), self.steps["unet"], SEED, self.batch
        )
        path = self.folder / "unet.pt"
        if self.go_on:
            trainer.peak = train_unet.LEARN_ON
            trainer.start_from(read(MODEL_FILE))
        elif not path.exists():
            trainer.teach_words(WORDS)
        training.run(trainer, path)

    def transformer(self, architecture: str) -> None:
        """It reads by the encoders that the UNet's training had when the first transformer's began.

        Remove readers.pt to let the transformers read on by what the UNet has learned since.
        """
        path = self.folder / "readers.pt"
        if not path.exists():
            unet = self.checkpoint("unet")
            kept = {k: v for k, v in unet["average"].items() if k.startswith(train_flow.READERS)}
            saved(path, {"weights": kept, "used": unet["used"], "step": unet["step"]})
        by = self.checkpoint("readers")
        print(f"{architecture} reads by the encoders of the UNet at step {by['step']}", flush=True)
        read_by, steps = train_flow.readers(by["weights"], by["used"]), self.steps[architecture]
        data, words = self.latents(), tokenizer()
        trainer = train_flow.FlowTrainer(architecture, self.pictures, data, read_by, words, steps, SEED, self.batch)
        training.run(trainer, self.folder / f"{architecture}.pt")

    def judge(self) -> None:
        if not (self.folder / "judge.pt").exists():
            model = judge.train(self.painter, self.steps["judge"], SEED + 1)
            right = judge.accuracy(partial(judge.judge, model), self.painter, damage=False)
            print(json.dumps({"judge on unseen renderings": right}), flush=True)
            saved(self.folder / "judge.pt", model.state_dict())

    def witness(self) -> None:
        """The shipped demo model draws the remains that it learns from, and the first judge lends it eyes."""
        left, path = remains(load(), self.folder / "remains.pt"), self.folder / "decoded.pt"
        shown = witness.views(DECODED, SEED + 2)
        if not path.exists():
            _, _, vae = load()
            saved(path, witness.decoded(vae.first_stage_model, self.painter, shown))
        lessons = witness.Lessons(left, self.checkpoint("decoded"), shown)
        trainer = witness.WitnessTrainer(self.painter, self.steps["witness"], lessons, load_judge(), SEED + 1)
        training.run(trainer, self.folder / "witness.pt")
        model = witness.calibrate(trainer.model.eval(), self.painter)
        print(json.dumps(witness.blind_spots(model, self.painter)), flush=True)
        saved(self.folder / "witness-calibrated.pt", model.state_dict())

    def write(self) -> None:
        """Weights files of what has a checkpoint: of networks with an average, that."""
        torch.set_default_device("cpu")  # what is left to do is small
        self.weights.mkdir(parents=True, exist_ok=True)
        there = {name for name in (*STEPS, "witness-calibrated") if (self.folder / f"{name}.pt").exists()}
        about = {"seed": str(SEED), "icons": json.dumps(VERSIONS), "pictures": str(PICTURES)}
        about["licence"] = "CC-BY-4.0 (drawings: CC-BY-4.0, Apache-2.0, MIT)"
        written = {MODEL_FILE.name} if "unet" in there else set()
        if written:
            self.write_model(about)
        for architecture in there & set(CONFIGS):
            state = self.checkpoint(architecture)
            tensors = {f"unet.{k}": v.half() for k, v in state["average"].items()}
            path = self.weights / transformer_file(architecture).name
            export.write(path, tensors, about | {"steps": str(state["step"])})
            written.add(path.name)
        for name, file in (("judge", JUDGE_FILE), ("witness-calibrated", WITNESS_FILE)):
            if name in there:
                export.save_judge(self.weights / file.name, self.checkpoint(name), about)
                written.add(file.name)
        print(f"wrote {', '.join(sorted(written)) or 'nothing'} into {self.weights}/")

    def write_model(self, about: dict[str, str]) -> None:
        unet, vae, rng = self.checkpoint("unet"), self.first_autoencoder(), random.Random(SEED)
        if (self.folder / "autoencoder.pt").exists():
            vae.load_state_dict(self.checkpoint("autoencoder")["vae"])
        pixels = autoencoder.paint_set(self.painter, [world.any_picture(rng) for _ in range(500)])
        with torch.no_grad():
            latents = torch.cat([autoencoder.encode_with(vae, x.float() / 255) for x in pixels.split(50)])
        rgb = export.latent_rgb(latents, pixels)
        tensors = export.model_tensors(unet["average"], unet["used"], vae.state_dict(), rgb)
        export.write(self.weights / MODEL_FILE.name, tensors, about | {"steps": str(unet["step"])})

    def run(self, name: str) -> None:
        if name in CONFIGS:
            self.transformer(name)
        elif name == "autoencoder":
            print(json.dumps(train_autoencoder.quality(self.autoencoder(), self.painter)), flush=True)
        else:
            {"unet": self.unet, "judge": self.judge, "witness": self.witness, "weights": self.write}[name]()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make train-demo", description=__doc__)
    parser.add_argument("--only", choices=(*STEPS, "weights"), help="run one stage alone")
    parser.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="train the shipped autoencoder and UNet further instead of anew, and keep the first judge",
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where checkpoints and icons are kept")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the weights files are written")
    parser.add_argument(
        "--encoder-learns", action="store_true", help="train the encoder with its decoder, before the UNet"
    )
    parser.add_argument("--device", default="cpu", help="where the networks train: cpu, cuda")
    parser.add_argument(
        "--batch", type=int, default=train_flow.BATCH, help="captions a step of the UNet and the transformers"
    )
    for name, usual in STEPS.items():
        parser.add_argument(f"--{name}-steps", type=int, default=usual, metavar="N")
    args = parser.parse_args()
    torch.set_default_device(args.device)
    args.folder.mkdir(parents=True, exist_ok=True)
    steps = {name: getattr(args, f"{name}_steps") for name in STEPS}
    stages = Stages(args.folder, args.weights, steps, args.go_on, args.encoder_learns, args.batch)
    names = [name for name in (*STEPS, "weights") if not (args.go_on and name == "judge")]
    for name in [args.only] if args.only else names:
        stages.run(name)


if __name__ == "__main__":
    main()
