"""What an edit costs in diffusion transformers of the real widths and token counts, with one block of each kind.

Time is the process' own, of whole model calls: edited ones between unedited ones. Memory is what a call holds at its
peak above what was there before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..editing.edits.spec import Concept, EditSpec, Phrase
from ..editing.engine.host import RUN, WRAPPERS, of_model, start_run
from ..editing.engine.run import EDITS
from ..editing.methods.cre import DEFAULTS
from .shapes import fill
from .table import Row, Table

CRE = replace(DEFAULTS, floor=0.0)  # random weights find nothing alike; it costs the same
STATUS, REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Shape:
    """latent: one picture's; width: of the text; prompt, concept: tokens, as the host's text encoder makes them;
    pooled: of the text."""

    config: str
    network: dict[str, Any]
    latent: tuple[int, ...]
    width: int
    prompt: int
    concept: int
    pooled: int = 0


SHAPES = {
    "Flux.1, 1024x1024": Shape(
        "Flux",
        dict(
            image_model="flux",
            in_channels=16,
            out_channels=16,
            vec_in_dim=768,
            context_in_dim=4096,
            hidden_size=3072,
            mlp_ratio=4.0,
            num_heads=24,
            depth=1,
            depth_single_blocks=1,
            axes_dim=[16, 56, 56],
            theta=10000,
            patch_size=2,
            qkv_bias=True,
            guidance_embed=True,
        ),
        (16, 128, 128),
        4096,
        256,
        256,
        768,
    ),
    "Qwen-Image, 1328x1328": Shape(
        "QwenImage",
        dict(
            image_model="qwen_image",
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=1,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=3584,
            axes_dims_rope=(16, 56, 56),
        ),
        (16, 1, 166, 166),
        3584,
        40,
        8,
    ),
}


def build(shape: Shape, dtype: torch.dtype) -> ModelPatcher:
    config = getattr(comfy.supported_models, shape.config)(dict(shape.network))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device=torch.device("cpu"))
    fill(model.diffusion_model)
    return ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def text(shape: Shape, length: int, seed: int) -> Tensor:
    return torch.randn(1, length, shape.width, generator=torch.Generator().manual_seed(seed))


def concept(shape: Shape) -> Concept:
    """One phrase, what it is compared with, and what is drawn in its place."""
    said, other, instead = (text(shape, shape.concept, 100 + i) for i in range(3))
    return Concept("c", (Phrase("c", said, (1, 2)),), other, instead=instead)


@dataclass
class Call:
    """A model call, of the positive prompt alone or behind the negative one, with an edit or without."""

    model: ModelPatcher
    shape: Shape
    rows: int
    edits: Sequence[EditSpec] = ()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        base, dtype = self.model.model, self.model.model.get_dtype()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, *self.shape.latent, generator=generator).repeat(self.rows, *[1] * len(self.shape.latent))
        options: dict[str, Any] = {"cond_or_uncond": [1, 0][-self.rows :], "sigmas": torch.full((1,), 0.6)}
        if self.edits:
            run = start_run(of_model(self.model, "bench"), base.model_sampling, self.edits)
            run.guiders.add(SimpleNamespace(conds={"positive": [], "negative": []}), True)  # an edit is for the first
            wrappers = {kind: {EDITS: [wrapper]} for kind, wrapper in WRAPPERS.items()}
            options |= {EDITS: list(self.edits), RUN: run, "wrappers": wrappers}
        more: dict[str, Any] = {"guidance": torch.full((self.rows,), 3.5)} if self.shape.pooled else {}
        if self.shape.pooled:
            more["y"] = torch.zeros(self.rows, self.shape.pooled, dtype=dtype)
        words = text(self.shape, self.shape.prompt, 1).to(dtype).repeat(self.rows, 1, 1)
        sigma = torch.full((self.rows,), 0.6)
        return base.apply_model(x, sigma, c_crossattn=words, transformer_options=options, **more)

    def measured(self) -> tuple[float, float]:
        """Seconds of the process, and MB at its peak above what was there before."""
        REFS.write_text("5")  # the highest so far is forgotten
        before, start = memory("VmRSS"), time.process_time()
        self()
        return time.process_time() - start, memory("VmHWM") - before


def memory(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def rows(architectures: Sequence[str] = tuple(SHAPES), dtype: torch.dtype = torch.bfloat16) -> Iterator[Row]:
    for name in architectures:
        shape = SHAPES[name]
        model = build(shape, dtype)
        edit = EditSpec("projection", concept(shape), options=CRE)
        for guided in (False, True):
            plain, edited = (Call(model, shape, 1 + guided, edits) for edits in ((), (edit,)))
            (before, _), (middle, more), (after, plainly) = (each.measured() for each in (plain, edited, plain))
            yield {
                "model": name,
                "rows": "positive and negative" if guided else "positive alone",
                "times unedited": 2 * middle / (before + after),
                "MB at the peak": more,
                "unedited, MB": plainly,
            }


TABLES = (
    Table(
        "overhead-transformers",
        "What an edit costs in a transformer",
        "A model call with one block of each kind, bf16, random weights, one CRE concept with something to draw "
        "instead: three texts, with what it is compared with. Time of the process; the edit active.",
        rows,
        partial(rows, tuple(SHAPES)[1:]),
        ("model", "rows"),
    ),
)
