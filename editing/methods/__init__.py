"""The erasure methods: what each computes, as pure functions over tensors, and the object that the pack knows it by.

A new method is a file here and its name in this list (and a node, and its help page).
"""

from . import adavd, cre, eiup, kpop, protore, safe_region, safree, sld

__all__ = ["adavd", "cre", "eiup", "kpop", "protore", "safe_region", "safree", "sld"]
