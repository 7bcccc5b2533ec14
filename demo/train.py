"""`make train-demo`: rebuild the demo data and weights from scratch. Each stage goes on where it was stopped.

Stages write to output/train-demo/: pictures (painted world), decoder, unet, judge; `--only` runs one of them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from ..tools.environment import ROOT
from . import autoencoder, export, judge, train_unet, world
from .glyphs import VERSIONS, Painter
from .load import MODEL_FILE, part, read

FOLDER = ROOT / "output" / "train-demo"
PICTURES, DECODER_STEPS, UNET_STEPS, JUDGE_STEPS, SEED = 40000, 3200, 10000, 4500, 0


def tokenizer() -> Any:
    """CLIP's ids of a text without start, end and padding."""
    from comfy.sd1_clip import SD1Tokenizer

    from .model import END, START

    clip = SD1Tokenizer()
    return lambda text: [t for t, _ in clip.tokenize_with_weights(text)["l"][0] if t not in (START, END)]


def painted(painter: Painter, count: int, go_on: bool) -> dict[str, Any]:
    """The training pictures with their latents, and the reference pictures in their order.

    `go_on`: latents of the shipped encoder, whose principal components are kept.
    """
    rng = random.Random(SEED)
    pictures = [world.any_picture(rng) for _ in range(count)]
    pixels = autoencoder.paint_set(painter, pictures)
    if go_on:
        vae = autoencoder.build().requires_grad_(False)
        vae.load_state_dict(part(read(MODEL_FILE), "vae."))
        p, mean = autoencoder.read_encoder(vae)
    else:
        p, mean = autoencoder.principal_components(pixels[:2000])
    latents = torch.cat([autoencoder.encode(x, p, mean) for x in pixels.split(500)])
    shown = torch.stack([painter(picture.reference) for picture in pictures if picture.reference])
    shown = torch.nn.functional.interpolate(shown, size=64, mode="area")
    return {
        "pictures": pictures,
        "pixels": pixels,
        "latents": latents,
        "p": p,
        "mean": mean,
        "references": (shown * 255).round().to(torch.uint8),
    }


def decoder(data: dict[str, Any], steps: int, go_on: bool) -> dict[str, torch.Tensor]:
    if go_on:
        return part(read(MODEL_FILE), "vae.")
    path = FOLDER / "decoder.pt"
    if not path.exists():
        vae = autoencoder.build().requires_grad_(False)
        autoencoder.initialise(vae)
        autoencoder.write_encoder(vae, data["p"], data["mean"])
        autoencoder.train_decoder(vae, data["pixels"], data["latents"], steps, SEED)
        torch.save(vae.state_dict(), path)
    return torch.load(path, weights_only=True)


def unet(data: dict[str, Any], steps: int, go_on: bool) -> dict[str, Any]:
    trainer = train_unet.Trainer(data["pictures"], data["latents"], data["references"], tokenizer(), SEED)
    if go_on:
        trainer.start_from(read(MODEL_FILE))
    train_unet.train(trainer, steps, words=0 if go_on else 500, checkpoint=FOLDER / "unet.pt")
    return trainer.state()


def judged(painter: Painter, steps: int) -> dict[str, torch.Tensor]:
    path = FOLDER / "judge.pt"
    if not path.exists():
        model = judge.train(painter, steps, SEED + 1)
        print(json.dumps({"judge on unseen renderings": judge.accuracy(model, painter, damage=False)}), flush=True)
        torch.save(model.state_dict(), path)
    return torch.load(path, weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make train-demo", description=__doc__)
    parser.add_argument("--only", choices=("decoder", "unet", "judge"), help="run one stage and write no weights")
    parser.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="train the shipped UNet further instead of anew, with the shipped decoder and judge",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="train this share of the steps (for a quick look)")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    painter = Painter(Path(FOLDER) / "icons")
    print("painting the world", flush=True)
    data = painted(painter, PICTURES, args.go_on)
    run = {
        "decoder": lambda: decoder(data, round(DECODER_STEPS * args.scale), args.go_on),
        "unet": lambda: unet(data, round(UNET_STEPS * args.scale), args.go_on),
        "judge": lambda: judged(painter, round(JUDGE_STEPS * args.scale)),
    }
    if args.only:
        run[args.only]()
        return
    if args.go_on:
        del run["judge"]
    done = {name: stage() for name, stage in run.items()}
    about = {
        "seed": str(SEED),
        "pictures": str(PICTURES),
        "steps": str(done["unet"]["step"]),
        "icons": json.dumps(VERSIONS),
        "licence": "CC-BY-4.0 (drawings: CC-BY-4.0, Apache-2.0, MIT)",
    }
    rgb = export.latent_rgb(data["latents"][:2000], data["pixels"][:2000])
    export.save_model(done["unet"]["average"], done["unet"]["used"], done["decoder"], rgb, about)
    if "judge" in done:
        export.save_judge(done["judge"], about)
    print(f"wrote {export.MODEL_FILE.parent.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
