"""The demo model as stock sockets, and prompts that hold an example picture."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..demo import world
from ..demo.load import MODEL_FILE, load, reference_prompt

CATEGORY = "concept guard/demo"


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
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls) -> Any:
        """Load again when the weights file has changed."""
        if not MODEL_FILE.is_file():
            return None
        stat = MODEL_FILE.stat()
        return stat.st_size, stat.st_mtime_ns

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load())


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
