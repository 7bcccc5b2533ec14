"""Whole image classifiers as discriminators: a `transformers` folder, or a torchvision network's weights.

The confidence is the sum of the probabilities of the chosen labels. Weights are read as safetensors alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..edits.digest import Shared
from .features import weights_digest

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and spread of torchvision's weights
TORCHVISION = ("resnet18", "resnet50", "vit_b_16")
HEADS = {"vit_b_16": "heads.head.weight"}  # the weight whose rows are the classes; else fc.weight
MOST = 2**31  # bytes of a file


class Classifier(Shared):
    """model: pictures [B, 3, size, size], without mean and spread, to logits [B, n]; chosen: the concept's classes."""

    def __init__(
        self,
        name: str,
        model: Callable[[Tensor], Tensor],
        weights: Mapping[str, Tensor],
        chosen: Sequence[int],
        size: int,
        mean: Sequence[float],
        spread: Sequence[float],
        device: torch.device | None = None,
    ) -> None:
        self.name, self.model, self.weights, self.size = name, model, weights, size
        self.chosen = list(chosen)
        self.mean, self.spread = (torch.tensor(each).float().view(1, 3, 1, 1) for each in (mean, spread))
        self.device = device or torch.device("cpu")
        self.models: tuple[Any, ...] = ()

    @cached_property
    def key(self) -> str:
        return f"{weights_digest(self.weights)} {self.chosen}"

    @torch.no_grad()
    def scores(self, images: Tensor) -> list[float]:
        """images: [B, h, w, 3] in [0, 1]; B numbers from 0 to 1."""
        x = images[..., :3].movedim(-1, 1).float()
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
        x = (x.cpu() - self.mean) / self.spread
        logits = torch.cat([self.model(part.to(self.device)).float().cpu() for part in x.split(16)])
        return logits.softmax(1)[:, self.chosen].sum(1).clamp(0, 1).tolist()


def chosen_of(text: str, labels: Mapping[int, str]) -> list[int]:
    """Classes by number or name, one a line or apart by commas; names as the model has them, in any case."""
    names = {label.strip().lower(): i for i, label in labels.items()}
    asked = [part.strip() for part in text.replace("\n", ",").split(",") if part.strip()]
    if not asked:
        raise ValueError(f"labels is empty; name those of the concept: {listed(labels)}")
    found = []
    for part in asked:
        i = int(part) if part.isascii() and part.isdigit() else names.get(part.lower(), -1)
        if i not in labels:
            raise ValueError(f'labels: the model has no class "{part}"; it has {listed(labels)}')
        found.append(i)
    return sorted(set(found))


def listed(labels: Mapping[int, str]) -> str:
    shown = [f"{i} {label}" for i, label in list(labels.items())[:12]]
    return ", ".join(shown) + (f", .. ({len(labels)} in all)" if len(labels) > len(shown) else "")


def read_weights(file: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors, floating and finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.suffix != ".safetensors":
        raise ValueError(f'"{file.name}" is no safetensors file; convert it, ConceptGuard opens no pickles')
    if file.stat().st_size > MOST:
        raise ValueError(f'"{file.name}" has more than {MOST} bytes')
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f'cannot read "{file.name}" ({error}); fetch it again') from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f'"{file.name}" is damaged ({name} holds NaN or infinity); fetch it again')
    return tensors


def torchvision_classifier(file: Path, network: str, labels: str, device: torch.device | None = None) -> Classifier:
    """One of torchvision's networks with weights of ours; the number of classes is read off them."""
    import torchvision

    if network not in TORCHVISION:
        raise ValueError(f"network is {network!r}; choose one of {', '.join(TORCHVISION)}")
    weights = read_weights(file)
    head = weights.get(HEADS.get(network, "fc.weight"))
    if head is None or head.ndim != 2:
        raise ValueError(f'"{file.name}" does not hold weights of {network}; choose the network that they belong to')
    model = getattr(torchvision.models, network)(weights=None, num_classes=len(head))
    fill(model, weights, file.name)
    classes = {i: str(i) for i in range(len(head))}
    chosen = chosen_of(labels, classes)
    return Classifier(file.stem, model.to(device), model.state_dict(), chosen, 224, *IMAGENET, device)


def fill(model: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f'"{name}" does not fit the network ({why}); choose the one that it belongs to') from None
    model.eval().requires_grad_(False)


def transformers_classifier(folder: Path, labels: str, device: torch.device | None = None) -> Classifier:
    """A folder with config.json and model.safetensors, as `save_pretrained` writes it; no code of its own is run."""
    from transformers import AutoConfig, AutoModelForImageClassification

    read_weights(folder / "model.safetensors")  # before anything else looks at it
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForImageClassification.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f'"{folder.name}" holds no image classifier ({why}); choose another folder') from None
    model.requires_grad_(False).to(device)
    size, mean, spread = preprocessing(folder, config)
    chosen = chosen_of(labels, {int(i): label for i, label in config.id2label.items()})
    return Classifier(
        folder.name, lambda x: model(pixel_values=x).logits, model.state_dict(), chosen, size, mean, spread, device
    )


def preprocessing(folder: Path, config: Any) -> tuple[int, Sequence[float], Sequence[float]]:
    """The size, mean and spread that a model was trained with, of preprocessor_config.json if there is one."""
    file, about = folder / "preprocessor_config.json", {}
    try:
        if file.is_file() and file.stat().st_size < 2**20:
            about = json.loads(file.read_text(encoding="utf-8"))
        size = about.get("size", getattr(config, "image_size", 224))
        size = size if isinstance(size, int) else size.get("height", size.get("shortest_edge", 224))
        mean, spread = (about.get(key, 3 * [0.5]) for key in ("image_mean", "image_std"))
        if not 8 <= size <= 2048 or len(mean) != 3 or len(spread) != 3 or not all(float(s) > 0 for s in spread):
            raise ValueError("size, image_mean or image_std")
        return size, [float(m) for m in mean], [float(s) for s in spread]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'"{folder.name}/{file.name}" is damaged ({error}); fetch it again') from None
