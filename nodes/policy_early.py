"""What a policy refuses when a prompt comes in, before anything is loaded: a friendly word, and no enforcement.

Only what the graph tells plainly: a sampler whose MODEL comes straight from a loader, through nodes with one `model`
input, of a file whose header says what it holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.model_detection
import folder_paths
import torch

from ..editing.policy.enforce import Enforcement
from ..editing.policy.file import Refused

# Loaders whose first output is the MODEL of a file: the input that names it, and its models folder.
LOADERS = {
    **dict.fromkeys(
        ("CheckpointLoaderSimple", "CheckpointLoader", "unCLIPCheckpointLoader", "ImageOnlyCheckpointLoader"),
        ("ckpt_name", "checkpoints"),
    ),
    "UNETLoader": ("unet_name", "diffusion_models"),
}
SAMPLERS = {"KSampler", "KSamplerAdvanced", "SamplerCustom"}
SAMPLERS |= {"BasicGuider", "CFGGuider", "DualCFGGuider", "PerpNegGuider"}
MOST = 2**26  # bytes of a header
KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
Problem = tuple[str, str, str]  # node's id, its class, what is wrong


def problems(policy: Enforcement, prompt: Any) -> list[Problem]:
    """What the policy would refuse of an API prompt; nothing of one that cannot be read."""
    found: list[Problem] = []
    for id, node in prompt.items() if isinstance(prompt, dict) else ():
        if not isinstance(node, dict) or node.get("class_type") not in SAMPLERS:
            continue
        try:
            policy.file.now()
            if (file := file_behind(prompt, node)) is not None:
                policy.suits(*network_of(*file))
        except Refused as error:
            found.append((str(id), node["class_type"], str(error)))
        except Exception:  # a file of whatever kind: its loader will say what is wrong with it
            continue
    return found


def file_behind(prompt: dict[str, Any], node: dict[str, Any]) -> tuple[str, int] | None:
    """The file that a node's MODEL comes from, and its date; None if the graph does not tell."""
    seen: set[str] = set()
    while True:
        link = node.get("inputs", {}).get("model")
        if not isinstance(link, list) or len(link) != 2 or str(link[0]) in seen:
            return None
        seen.add(str(link[0]))
        node, output = prompt.get(str(link[0]), {}), link[1]
        if node.get("class_type") in LOADERS and output == 0:
            name, folder = LOADERS[node["class_type"]]
            path = folder_paths.get_full_path(folder, node["inputs"][name])
            return None if path is None else (path, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=64)
def network_of(path: str, date: int) -> tuple[torch.nn.Module, str]:
    """The diffusion network of a safetensors file, as the host would build it, without its weights; and the host's name
    for its model. Raises for what the host does not know so. date: of the file, so that a new one is read again."""
    held = dict(tensors_in(Path(path)))
    prefix = comfy.model_detection.unet_prefix_from_state_dict(held)
    own = {name.removeprefix(prefix): x for name, x in held.items() if name.startswith(prefix)}
    held = own or held  # files of the network alone have no prefix
    config = comfy.model_detection.model_config_from_unet(held, "")
    with torch.device("meta"):
        model = config.get_model(held, "", device=torch.device("meta"))
    return model.diffusion_model, type(model).__name__


def tensors_in(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and shapes of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MOST:
            raise ValueError("its header is larger than 64 MB")
        header = json.loads(file.read(size))
    for name, about in header.items():
        if name != "__metadata__":
            kind = KINDS.get(about["dtype"], torch.uint8)
            yield name, torch.empty(about["shape"], dtype=kind, device="meta")


def answer(found: list[Problem]) -> dict[str, Any]:
    """As the host answers a prompt that it does not take."""
    errors = {
        id: {
            "errors": [{"type": "concept_guard_policy", "message": why, "details": "", "extra_info": {}}],
            "dependent_outputs": [],
            "class_type": kind,
        }
        for id, kind, why in found
    }
    error = {"type": "concept_guard_policy", "message": found[0][2], "details": "", "extra_info": {}}
    return {"error": error, "node_errors": errors}
