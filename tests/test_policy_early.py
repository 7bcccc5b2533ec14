"""What a policy refuses before anything is loaded: by the headers of files that a graph names, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.ldm.flux.model
import comfy.ops
import dits
import folder_paths
import pytest
import torch
from comfy.ldm.aura.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.supported_models import SDXL
from governed import governed, write

from conceptguard.nodes.policy_early import answer, problems

FLUX = dict(in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096, hidden_size=3072)
FLUX |= dict(mlp_ratio=4.0, num_heads=24, depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000)
FLUX |= dict(qkv_bias=True, guidance_embed=True, image_model="flux")
UNET = dict(image_size=32, in_channels=4, out_channels=4, num_heads=-1, num_res_blocks=[2, 2, 2], num_head_channels=64)
UNET |= dict(channel_mult=[1, 2, 4], transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], num_classes="sequential")
UNET |= dict(use_spatial_transformer=True, legacy=False, transformer_depth_middle=10)


def network(kind: str) -> torch.nn.Module:
    """Of full size, without its weights."""
    how: dict[str, Any] = {"operations": comfy.ops.disable_weight_init, "device": torch.device("meta")}
    with torch.device("meta"):
        if kind == "flux":
            return comfy.ldm.flux.model.Flux(**FLUX, **dits.asked_by_newer("Flux"), **how)
        if kind == "aura":
            return MMDiT(n_layers=4, n_double_layers=2, **how)
        return UNetModel(**UNET, **SDXL.unet_config, **how)


def header(path: Path, kind: str) -> None:
    """A safetensors file of which there is the header alone."""
    prefix = "model.diffusion_model." if path.parent.name == "checkpoints" else ""
    shapes = {f"{prefix}{name}": list(x.shape) for name, x in network(kind).state_dict().items()}
    about = {name: {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    data = json.dumps({"__metadata__": {"format": "pt"}, **about}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(data).to_bytes(8, "little") + data)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("models")
    header(base / "checkpoints" / "xl.safetensors", "sdxl")
    header(base / "diffusion_models" / "flux.safetensors", "flux")
    header(base / "diffusion_models" / "aura.safetensors", "aura")
    (base / "checkpoints" / "broken.safetensors").write_bytes(b"\xff" * 16)
    return base


@pytest.fixture(autouse=True)
def found(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "get_full_path", lambda folder, name: str(models / folder / name))


def graph(loader: str, **file: str) -> dict[str, Any]:
    return {
        "1": {"class_type": loader, "inputs": file},
        "2": {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "lora_name": "a"}},
        "3": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "seed": 1}},
    }


XL = graph("CheckpointLoaderSimple", ckpt_name="xl.safetensors")
FLUX_GRAPH = graph("UNETLoader", unet_name="flux.safetensors")
AURA = graph("UNETLoader", unet_name="aura.safetensors")


def test_a_family_without_a_rule_is_told_by_the_files_header(tmp_path: Path) -> None:
    with governed(tmp_path, rule={"families": ["SDXL"]}) as enforcement:
        assert problems(enforcement, XL) == []
        ((id, kind, why),) = problems(enforcement, FLUX_GRAPH)
    assert (id, kind) == ("3", "KSampler")
    assert why == "ConceptGuard policy: no rule of the policy covers Flux models; this server does not sample it"


def test_a_model_that_cannot_be_edited_is_told_by_the_files_header(tmp_path: Path) -> None:
    with governed(tmp_path) as enforcement:
        ((_, _, why),) = problems(enforcement, AURA)
        assert "cannot edit AuraFlow" in why
        assert not problems(enforcement, XL) + problems(enforcement, FLUX_GRAPH)
        write(tmp_path, others="pass")
        assert problems(enforcement, AURA) == []


def test_a_damaged_policy_refuses_every_sampler_early(tmp_path: Path) -> None:
    with governed(tmp_path) as enforcement:
        (tmp_path / "policy.json").write_text("{")
        for prompt in (XL, graph("SomeLoader", name="x")):
            assert '"policy.json" is damaged' in problems(enforcement, prompt)[0][2]
        assert problems(enforcement, {"1": XL["1"]}) == []  # nothing is sampled


MERGED = {**XL, "2": {"class_type": "ModelMergeSimple", "inputs": {"model1": ["1", 0], "model2": ["1", 0]}}}
VAE_ALONE = {**AURA, "2": {"class_type": "Other", "inputs": {"model": ["1", 2]}}}
CIRCLE = {"3": {"class_type": "KSampler", "inputs": {"model": ["3", 0]}}}
ODD: list[Any] = [None, [], {"1": None}, {"3": {"class_type": "KSampler"}}, MERGED, VAE_ALONE, CIRCLE]
ODD += [{"3": {"class_type": "KSampler", "inputs": {"model": ["9", 0]}}}, graph("UNETLoader", unet_name="gone")]
ODD += [graph("CheckpointLoaderSimple", ckpt_name="broken.safetensors"), graph("UNETLoader")]


@pytest.mark.parametrize("prompt", ODD)
def test_what_a_graph_does_not_tell_plainly_is_left_to_the_run(tmp_path: Path, prompt: Any) -> None:
    with governed(tmp_path, rule={"families": ["SD1.x"]}) as enforcement:
        assert problems(enforcement, prompt) == []


def test_the_answer_is_as_the_hosts_own() -> None:
    said = answer([("3", "KSampler", "no"), ("5", "SamplerCustom", "neither")])
    assert said["error"]["message"] == "no" and set(said["node_errors"]) == {"3", "5"}
    assert said["node_errors"]["5"]["class_type"] == "SamplerCustom"
    assert said["node_errors"]["5"]["errors"][0]["message"] == "neither"
