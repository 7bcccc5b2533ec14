"""The kinds of models that the engine edits: a file each, and its name in this list."""

from . import cross, joint, unet

__all__ = ["cross", "joint", "unet"]
