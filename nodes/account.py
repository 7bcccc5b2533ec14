"""What the edits of a MODEL did in a run: as text, as a switch, as pictures of where."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..editing.engine.account import Account
from ..editing.engine.host import account_of
from ..editing.pictures.heat import painted
from .inputs import CATEGORY, named
from .metadata import listen
from .show import told

NODE = "ConceptGuardAccount"
SCALE = 8  # pixels of the picture for one of its latents


class ConceptGuardAccount(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Account",
            category=f"{CATEGORY}/look",
            description="Says what each edit of a model did in the run that made a latent: in how many steps and "
            "blocks it acted, and in what share of the picture it found its concept. Runs after the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model with its edits, as it goes into the sampler."),
                io.Latent.Input("latent", tooltip="What the sampler made: so the account is that of this run."),
            ],
            outputs=[
                io.String.Output(display_name="account", tooltip="The account as JSON, as pictures carry it too."),
                io.Boolean.Output(display_name="applied", tooltip="Whether every edit acted where it was due."),
                io.Image.Output(
                    display_name="where",
                    tooltip="Where each edit acted, bright for often: all images of the batch for the first edit, then "
                    "for the next.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, latent: dict[str, Any]) -> io.NodeOutput:
        with named(NODE):
            account = account_of(model, latent["samples"])
        lines = [f'{entry.spec.node} "{entry.spec.source.name}": {line}' for entry, line in account.lines()]
        text = json.dumps(account.document(), ensure_ascii=False, indent=1)
        return told(cls, "\n".join(lines), text, account.applied, where(account, latent["samples"]))


def where(account: Account, latents: Tensor) -> Tensor:
    """A picture of each edit and image: [edits * images, h, w, 3]."""
    images, height, width = len(latents), *(SCALE * side for side in latents.shape[-2:])
    return torch.cat([painted(entry.heat(images, height, width)) for entry in account.entries.values()])


listen()

NODES: list[type[io.ComfyNode]] = [ConceptGuardAccount]
