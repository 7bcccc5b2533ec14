"""Changes of a network's weights as parameters of their own: theta' = theta + delta, written as the host's LoRA files.

The host adds to a weight whatever its module's `weight_function` says, just before the module is run; that is how its
own training does it. The network's weights themselves are never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor, nn

from .loop import draws

WEIGHTS = ("cross-attention", "others", "all")


def chosen(network: nn.Module, weights: str) -> dict[str, Any]:
    """The modules that `weights` names, by their path: those of the cross-attentions, the rest, or all of them."""
    found = {path: m for path, m in network.named_modules() if hasattr(m, "weight_function") and hasattr(m, "weight")}
    cross = {path for path in found if ".attn2." in path}
    wanted = {"cross-attention": cross, "others": found.keys() - cross, "all": found.keys()}[weights]
    return {path: found[path] for path in found if path in wanted and found[path].weight is not None}


class Changes:
    """The changes of some modules of a network, zero at the start, on the device where they are run.

    rank 0: of every weight and bias, whole; else of the weights alone, as up @ down with that many columns: the host's
    LoRA, up zero and down random.
    """

    def __init__(self, modules: Mapping[str, Any], rank: int, seed: int, device: torch.device) -> None:
        self.tensors: dict[str, nn.Parameter] = {}
        self.shapes: dict[str, torch.Size] = {}  # in the file, where names and shapes are those that LoraLoader reads
        self.device = device
        self.on = True
        generator = draws(seed)
        for path, module in modules.items():
            if rank:
                self._low_rank(f"diffusion_model.{path}", module, rank, generator)
            else:
                self._whole(f"diffusion_model.{path}", module)

    def _whole(self, name: str, module: Any) -> None:
        module.weight_function = [*module.weight_function, self._added(f"{name}.diff", module.weight)]
        if module.bias is not None:
            module.bias_function = [*module.bias_function, self._added(f"{name}.diff_b", module.bias)]

    def _added(self, name: str, like: Tensor) -> Callable[[Tensor], Tensor]:
        p = self._learned(name, nn.Parameter(torch.zeros(like.shape, device=self.device)), like.shape)
        return self._switched(lambda w: (w.float() + p).to(w.dtype))

    def _low_rank(self, name: str, module: Any, rank: int, generator: torch.Generator) -> None:
        if module.weight.ndim < 2:
            return
        out, *rest = module.weight.shape
        start = torch.randn((rank, *rest), generator=generator) * module.weight[0].numel() ** -0.5
        weights = torch.zeros(out, rank), start.flatten(1), float(rank), None, None, None  # alpha = rank: as it is
        adapter = LoRAAdapter(set(), weights).to_train().to(self.device)
        self._learned(f"{name}.lora_down.weight", adapter.lora_down.weight, start.shape)
        self._learned(f"{name}.lora_up.weight", adapter.lora_up.weight, (out, rank, *(1 for _ in rest[1:])))
        module.weight_function = [*module.weight_function, self._switched(adapter)]

    def _learned(self, name: str, p: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
        self.tensors[name], self.shapes[name] = p, torch.Size(shape)
        return p

    def _switched(self, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda w: change(w) if self.on else w

    @contextmanager
    def off(self) -> Iterator[None]:
        """The original weights. Not around a backward pass: what it computes again must be as it was."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def lora(self) -> dict[str, Tensor]:
        """What the host's LoraLoader reads, fp16 on the CPU."""
        learned = {name: p.detach().reshape(self.shapes[name]) for name, p in self.tensors.items()}
        out = {name: p.to("cpu", torch.float16, copy=True) for name, p in learned.items()}
        for name in [name for name in out if name.endswith(".lora_down.weight")]:
            out[name.replace("lora_down.weight", "alpha")] = torch.tensor(float(len(out[name])))
        return out


class LoRA(dict[str, Tensor]):
    """A LoRA as the host's nodes pass it on, with what its file says about it."""

    def __init__(self, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.about = about

    def checked(self) -> dict[str, Tensor]:
        """Its tensors, fp16 on the CPU; raises ValueError if one of them is not to be used."""
        out = {name: t.detach().to("cpu", torch.float16) for name, t in self.items()}
        for name, tensor in out.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"weights: {name} holds NaN or infinity; train again with a lower learning rate")
        return out
