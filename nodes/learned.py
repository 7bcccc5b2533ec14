"""The nodes that load and save learned files: a pair for each kind, alike but for their words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..editing.files import artefacts
from ..editing.files.artefacts import Artefact
from .files import changed, choices, file_of, saved
from .inputs import CATEGORY, file_output, named, prefix_input
from .show import said

Words = tuple[str, str, str, str]  # node id, display name, category, description


def file_input(kind: str) -> io.Combo.Input:
    return io.Combo.Input("file", options=choices(kind), tooltip=f"A file that Save {kind.title()} wrote.")


def loaded(file: str, kind: str) -> Artefact:
    return artefacts.read(file_of(file, kind), kind)


def load_node(words: Words, kind: str, socket: Any, made: Callable[[Artefact], Any]) -> type[io.ComfyNode]:
    """made: what comes out, of what a file holds. The output is called like the kind."""
    node_id, display_name, category, description = words

    class Load(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=node_id,
                display_name=display_name,
                category=f"{CATEGORY}/{category}",
                description=description,
                inputs=[file_input(kind)],
                outputs=[socket.Output(display_name=kind, tooltip=f"The {kind}.")],
            )

        @classmethod
        def fingerprint_inputs(cls, file: str | None = None) -> Any:
            return changed(file, kind)

        @classmethod
        def execute(cls, file: str) -> io.NodeOutput:
            with named(node_id):
                return io.NodeOutput(made(loaded(file, kind)))

    return Load


def save_node(
    words: Words, kind: str, socket: Any, tooltip: str, held: Callable[[Any], Artefact]
) -> type[io.ComfyNode]:
    """held: what the file is to hold, of what comes in; raises ValueError. The input is called like the kind."""
    node_id, display_name, category, description = words

    class Save(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=node_id,
                display_name=display_name,
                category=f"{CATEGORY}/{category}",
                description=description,
                inputs=[socket.Input(kind, tooltip=tooltip), prefix_input(kind)],
                outputs=[file_output()],
                is_output_node=True,
            )

        @classmethod
        def execute(cls, **given: Any) -> io.NodeOutput:
            with named(node_id):
                name = saved(held(given[kind]), given.get("filename_prefix", kind))
            return io.NodeOutput(name, ui=said(name))

    return Save
