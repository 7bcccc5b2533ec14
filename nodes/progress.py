"""What a node that works for long shows: a bar with a line of text, and a preview."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
from torch import Tensor

from .show import show


class Shown:
    """A job's Progress, under its node; an interrupt stops the job."""

    def __init__(self, model: Any, node_id: str | None) -> None:
        import latent_preview  # brings the host's preview models

        self.bar = comfy.utils.ProgressBar(1, node_id=node_id)
        self.node_id = node_id
        self.previewer = latent_preview.get_previewer(model.load_device, model.get_model_object("latent_format"))

    def __call__(self, done: int, most: int, words: str = "", latents: Tensor | None = None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if self.previewer is not None and latents is not None:
            preview = self.previewer.decode_latent_to_preview_image("JPEG", latents.detach())
        self.bar.update_absolute(done, most, preview)
        if words:
            show(self.node_id, words)


def ticking(total: int) -> Callable[[], None]:
    """A progress bar of so many steps that an interrupt stops."""
    bar = comfy.utils.ProgressBar(total)

    def tick() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return tick
