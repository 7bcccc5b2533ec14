"""Whole image classifiers as discriminators: a `transformers` folder, or a torchvision network's weights.

The confidence is the sum of the probabilities of the chosen labels. Weights are read as safetensors alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..edits.digest import Shared
from ..files.header import json_of
from .features import weights_digest

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and spread of torchvision's weights
TORCHVISION = ("resnet18", "resnet50", "vit_b_16")
HEADS = {"vit_b_16": "heads.head.weight"}  # the weight whose rows are the classes; else fc.weight
MOST = 2**31  # bytes of a file
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MOST_WORDS = 2**20  # bytes of a .json
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights may be made of
COUNTER = "num_batches_tracked"  # of a normalization: nothing that a finished network looks at
WHOLE = (COUNTER, "position_ids", "relative_position_index")  # tensors of whole numbers that networks keep
DTYPES = (None, "auto", "float16", "bfloat16", "float32", "float64")
DEPTH = re.compile("layers|depth|blocks")  # keys of so many layers; each of them has a tensor at least
# Keys by which a config.json would bring code or weights from elsewhere, with the values that bring none.
FROM_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "auto_map": (None, {}),
    "custom_pipelines": (None, {}),
    "quantization_config": (None, {}),
    "use_timm_backbone": (None, False),
    "use_pretrained_backbone": (None, False),
    "backbone": (None,),
    "_attn_implementation": (None, "eager", "sdpa"),
    "_attn_implementation_internal": (None, "eager", "sdpa"),
    "attn_implementation": (None, "eager", "sdpa"),
    "experts_implementation": (None, "eager"),
    "_experts_implementation": (None, "eager"),
    "use_kernels": (None, False),
}


class Classifier(Shared):
    """model: pictures [B, 3, size, size], without mean and spread, to logits [B, n]; chosen: the concept's classes;
    labels: the names of all, where the file has them."""

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
        labels: Sequence[str] = (),
    ) -> None:
        self.name, self.model, self.weights, self.size, self.labels = name, model, weights, size, labels
        self.chosen = list(chosen)
        self.mean, self.spread = (torch.tensor(each).float().view(1, 3, 1, 1) for each in (mean, spread))
        self.device = device or torch.device("cpu")
        self.models: tuple[Any, ...] = ()

    @cached_property
    def key(self) -> str:
        return f"{weights_digest(self.weights)} {self.chosen}"

    def scores(self, images: Tensor) -> list[float]:
        """images: [B, h, w, 3] in [0, 1]; B numbers from 0 to 1."""
        return self.probabilities(images)[:, self.chosen].sum(1).clamp(0, 1).tolist()

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """images: [B, h, w, 3] in [0, 1]; of each class, [B, classes]."""
        x = images[..., :3].movedim(-1, 1).float()
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
        x = (x.cpu() - self.mean) / self.spread
        logits = torch.cat([self.model(part.to(self.device)).float().cpu() for part in x.split(16)])
        if not torch.isfinite(logits).all():
            raise ValueError(
                f'the classifier "{self.name}" answers with NaN or infinity; fetch it again, or choose another'
            )
        return logits.softmax(1)


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
        raise ValueError(f'"{told(file)}" is no safetensors file; convert it, ConceptGuard opens no pickles')
    try:
        if file.stat().st_size > MOST:
            raise ValueError(f"it has more than {MOST} bytes")
        tensors = load_file(file)
    except FileNotFoundError:
        raise ValueError(
            f'there is no "{told(file)}"; fetch the weights as one safetensors file of that name'
        ) from None
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f'cannot read "{told(file)}" ({error}); fetch it again') from None
    for name, tensor in tensors.items():
        if tensor.dtype not in PLAIN and not name.endswith(WHOLE):
            raise ValueError(
                f'"{told(file)}" has numbers of the kind {str(tensor.dtype).removeprefix("torch.")} ({name}), which '
                "are no plain weights; fetch it in float32 or float16"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f'"{told(file)}" is damaged ({name} holds NaN or infinity); fetch it again')
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
    if len(head) < 2:
        raise ValueError(
            f'"{file.name}" has {len(head)} class, whose share is 1 in every picture; choose a classifier that also '
            "has a class for other things"
        )
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
    """A folder with config.json and model.safetensors, as `save_pretrained` writes it; no code of its own is run, and
    nothing is fetched. Raises ValueError for anything that would not judge as its authors meant."""
    check_config(folder / CONFIG, read_weights(folder / WEIGHTS))
    size, mean, spread = preprocessing(folder, folder / CONFIG)
    model, classes = built(folder)
    if len(classes) < 2:
        raise ValueError(
            f'"{folder.name}/{CONFIG}" has one class, whose share is 1 in every picture; choose a classifier that also '
            "has a class for other things"
        )
    try:
        count = model(pixel_values=torch.zeros(1, 3, size, size)).logits.shape[-1]
    except Exception as error:  # whatever a network makes of a size that it was not made for
        raise damaged(folder, error) from None
    if classes.keys() != set(range(count)):
        raise ValueError(
            f'"{folder.name}/{CONFIG}" names {len(classes)} classes, but the network has {count}; fetch it again'
        )
    model.to(device)
    chosen = chosen_of(labels, classes)
    names = [classes[i] for i in range(count)]
    return Classifier(
        folder.name,
        lambda x: model(pixel_values=x).logits,
        model.state_dict(),
        chosen,
        size,
        mean,
        spread,
        device,
        names,
    )


def built(folder: Path) -> tuple[Any, dict[int, str]]:
    """The network with its weights, every one of them and no other, and its classes."""
    from transformers import AutoConfig, AutoModelForImageClassification

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    whole = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        classes = {int(i): str(label) for i, label in config.id2label.items()}
        model, loading = AutoModelForImageClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, **whole, **local
        )
    except Exception as error:  # a config.json is a stranger's, and each network checks another part of it
        raise damaged(folder, error) from None
    amiss = {
        "has no": [key for key in loading["missing_keys"] if not key.endswith(COUNTER)],
        "also has": list(loading["unexpected_keys"]),
        "has another size of": [key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]],
    }
    for how, keys in amiss.items():
        if keys:
            raise ValueError(
                f'"{folder.name}/{WEIGHTS}" holds another network than {CONFIG} tells of (it {how} {min(keys)}, one of '
                f"{len(keys)}); fetch both files from one place"
            )
    return model.eval().requires_grad_(False), classes


def damaged(folder: Path, error: Exception) -> ValueError:
    why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ValueError(
        f'"{folder.name}/{CONFIG}" makes no image classifier here ({why}); fetch the folder again, or choose another'
    )


def check_config(file: Path, weights: Mapping[str, Tensor]) -> None:
    """What a config.json may ask for: a network that is in `transformers`, and nothing from elsewhere."""
    about = read_json(file)
    names = about.get("id2label", {})
    if not isinstance(names, dict) or not all(i.isdecimal() and isinstance(name, str) for i, name in names.items()):
        raise ValueError(
            f'"{told(file)}" is damaged (id2label: {str(names)[:60]}, numbers and names of classes); fetch it again'
        )
    for part in parts_of(about):
        for key, value in part.items():
            if complaint := complaint_about(key, value, len(weights)):
                raise ValueError(f'"{told(file)}" {complaint}')


def complaint_about(key: str, value: Any, tensors: int) -> str | None:
    shown = f"{key}: {str(value)[:60]!r}"
    if value not in FROM_ELSEWHERE.get(key, (value,)):
        return (
            f"asks for what is not in its folder ({shown}), which ConceptGuard does not fetch and does not run; choose "
            "another classifier, or remove the line"
        )
    if key in ("dtype", "torch_dtype") and value not in DTYPES:
        return f"is damaged ({shown}); fetch it again"
    layers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
    if DEPTH.search(key) and layers and max(layers) > tensors:
        return f"is damaged ({shown}, but {WEIGHTS} holds {tensors} tensors); fetch it again"
    return None


def parts_of(about: Any) -> Iterator[dict[str, Any]]:
    """All objects in it, at any depth."""
    waiting = [about]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def read_json(file: Path) -> dict[str, Any]:
    """A file with one object, of finite numbers."""
    try:
        if file.stat().st_size > MOST_WORDS:
            raise ValueError(f"it has more than {MOST_WORDS} bytes")
        about = json_of(file.read_text(encoding="utf-8"), parse_constant=refused, parse_float=finite)
    except FileNotFoundError:
        raise ValueError(f'there is no "{told(file)}"; fetch the folder whole') from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f'"{told(file)}" is damaged ({error}); fetch it again') from None
    if not isinstance(about, dict):
        raise ValueError(f'"{told(file)}" is damaged (it holds no object); fetch it again')
    return about


def refused(constant: str) -> float:
    raise ValueError(f"it holds {constant}, which is no number")


def finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def told(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def preprocessing(folder: Path, config: Path) -> tuple[int, Sequence[float], Sequence[float]]:
    """The size, mean and spread that a model was trained with, of preprocessor_config.json if there is one."""
    file = folder / "preprocessor_config.json"
    about = read_json(file) if file.exists() else {}
    size = about.get("size", read_json(config).get("image_size", 224))
    size = size if not isinstance(size, dict) else size.get("height", size.get("shortest_edge"))
    mean, spread = (about.get(key, 3 * [0.5]) for key in ("image_mean", "image_std"))
    if about.get("do_normalize") is False:
        mean, spread = [0.0] * 3, [1.0] * 3
    where = told(file if "size" in about else config)
    if isinstance(size, bool) or not isinstance(size, int) or not 8 <= size <= 2048:
        raise ValueError(
            f'"{where}" is damaged (size: {str(size)[:60]}, a whole number from 8 to 2048); fetch it again'
        )
    for name, three, least in (("image_mean", mean, -math.inf), ("image_std", spread, 0.0)):
        numbers = isinstance(three, list) and all(isinstance(n, int | float) and n > least for n in three)
        if not numbers or len(three) != 3:
            raise ValueError(f'"{told(file)}" is damaged ({name}: {str(three)[:60]}, three numbers); fetch it again')
    return size, [float(m) for m in mean], [float(s) for s in spread]
