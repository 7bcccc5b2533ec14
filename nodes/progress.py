"""What a node that works for long shows, a bar with a line of text and a preview, and what it keeps when stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.utils
from torch import Tensor

from .show import show

EVERY = 5  # steps between two previews


class Progress:
    """Called after each step of a training with the steps done, their loss and the predicted clean picture."""

    def __init__(self, model: Any, node_id: str | None, steps: int) -> None:
        import latent_preview  # brings the host's preview models

        self.bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self.node_id = node_id
        self.steps = steps
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def __call__(self, done: int, loss: float, x0: Tensor | None = None) -> None:
        preview = None
        if self.previewer is not None and x0 is not None and done % EVERY == 0:
            preview = self.previewer.decode_latent_to_preview_image("JPEG", x0.detach())
        self.bar.update_absolute(done, self.steps, preview)
        self.say(f"step {done} of {self.steps}, loss {loss:.4g}")
        comfy.model_management.throw_exception_if_processing_interrupted()

    def say(self, text: str) -> None:
        """Under the node, if somebody watches."""
        show(self.node_id, text)


@contextmanager
def kept(save: Callable[[], str | None], mend: str) -> Iterator[None]:
    """What was learned is saved if the work is stopped or fails, and the log says where; `save` gives its name."""
    try:
        yield
    except BaseException:
        if (name := save()) is not None:
            logging.warning('ConceptGuard: stopped; what was learned so far is in "%s". %s', name, mend)
        raise
