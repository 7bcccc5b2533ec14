"""ConceptGuard: keeps unwanted concepts out of generated images, inside the diffusion model."""

import logging
import re
from pathlib import Path

WEB_DIRECTORY = "./web"


def check_name(folder: str) -> None:
    """The host serves a pack's scripts and help under the name of its folder, and finds none under some names."""
    if not re.fullmatch(r"[\w.~+()@&=,'!;:$*-]+", folder, re.ASCII):
        logging.warning(
            "ConceptGuard: the page gets no panel, range, help or templates from a folder called %r; rename it to "
            '"ConceptGuard" (letters a-z, digits, - and _ do) and start ComfyUI again. The nodes work.',
            folder,
        )


async def comfy_entrypoint():
    """Give the host this pack's nodes. The imports wait until here so that importing the pack needs no host."""
    check_name(Path(__file__).parent.name)
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES

    class ConceptGuardExtension(ComfyExtension):
        async def get_node_list(self):
            return list(NODES)

    return ConceptGuardExtension()
