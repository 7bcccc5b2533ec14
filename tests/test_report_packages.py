"""FID, KID and LPIPS beside the packages whose figures people know: torch-fidelity, clean-fid, lpips.

They are no part of the environment; where one is not installed, its test is left out. Their networks have random
weights here, the same on both sides: nothing is fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conceptguard.jobs.report.distances import Inception, Perceptual, fid, kid

PICTURES = 24  # of a sort


@pytest.fixture(scope="module")
def sorts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of pictures: coarse patches of colour, those of the second warmer and finer."""
    rng, base = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    for name, cells, warmth in (("a", 6, 0), ("b", 8, 40)):
        (base / name).mkdir()
        for i in range(PICTURES):
            coarse = rng.integers(0, 256 - warmth, (cells, cells, 3))
            coarse[..., 0] += warmth
            Image.fromarray(coarse.astype(np.uint8)).resize((72, 96), Image.Resampling.BICUBIC).save(
                base / name / f"{i:02}.png"
            )
    return base / "a", base / "b"


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights that nobody trained, which keep the size of what they see."""
    extractors = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Untrained(extractors.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            pass

    folder = tmp_path_factory.mktemp("weights")
    torch.save({}, folder / "none.pth")
    torch.manual_seed(0)
    network = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(folder / "none.pth"))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


def test_fid_and_kid_of_files_are_torch_fidelitys(sorts: tuple[Path, Path], inception: Path) -> None:
    """All of it: how the files are read, the network's features, the figures; KID of all pictures at once."""
    package = pytest.importorskip("torch_fidelity")
    theirs = package.calculate_metrics(
        input1=str(sorts[0]),
        input2=str(sorts[1]),
        feature_extractor_weights_path=str(inception),
        **{"fid": True, "kid": True, "kid_subsets": 1, "kid_subset_size": PICTURES},
        **{"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True},
    )
    network = Inception.of(inception)
    a, b = (network.features(sorted(folder.iterdir())) for folder in sorts)
    print(f"FID {fid(a, b).value:.6g}, torch-fidelity {theirs['frechet_inception_distance']:.6g}")
    print(f"KID {kid(a, b).value:.6g}, torch-fidelity {theirs['kernel_inception_distance_mean']:.6g}")
    assert fid(a, b, 2).value == pytest.approx(theirs["frechet_inception_distance"], rel=2e-3)
    assert kid(a, b, 2).value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


@pytest.mark.parametrize("n", [50, 400])
def test_kid_and_fid_of_features_are_clean_fids(n: int) -> None:
    package = pytest.importorskip("cleanfid.fid")
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, 64)), rng.normal(0.2, 1.3, size=(n, 64))
    theirs = package.kernel_distance(x, y, num_subsets=1, max_subset_size=n)
    far = package.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    print(f"n = {n}: KID {kid(a, b, 2).value:.6g}, clean-fid {theirs:.6g}; FID {fid(a, b, 2).value:.6g}, {far:.6g}")
    assert kid(a, b, 2).value == pytest.approx(theirs, rel=1e-6)
    assert fid(a, b, 2).value == pytest.approx(far, rel=1e-3)


def by_its_paper(layers: list[torch.Tensor], others: list[torch.Tensor], weights: list[torch.Tensor]) -> float:
    """LPIPS of features [1, C, h, w] a layer: channels to length 1, squared differences weighted, means added."""
    total = 0.0
    for x, y, w in zip(layers, others, weights, strict=True):
        x, y = (each / (each.square().sum(1, keepdim=True).sqrt() + 1e-10) for each in (x, y))
        total += float((w * (x - y).square()).sum(1).mean())
    return total


def test_lpips_of_files_is_the_packages(sorts: tuple[Path, Path], tmp_path: Path) -> None:
    """By the package's own way from a file to a figure, and from its layers by the paper's formula."""
    package, torchvision = pytest.importorskip("lpips"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    alex = torchvision.models.alexnet(weights=None)
    torch.save(alex.state_dict(), tmp_path / "alex.pth")
    theirs = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, tensor in theirs.net.state_dict().items():
        tensor.copy_(alex.state_dict()[f"features.{name.split('.', 1)[1]}"])
    ours, weights = Perceptual.of(tmp_path / "alex.pth"), [lin.model[-1].weight.detach() for lin in theirs.lins]
    found = []
    with torch.no_grad():
        for a, b in zip(*(sorted(folder.iterdir())[:6] for folder in sorts), strict=True):
            x, y = (package.im2tensor(np.asarray(Image.open(file))) for file in (a, b))
            layers = ([*theirs.net(theirs.scaling_layer(each))] for each in (x, y))
            found.append((ours.between(a, b), float(theirs(x, y)), by_its_paper(*layers, weights)))
    print("LPIPS, ours, the package's, the paper's:", *(f"{p:.6f} {q:.6f} {r:.6f};" for p, q, r in found))
    for own, same, paper in found:
        assert own == pytest.approx(same, rel=1e-5) and own == pytest.approx(paper, rel=1e-4) and own > 0
