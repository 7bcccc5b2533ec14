"""A report's pictures, drawn one by one as the host's own sampler node draws them, each with its record inside."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.sample
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...editing.edits.spec import Gate
from ...editing.engine.account import Account
from ...editing.engine.host import account_of, digest_of, edits_of
from ..measure import Sampling
from .looks import Look
from .prompts import Case
from .work import Step

RECORD = "concept_guard_report"  # of a picture's PNG


@dataclass
class Studio:
    """models: of each side, "unedited", "edited" and peers, the MODEL for a case; latent: an empty one of the size,
    [1, c, h, w]; negatives: of sides that have a negative prompt of their own.

    see: is shown each step's clean latents, for a preview, and may raise.
    """

    models: dict[str, Callable[[Case], Any]]
    clip: Any
    vae: Any
    latent: Tensor
    how: Sampling
    looks: Sequence[Look]
    negative: str = ""
    negatives: dict[str, str] = field(default_factory=dict)
    see: Callable[[Tensor], None] = lambda _: None
    warm: set[str] = field(default_factory=set)  # the sides that this process has drawn

    def draw(self, case: Case, side: str, alive: Step) -> bytes:
        """The picture as a PNG file. The clock runs for the sampling alone."""
        model = self.models[side](case)
        positive, negative = (self.encoded(text) for text in (case.prompt, self.negatives.get(side, self.negative)))
        latent = comfy.sample.fix_empty_latent_channels(model, self.latent)
        noise = comfy.sample.prepare_noise(latent, case.seed)

        def callback(_: int, x0: Tensor, *__: Any) -> None:
            alive()
            self.see(x0)

        start = time.perf_counter()
        z = comfy.sample.sample(
            model,
            noise,
            self.how.steps,
            self.how.cfg if case.cfg is None else case.cfg,
            self.how.sampler,
            self.how.scheduler,
            positive,
            negative,
            latent,
            callback=callback,
            disable_pbar=True,
            seed=case.seed,
        )
        record = {"seconds": time.perf_counter() - start, "latent": digest_of(z), "warm": side in self.warm}
        self.warm.add(side)
        if edits_of(model):
            record["account"] = told(account_of(model, z))
        images = self.vae.decode(z)  # of VAEs for videos [1, frames, h, w, 3]
        return png(images.reshape(-1, *images.shape[-3:])[0], record)

    def encoded(self, text: str) -> Any:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def look(self, data: bytes, case: Case) -> dict[str, Any]:
        """What there is to say of a picture's file: its record, and what the judges make of it."""
        image, record = opened(data)
        scores = {look.name: look.see(image, [case])[0] for look in self.looks}
        return {**record, "scores": scores, "flagged": any(look.flags(scores[look.name]) for look in self.looks)}


def told(account: Account) -> dict[str, Any]:
    """The account; `gated`: whether all edits have gates, `open`: whether one of these let its edit act."""
    entries = account.entries.values()
    gated = all(entry.spec.gate != Gate() for entry in entries)
    return {**account.document(), "gated": gated, "open": any(entry.open for entry in entries)}


def png(image: Tensor, record: dict[str, Any]) -> bytes:
    """image: [h, w, 3] in [0, 1]."""
    info, data = PngInfo(), io.BytesIO()
    info.add_text(RECORD, json.dumps(record))
    pixels = (image[..., :3].detach().float().cpu().clamp(0, 1) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(data, "PNG", pnginfo=info)
    return data.getvalue()


def opened(data: bytes) -> tuple[Tensor, dict[str, Any]]:
    """A picture's file as IMAGE [1, h, w, 3], and its record."""
    with Image.open(io.BytesIO(data)) as image:
        record = json.loads(image.info[RECORD])
        pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.copy())[None].float() / 255, record
