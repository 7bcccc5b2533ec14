"""Other erasers beside a preset: each draws what its node would, or says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conceptguard.demo.load import load
from conceptguard.demo.report_given import concepts_of, encoders, peer_of
from conceptguard.editing.engine.host import edits_of
from conceptguard.editing.presets.document import read
from conceptguard.jobs.measure import Sampling
from conceptguard.jobs.report.draw import Studio, opened
from conceptguard.jobs.report.peers import METHODS, NEGATIVE, by_method, by_weights
from conceptguard.jobs.report.prompts import Case
from conceptguard.jobs.report.work import sides_of

CASE = Case("a dagger", 3)
DAGGER = {"method": "CRE", "concept": {"name": "dagger", "phrases": ["a dagger", "dagger"]}}
TWICE = [DAGGER, {**DAGGER, "method": "EIUP"}, {**DAGGER, "gate": {"kind": "prompt"}}]
PRESET = read(json.dumps({"schema_version": 1, "kind": "concept-guard preset", "name": "x", "edits": TWICE}))


@pytest.fixture(scope="module")
def parts() -> Any:
    return load()


def peer(name: str, parts: Any) -> Any:
    return peer_of(name, parts, PRESET, encoders(None, parts[1]))


@pytest.mark.slow
def test_every_method_changes_the_picture_of_what_the_preset_erases(parts: Any) -> None:
    late = {"SLD weak", "SLD medium", "SLD strong"}  # which wait for more steps than are drawn here
    peers = {name: peer(name.upper(), parts) for name in METHODS if name not in late}
    models: dict[str, Any] = {"unedited": lambda _: parts[0], **{name: it.model for name, it in peers.items()}}
    negatives = {name: it.negative for name, it in peers.items() if it.negative}
    how = Sampling(2, 4.0)
    studio = Studio(models, parts[1], parts[2], torch.zeros(1, 4, 16, 16), how, [], negatives=negatives)
    latents = {side: opened(studio.draw(CASE, side, lambda: None))[1]["latent"] for side in models}
    assert len(set(latents.values())) == len(models), "two sides draw the same"
    assert negatives.keys() == {NEGATIVE} and "dagger" in negatives[NEGATIVE]
    assert len({it.key for it in peers.values()}) == len(peers) > 9


def test_a_method_erases_each_thing_of_the_preset_once(parts: Any) -> None:
    concepts = concepts_of(parts, PRESET)
    assert len({concept.name for concept in concepts}) == len(concepts) == 1
    edits = edits_of(peer("AdaVD", parts).model(CASE))
    assert [(spec.how.label, spec.source.key) for spec in edits] == [("AdaVD", concepts[0].key)]
    filtered = peer("SAFREE", parts)
    assert edits_of(filtered.model(CASE))[0].key != edits_of(filtered.model(Case("a cat", 1)))[0].key


def test_a_preset_and_a_lora_are_peers_too(parts: Any, tmp_path: Path) -> None:
    other = peer("no-gore", parts)
    assert other.name == "No gore" and edits_of(other.model(CASE))
    weight = next(name for name in parts[0].model.state_dict() if name.endswith("attn2.to_v.weight"))
    wide, deep = parts[0].model.state_dict()[weight].shape
    path = weight.removesuffix(".weight")
    lora = {f"{path}.lora_up.weight": torch.ones(wide, 1), f"{path}.lora_down.weight": torch.ones(1, deep)}
    save_file(lora, tmp_path / "esd.safetensors")
    trained = peer(str(tmp_path / "esd.safetensors"), parts)
    assert trained.name == "esd" and len(trained.model(CASE).patches) == 1
    save_file({"other": torch.ones(2)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="changes nothing of this model"):
        by_weights(tmp_path / "none.safetensors", "k", parts[0])


def test_what_is_no_peer_is_told(parts: Any) -> None:
    with pytest.raises(
        ValueError, match="there is no peer .ESD.; name a preset, a file of weights, or one of negative"
    ):
        peer("ESD", parts)
    with pytest.raises(ValueError, match="the preset names none"):
        by_method("UCE", *parts[:2], ())


def test_sides_have_names_that_files_may_have() -> None:
    assert sides_of(["SLD, max", "SLD max", "edited", "雪", "../x"]) == [
        "sld-max",
        "sld-max-2",
        "edited-2",
        "peer",
        "x",
    ]
