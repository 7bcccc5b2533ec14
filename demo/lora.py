"""A LoRA for the demo model, small and random: what an example workflow's Load LoRA finds in tests and pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from ..editing.files.whole import put
from .load import MODEL_FILE

NAME = "concept-guard-demo.safetensors"
RANK = 2


def write(folder: Path) -> Path:
    """Differences of the cross-attentions' values, under the names that the host's LoraLoader reads."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    with safe_open(MODEL_FILE, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a dict)
            if key.startswith("unet.") and key.endswith("attn2.to_v.weight"):
                rows, columns = file.get_slice(key).get_shape()
                name = "diffusion_model" + key.removeprefix("unet").removesuffix(".weight")
                tensors[f"{name}.lora_up.weight"] = 0.1 * torch.randn(rows, RANK, generator=generator)
                tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, columns, generator=generator) * columns**-0.5
                tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    assert tensors
    return put(save(tensors), folder / NAME)
