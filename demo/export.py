"""Write trained weights as fp16 safetensors, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..editing.files.whole import put


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    put(save({k: v.contiguous() for k, v in tensors.items()}, metadata), path)


def latent_rgb(latents: Tensor, pixels: Tensor) -> Tensor:
    """The host's preview factors: least squares from latents to mean colours in [-1, 1], [4 + bias, 3]."""
    z = latents.permute(0, 2, 3, 1).flatten(0, 2)
    rgb = avg_pool2d(pixels.float() / 127.5 - 1, 8).permute(0, 2, 3, 1).flatten(0, 2)
    return torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1)], 1), rgb).solution


def model_tensors(
    trained: dict[str, Tensor], used: list[int], vae: dict[str, Tensor], rgb: Tensor
) -> dict[str, Tensor]:
    """The model file's tensors. `trained`: the averaged weights of `train_unet.Trainer`, by unet., text. and
    reference."""
    out = {k: v for k, v in trained.items() if k.startswith(("unet.", "reference."))}
    out |= {k.replace("text.clip.", "text."): v for k, v in trained.items() if k.startswith("text.clip.")}
    out.pop("text.text_projection.weight", None)  # the identity
    out |= {f"vae.{k}": v for k, v in vae.items()}
    out = {k: v.half() for k, v in out.items()}
    return out | {"rows": trained["text.rows"].half(), "used": torch.tensor(used).float(), "latent_rgb": rgb}


def save_judge(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    write(path, {k: v.half() for k, v in weights.items() if not k.endswith("num_batches_tracked")}, metadata)
