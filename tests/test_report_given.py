"""What the arguments of `make report` name: judges of one's own, presets, models; and errors that say what to give."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conceptguard.demo.load import load_judge
from conceptguard.demo.report import apart_of, arguments, size_of
from conceptguard.demo.report_given import encoders, files_of, loaded, looks_of, preset_of, sha256_of
from conceptguard.editing.engine.host import of_model
from conceptguard.editing.files import artefacts
from conceptguard.tools.environment import ROOT

GATE = ROOT / "assets" / "gates" / "beer-mug.safetensors"


def given(monkeypatch: pytest.MonkeyPatch, *words: Any) -> argparse.Namespace:
    monkeypatch.setattr("sys.argv", ["make report", *map(str, words)])
    return arguments()


def test_a_discriminator_of_ones_own_looks_with_its_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    args = given(monkeypatch, "--discriminator", GATE, "--threshold", "0.99")
    demo, own = looks_of(args, frozenset({"beer mug"}), encoders(None, None))
    threshold = artefacts.read(GATE, "discriminator").training["threshold"]
    assert own.kind == "flag" and demo.name == "demo judge"
    assert own.flags({own.name: threshold}) and not own.flags({own.name: threshold - 1e-6})
    images = torch.rand(2, 128, 128, 3)
    assert all(0 <= each[own.name] <= 1 for each in own.see(images, []))
    scores = demo.see(images, [])[1]
    with torch.no_grad():
        logits = load_judge()(images[1:].movedim(-1, 1))["objects"][0]
    assert max(scores, key=lambda label: scores[label]) == list(scores)[int(logits.argmax())]


def test_a_discriminator_without_its_encoder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    args = given(monkeypatch, "--discriminator", GATE)
    with pytest.raises(ValueError, match="needs an encoder that its file does not hold"):
        looks_of(args, frozenset(), lambda _: None)


@pytest.mark.parametrize("architecture", ["unet", "flux"])
def test_the_demo_model_is_of_either_architecture(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = given(monkeypatch, "--architecture", architecture)
    model, _, vae = loaded(args)
    assert ("Flux" in of_model(model, "test").name) == (
        architecture == "flux"
    ) and vae.spacial_compression_decode() == 8
    file = "demo-model" if architecture == "unet" else "demo-flux"
    assert files_of(args) == {"checkpoint_sha256": sha256_of(ROOT / "demo" / "weights" / f"{file}.safetensors")}


def test_what_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match='there is no checkpoint ".*gone.safetensors"'):
        loaded(given(monkeypatch, "--checkpoint", tmp_path / "gone.safetensors"))
    with pytest.raises(ValueError, match='"other.safetensors" holds no diffusion model that is known here'):
        loaded(given(monkeypatch, "--checkpoint", tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="there is no preset .no-mugs.; give a file, or one of artist-style-opt-out"):
        preset_of("no-mugs")
    with pytest.raises(ValueError, match="give width x height"):
        size_of(given(monkeypatch, "--size", "512"))
    with pytest.raises(ValueError, match="multiples of 8"):
        size_of(given(monkeypatch, "--size", "500x512"))
    with pytest.raises(ValueError, match="give weights for these as well"):
        apart_of(given(monkeypatch, "--real", tmp_path))
    assert apart_of(given(monkeypatch, "--fid", tmp_path / "gone", "--workers", "0")).inception is None
