"""The erasure methods: what each computes, as pure functions over tensors, and the object that the pack knows it by.

A new method is a file here and its name in this list (and a node, and its help page).
"""

from . import cre, eiup, kpop, safe_region

__all__ = ["cre", "eiup", "kpop", "safe_region"]
