"""The demo model as stock sockets, and prompts that hold an example picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..demo import world
from ..demo.load import MODEL_FILE, load, reference_prompt, transformer_file
from ..demo.transformers import CONFIGS

CATEGORY = "concept guard/demo"
UNET = "unet"


class LoadDemo(io.ComfyNode):
    """The demo model's MODEL, CLIP and VAE, for the host's own text encode, sampler and decode nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardLoadDemo",
            display_name="Load Demo Model",
            category=CATEGORY,
            description="A small text-to-image model of emoji, for trying erasure at 128x128 pixels: objects such as "
            "'a beer mug', styles ('in the style of noto'), backgrounds ('on a blue background'), people and scenes.",
            inputs=[
                io.Combo.Input(
                    "architecture",
                    options=[UNET, *CONFIGS],
                    default=UNET,
                    optional=True,
                    tooltip="What draws: a UNet with cross-attention, as SD1.x is; a diffusion transformer with double "
                    "and single blocks, as Flux is; or one with a single stream, as Lumina 2 and Z-Image are.",
                )
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, architecture: str | None = UNET) -> Any:
        """Load again when a weights file has changed."""
        return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files(architecture) if file.is_file()]

    @classmethod
    def execute(cls, architecture: str = UNET) -> io.NodeOutput:
        *_, file = files(architecture)
        if architecture != UNET and not file.is_file():
            raise ValueError(
                f'Load Demo Model: architecture is "{architecture}", whose weights {file.name} are missing from '
                f"{file.parent}; set it to {UNET}, or make them with `make train-demo`"
            )
        return io.NodeOutput(*load(architecture=architecture))


def files(architecture: str | None) -> list[Path]:
    """What an architecture is loaded from, its own weights last."""
    return [MODEL_FILE] if architecture in (None, UNET) else [MODEL_FILE, transformer_file(str(architecture))]


class DemoReference(io.ComfyNode):
    """A prompt whose `<image>` is an example picture: the concept arrives without being named."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptGuardDemoReference",
            display_name="Demo Reference Prompt",
            category=CATEGORY,
            description="Encodes a prompt for the demo model in which <image> stands for the picture: its object and "
            "style, or in 'a cat in the style of <image>' its style alone.",
            inputs=[
                io.Clip.Input("clip", tooltip="The demo model's CLIP."),
                io.Image.Input("image", tooltip="The example picture; the first of a batch is used."),
                io.String.Input(
                    "text",
                    default=f"a picture of {world.REFERENCE}",
                    multiline=True,
                    tooltip="The prompt, with <image> once where the picture stands for words.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, clip: Any, image: Any, text: str) -> io.NodeOutput:
        if text.count(world.REFERENCE) != 1:
            raise ValueError(
                f"Demo Reference Prompt: text must hold {world.REFERENCE} once, where the picture stands; got {text!r}"
            )
        return io.NodeOutput(reference_prompt(clip, image, text))


NODES = [LoadDemo, DemoReference]
