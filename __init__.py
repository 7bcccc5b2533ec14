"""ConceptGuard: keeps unwanted concepts out of generated images, inside the diffusion model."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Give the host this pack's nodes. The imports wait until here so that importing the pack needs no host."""
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES

    class ConceptGuardExtension(ComfyExtension):
        async def get_node_list(self):
            return list(NODES)

    return ConceptGuardExtension()
