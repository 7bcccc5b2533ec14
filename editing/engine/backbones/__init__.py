"""The kinds of models that the engine edits: a file each, and its name in this list."""

from . import joint, unet

__all__ = ["joint", "unet"]
