"""Models that no edit reaches are refused in the name of the node and of the model, before anything is sampled."""

from __future__ import annotations

import importlib
from typing import Any

import dits
import pytest
import tiny
import torch
from comfy.ldm.modules.attention import attention_pytorch
from dits import CROSS, build, sample, tokens
from test_cross import cre
from torch import Tensor, nn

from conceptguard.editing.edits.spec import EditSpec, PromptTokens
from conceptguard.editing.engine.backbone import backbone_of
from conceptguard.editing.engine.host import add_edit

# Without transformer_options; of videos and sound; of pictures, but not tested.
REFUSED = {
    "ernie.model": ["ErnieImageModel"],
    "kandinsky5.model": ["Kandinsky5"],
    "hunyuan_video.model": ["HunyuanVideo"],
    "lightricks.model": ["LTXVModel"],
    "genmo.joint_model.asymm_models_joint": ["AsymmDiTJoint"],
    "cosmos.model": ["GeneralDIT"],
    "wan.model": ["VaceWanModel", "CameraWanModel", "WanModel_S2V", "HumoWanModel"],
    "minimax.model": ["MiniMaxH3"],
    "ace.model": ["ACEStepTransformer2DModel"],
    "audio.dit": ["AudioDiffusionTransformer"],
    "aura.mmdit": ["MMDiT"],
    "hydit.models": ["HunYuanDiT"],
    "omnigen.omnigen2": ["OmniGen2Transformer2DModel"],
    "chroma_radiance.model": ["ChromaRadiance"],
    "cascade.stage_c": ["StageC"],
}


def kinds() -> list[Any]:
    """Those that this host has."""
    found = []
    for module, names in REFUSED.items():
        if importlib.util.find_spec(f"comfy.ldm.{module.split('.')[0]}") is not None:
            at = importlib.import_module(f"comfy.ldm.{module}")
            found += [pytest.param(getattr(at, name), id=name) for name in names if hasattr(at, name)]
    return found


@pytest.mark.parametrize("kind", kinds())
def test_a_family_that_is_not_edited_is_refused_by_name(kind: Any) -> None:
    network = kind.__new__(kind)
    nn.Module.__init__(network)
    name = kind.__name__
    with pytest.raises(ValueError, match=rf"Test: cannot edit Some \({name}\): ConceptGuard edits .*Flux, .*Wan"):
        backbone_of(network, "Some", "Test")


def test_wan_that_starts_from_a_picture_is_refused() -> None:
    from comfy.ldm.wan.model import WanModel
    from comfy.ops import disable_weight_init

    shape = dict(dim=32, ffn_dim=32, num_heads=2, num_layers=1, text_dim=16)
    network = WanModel(model_type="i2v", **shape, operations=disable_weight_init)
    with pytest.raises(ValueError, match=r"Test: cannot edit Some \(WanModel\): .*Wan \(text to video\)"):
        backbone_of(network, "Some", "Test")


def own(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, transformer_options: Any = None, **more: Any
) -> Tensor:
    """As of loaders whose blocks call kernels of their own, GGUF's or Nunchaku's: no override is asked."""
    return attention_pytorch(q, k, v, heads, **{name: x for name, x in more.items() if name == "skip_reshape"})


@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image", "Z-Image", "SD3", "HiDream"])
def test_a_joint_attention_of_its_own_is_an_error_at_the_first_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*dits.FAMILIES[name].attention, own)
    edited = add_edit(dits.build(name), EditSpec("projection", dits.concept(), options=tiny.CRE, node="Test"))
    with pytest.raises(
        ValueError, match=r"Test: .*attention of its own \(of GGUF, Nunchaku or another loader, or of a node"
    ):
        dits.sample(name, edited, steps=3)


@pytest.mark.parametrize("name", ["Wan", "Cosmos-Predict2"])
def test_a_cross_attention_of_its_own_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*CROSS[name].attention, own)
    with pytest.raises(ValueError, match="Test: .*reached none of 2 blocks"):
        sample(name, cre(build(name)), steps=3)


@pytest.mark.parametrize("name", dits.FAMILIES)
def test_a_learned_prompt_has_no_meaning_in_a_joint_attention(name: str) -> None:
    """KPOP's: tokens for a cross-attention, and a joint one changes its text from block to block."""
    k = tokens(3, 2)
    with pytest.raises(
        ValueError, match=r'Test: "soft" are tokens that were learned for a cross-attention, and .*none'
    ):
        add_edit(dits.build(name), EditSpec("prompt", PromptTokens("soft", k, k), blocks="all", node="Test"))


def test_a_learned_prompt_joins_the_text_of_a_cross_attention() -> None:
    """There it means what it does in a UNet."""
    model, k = build("Wan"), tokens(3, 2)
    edited = add_edit(model, EditSpec("prompt", PromptTokens("soft", k, k), blocks="all", node="Test"))
    assert not torch.allclose(sample("Wan", edited), sample("Wan", model), atol=1e-3)
