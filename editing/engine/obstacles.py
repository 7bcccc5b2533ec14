"""What may stand in an edit's way, by name: other packs' wrappers of the model call, and forwards of their own. Pure
torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .rows import said

HOST = "comfy."  # the modules of the host's own classes
OTHERS = (
    "The guider's cfg, or a node that changes the guidance, leaves the edited prompts out; set cfg above 0, take that "
    "node out, or set the edit's rows to all"
)


def own_forward(module: nn.Module) -> str:
    """Who put a forward into a module in place of its class's, or into its class; empty if nobody did."""
    forward = vars(module).get("forward", type(module).forward)
    inner = getattr(forward, "__func__", forward)
    name = said(inner)
    mine = getattr(inner, "__module__", "") == type(module).__module__
    return "" if mine and "forward" not in vars(module) else name


def cause(missed: bool, calls: int, model_options: Mapping[str, Any], forwards: str) -> str:
    """The likeliest reason why an edit reached no call of the model, or (`missed`) not all of its blocks, and the mend.

    forwards: who replaced those of the blocks.
    """
    wrapper = model_options.get("model_function_wrapper")
    if missed and forwards:
        return (
            f"{forwards} has put a forward of its own in place of the blocks', which knows no patches; take it out, or "
            "leave the blocks that it changes out of the edit's `blocks`"
        )
    if wrapper is not None:
        return (
            f"{said(wrapper)} wraps the model's calls: it goes round the model, or passes on only the options that it "
            "knows; take it out"
        )
    if missed:
        return "A node between this one and the sampler leaves blocks of the model out; take it out"
    if not calls:
        return (
            "A node between this one and the sampler replaces the wrappers or the transformer_options of the MODEL "
            "while sampling; take it out"
        )
    return "A node between this one and the sampler takes the edits out of transformer_options; take it out"


def nag_in(network: nn.Module) -> str:
    """The forward that ComfyUI-NAG (ChenDarYen) puts into a network while it samples, and leaves there when that
    fails; empty if it is not there."""
    forward = vars(network).get("forward")
    name = "" if forward is None else said(forward)
    return name if "nag" in name.lower() else ""
