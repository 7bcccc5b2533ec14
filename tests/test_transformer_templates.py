"""The templates for Flux, Z-Image and Qwen-Image run through the host's own loaders, samplers and decoders.

The files that they load are those of a few small random networks, with the keys that the real ones have; the host reads
most sizes from the weights, and is told here those that it knows by heart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.model_detection
import comfy.ops
import comfy.sd1_clip
import comfy.supported_models
import comfy.text_encoders.llama
import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.z_image
import dits
import folder_paths
import nodes as host
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow
from comfy_extras.nodes_sd3 import EmptySD3LatentImage
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from conceptguard.demo.report import main as make_report
from conceptguard.editing.edits.encode import encode, own_tokens
from conceptguard.editing.engine.host import accounts_of
from conceptguard.nodes import NODES
from conceptguard.tools.workflow import to_api

pytestmark = pytest.mark.slow

WORKFLOWS = Path(__file__).resolve().parent.parent / "example_workflows"
CLIP = dict(
    hidden_size=dits.WIDTH,
    intermediate_size=32,
    num_attention_heads=2,
    num_hidden_layers=2,
    hidden_act="quick_gelu",
    max_position_embeddings=77,
    vocab_size=49408,
    eos_token_id=49407,
    layer_norm_eps=1e-5,
    projection_dim=dits.WIDTH,
)
T5 = dict(
    d_ff=32,
    d_kv=8,
    d_model=dits.WIDTH,
    num_heads=2,
    num_layers=2,
    vocab_size=32128,
    dense_act_fn="gelu_pytorch_tanh",
    is_gated_act=True,
    model_type="t5",
)
SMALL = dict(hidden_size=dits.WIDTH, intermediate_size=32, num_hidden_layers=3)


def of(name: str, *sizes: str) -> dict[str, Any]:
    return {size: dits.FAMILIES[name].shape[size] for size in sizes}


KNOWN = {  # by heart, for what is detected as a model of that name
    "flux": of("Flux.1", "num_heads", "axes_dim", "mlp_ratio"),
    "lumina2": {k: v for k, v in dits.FAMILIES["Z-Image"].shape.items() if k not in ("image_model", "n_layers")},
    "qwen_image": of(
        *("Qwen-Image", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope"),
        "out_channels",
    ),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host knows by heart, small."""
    plain = comfy.model_detection.detect_unet_config

    def detect(*args: Any, **more: Any) -> Any:
        found = plain(*args, **more)
        return found and found | KNOWN[found["image_model"]]

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", detect)
    z_image = {**comfy.supported_models.ZImage.unet_config, "dim": KNOWN["lumina2"]["dim"]}
    monkeypatch.setattr(comfy.supported_models.ZImage, "unet_config", z_image)
    configs = {"Qwen3_4BConfig": {"num_attention_heads": 2, "num_key_value_heads": 1}, "Qwen25_7BVLI_Config": {}}
    for name, heads in configs.items():
        config = getattr(comfy.text_encoders.llama, name)
        monkeypatch.setattr(
            comfy.text_encoders.llama,
            name,
            lambda config=config, heads=heads, **kw: replace(config(), **SMALL, **heads),
        )
    clip = comfy.sd1_clip.SDClipModel.__init__

    def init(self: Any, *args: Any, textmodel_json_config: Any = None, **more: Any) -> None:
        t5 = isinstance(textmodel_json_config, str) and "t5_config" in textmodel_json_config
        known = T5 if t5 else CLIP if textmodel_json_config is None else textmodel_json_config
        clip(self, *args, textmodel_json_config=dict(known), **more)

    monkeypatch.setattr(comfy.sd1_clip.SDClipModel, "__init__", init)


def weights(module: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: dits.weight(name, w.shape, generator) for name, w in module.state_dict().items()}


def unet(name: str) -> dict[str, Tensor]:
    return weights(dits.build(name).model.diffusion_model)


def image_vae() -> dict[str, Tensor]:
    """Of the real size, which the host knows by heart."""
    shape = dict(double_z=True, z_channels=16, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4])
    shape |= dict(num_res_blocks=2, attn_resolutions=[], dropout=0.0)
    part = "comfy.ldm.modules.diffusionmodules.model"
    return weights(
        comfy.ldm.models.autoencoder.AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": f"{part}.Encoder", "params": shape},
            decoder_config={"target": f"{part}.Decoder", "params": shape},
        )
    )


def video_vae() -> dict[str, Tensor]:
    shape = dict(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[])
    return weights(comfy.ldm.wan.vae.WanVAE(**shape, temperal_downsample=[False, True, True], dropout=0.0))


def language(kind: Any) -> dict[str, Tensor]:
    return weights(kind(dtype=torch.float32).transformer)


TEMPLATES: dict[str, dict[str, tuple[str, Callable[[], dict[str, Tensor]]]]] = {
    "flux": {
        "flux1-dev.safetensors": ("diffusion_models", lambda: flux()),
        "clip_l.safetensors": ("text_encoders", lambda: language(comfy.sd1_clip.SDClipModel)),
        "t5xxl_fp16.safetensors": ("text_encoders", lambda: language(comfy.text_encoders.sd3_clip.T5XXLModel)),
        "ae.safetensors": ("vae", image_vae),
    },
    "z-image": {
        "z_image_turbo_bf16.safetensors": ("diffusion_models", lambda: unet("Z-Image")),
        "qwen_3_4b.safetensors": ("text_encoders", lambda: language(comfy.text_encoders.z_image.Qwen3_4BModel)),
        "ae.safetensors": ("vae", image_vae),
    },
    "qwen-image": {
        "qwen_image_fp8_e4m3fn.safetensors": ("diffusion_models", lambda: unet("Qwen-Image")),
        "qwen_2.5_vl_7b_fp8_scaled.safetensors": (
            "text_encoders",
            lambda: language(comfy.text_encoders.qwen_image.Qwen25_7BVLIModel),
        ),
        "qwen_image_vae.safetensors": ("vae", video_vae),
    },
}


def flux() -> dict[str, Tensor]:
    """With a pooled text as wide as this CLIP's."""
    found = unet("Flux.1")
    found["vector_in.in_layer.weight"] = torch.randn(32, dits.WIDTH) * 0.2
    return found


OURS = {node.GET_SCHEMA().node_id: node for node in NODES}
KINDS = {
    **host.NODE_CLASS_MAPPINGS,
    **OURS,
    "ModelSamplingAuraFlow": ModelSamplingAuraFlow,
    "EmptySD3LatentImage": EmptySD3LatentImage,
}


class About(dict[str, Any]):
    """What a server would say of a node."""

    def __missing__(self, kind: str) -> dict[str, Any]:
        types = KINDS[kind].INPUT_TYPES()
        groups = {name: types[name] for name in ("required", "optional") if name in types}
        return {"input": groups, "input_order": {k: list(v) for k, v in groups.items()}, "display_name": kind}


def run(prompt: dict[str, Any]) -> dict[str, Any]:
    """What each node of a prompt puts out; a node that saves does nothing."""
    done: dict[str, Any] = {}

    def out(id: str) -> Any:
        if id not in done:
            node = prompt[id]
            kind = KINDS[node["class_type"]]
            given = {k: out(v[0])[v[1]] if isinstance(v, list) else v for k, v in node["inputs"].items()}
            if hasattr(kind, "define_schema"):
                done[id] = kind.execute(**given).args
            else:
                done[id] = getattr(kind(), kind.FUNCTION)(**given)
        return done[id]

    for id, node in prompt.items():
        if node["class_type"] != "SaveImage":
            out(id)
    return done


@pytest.fixture(params=TEMPLATES)
def template(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A template's prompt, small and short, and the files that it names."""
    for file, (folder, make) in TEMPLATES[request.param].items():
        (tmp_path / folder).mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in make().items()}, tmp_path / folder / file)
    paths = {
        folder: ([str(tmp_path / folder)], {".safetensors"}) for folder in ("diffusion_models", "text_encoders", "vae")
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {**folder_paths.folder_names_and_paths, **paths})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    saved = json.loads((WORKFLOWS / f"erase-a-concept-{request.param}.json").read_text(encoding="utf-8"))
    prompt = to_api(saved, About())
    for node in prompt.values():
        if node["class_type"] == "EmptySD3LatentImage":
            node["inputs"] |= {"width": 64, "height": 64}
        elif node["class_type"] == "ConceptGuardConcept":
            node["inputs"]["keep"] = ""  # to random weights a cup may be more like a mug than a mug
        elif node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    yield request.param, prompt


def test_a_template_of_a_transformer_runs(template: Any) -> None:
    """Another picture than without the edit, in all blocks; and the files are those that it names."""
    name, prompt = template
    named = {v for node in prompt.values() for v in node["inputs"].values() if str(v).endswith(".safetensors")}
    assert named == set(TEMPLATES[name])
    done = run(prompt)
    plain, edited = (done[id][0] for id in ("9", "10"))
    assert plain.shape[-3:] == edited.shape[-3:] == (64, 64, 3)
    assert torch.isfinite(edited).all() and not torch.allclose(plain, edited, atol=1e-3)
    accounts = accounts_of(done["6"][0])
    assert accounts is not None
    ((entry, _),) = accounts.runs[-1][1].lines()
    assert not entry.missed and entry.edited
    clip = done["14"][0]
    for text in ("beer mug", "a beer mug in the rain"):
        tokens = encode(clip, text)
        own = own_tokens(clip, text, tokens.shape[1])
        assert own == tuple(range(own[0], own[-1] + 1)) and 2 <= len(own) <= 10 and own[-1] < tokens.shape[1]
        other = encode(clip, text + " x")
        same = min(len(tokens[0]), len(other[0]), own[0])
        torch.testing.assert_close(tokens[0, :same], other[0, :same], rtol=1e-3, atol=1e-3)


PARTS = {"flux": ("flux", "clip_l", "t5xxl"), "qwen-image": ("qwen_image", "qwen_2.5")}


@pytest.mark.parametrize("template", PARTS, indirect=True)
def test_a_report_takes_a_transformer_in_parts(
    template: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make report` on a diffusion model, text encoders and a VAE in files of their own; Qwen-Image's is for videos."""
    name, _ = template
    kind, *texts = PARTS[name]
    (model,), (vae,) = (list((tmp_path / folder).iterdir()) for folder in ("diffusion_models", "vae"))
    clips = [file for text in texts for file in (tmp_path / "text_encoders").glob(f"{text}*")]
    edit = {"method": "CRE", "concept": {"name": "mug", "phrases": ["a beer mug"], "instead": ["a cup"]}, "floor": 0.0}
    preset = {"schema_version": 2, "needs": ["what to draw instead"], "kind": "concept-guard preset", "name": "no mugs"}
    (tmp_path / "preset.json").write_text(json.dumps({**preset, "edits": [edit]}), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a beer mug\n", encoding="utf-8")
    words = [
        "--checkpoint",
        model,
        "--vae",
        vae,
        "--clip-type",
        kind,
        *(each for clip in clips for each in ("--clip", clip)),
    ]
    words += ["--preset", tmp_path / "preset.json", "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "out"]
    words += ["--size", "64x64", "--steps", "2", "--cfg", "2", "--peer", "negative prompt"]
    monkeypatch.setattr("sys.argv", ["make report", *map(str, words)])
    make_report()
    assert "1 of 1: all pictures drawn" in capsys.readouterr().out
    card = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    changed = {f["side"]: f["value"] for f in card["figures"] if f["name"] == "pictures that the edits changed"}
    assert changed == {"edited": 1.0, "negative-prompt": 1.0}
    assert (
        card["checkpoint"] == model.name
        and {f"{file.name}_sha256" for file in (*clips, vae)} <= card["settings"].keys()
    )
    with Image.open(tmp_path / "out" / "pictures" / "000000-edited.png") as picture:
        assert picture.size == (64, 64)
    words[words.index("--clip-type") + 1] = "clip"
    monkeypatch.setattr("sys.argv", ["make report", *map(str, words)])
    with pytest.raises(SystemExit, match='the kind of text encoder is "clip"; it is one of stable_diffusion'):
        make_report()
    monkeypatch.setattr("sys.argv", ["make report", "--checkpoint", str(model), "--vae", str(vae)])
    with pytest.raises(SystemExit, match="holds no text encoder; give it with --clip"):
        make_report()
