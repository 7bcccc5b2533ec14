"""FID and LPIPS of a report: by their definitions, with a person's own weights, in packages that may not be there."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import Tensor

from conceptguard.jobs.report.apart import Apart
from conceptguard.jobs.report.distances import RANK, Inception, Perceptual, fid, frechet, kid, tensors_of
from conceptguard.jobs.report.draw import png
from conceptguard.jobs.report.prompts import KEEP, Case
from conceptguard.jobs.report.work import Work

TELL = lambda *_: None  # noqa: E731


def by_covariances(x: np.ndarray, y: np.ndarray) -> float:
    """As the paper writes it, with scipy's root of a matrix."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root))


@pytest.mark.parametrize(("n", "m"), [(200, 150), (40, 200), (200, 9), (12, 10)])
def test_frechet_is_the_papers(n: int, m: int) -> None:
    """Also with fewer pictures than features, where the covariances have no full rank."""
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, 16)), rng.normal(0.3, 1.5, size=(m, 16)) @ rng.normal(size=(16, 16))
    found = frechet(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(by_covariances(x, y), rel=1e-4)
    assert frechet(torch.from_numpy(x), torch.from_numpy(x)) == pytest.approx(0, abs=1e-9)


def test_an_interval_lies_around_its_value_and_covers_the_truth() -> None:
    """Of Gaussians whose means lie 2 apart in one of four directions, with unlike spreads: 4 + (2 - 1)^2 = 5."""
    covered = 0
    for seed in range(40):
        torch.manual_seed(seed)
        x, y = torch.randn(400, 4), torch.randn(400, 4)
        y[:, 0] = 2 * y[:, 0] + 2
        found = fid(x, y, 40, seed)
        assert found.low <= found.value <= found.high
        covered += found.low <= 5 <= found.high
    assert covered >= 32
    with pytest.raises(ValueError, match="two pictures of each"):
        fid(torch.ones(1, 4), torch.ones(3, 4))


# --- the packages ----------------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    """What both packages' networks are here: mean colours, weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3))


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_packages(monkeypatch)


def in_place_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def extractor(name: str, features: list[str], feature_extractor_weights_path: str) -> Network:
        assert features == ["2048"]
        network = Network()
        network.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))
        network.forward = lambda x: (x.float().mean((2, 3)) * network.w,)
        return network

    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
            super().__init__()
            assert net == "alex" and pnet_rand, "else the package fetches weights"
            self.net = torch.nn.Module()
            self.net.slice1 = torch.nn.ModuleDict({"0": Network()})

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            assert a.abs().max() <= 1 and b.abs().max() <= 1
            w = self.net.slice1["0"].w
            return (w * (a - b).abs().mean((2, 3))).sum().view(1, 1, 1, 1)

    module = types.SimpleNamespace(FeatureExtractorInceptionV3=extractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, Path]:
    inception, alex = tmp_path / "inception.safetensors", tmp_path / "alex.pth"
    save_file({"w": torch.tensor([1.0, 2.0, 3.0])}, inception)
    torch.save({"features.0.w": torch.tensor([1.0, 0.5, 0.25]), "classifier.0.w": torch.ones(1)}, alex)
    return inception, alex


def work(folder: Path) -> tuple[Work, dict[str, list[Tensor]]]:
    """Twelve pictures to keep and two others, on three sides, each of one colour."""
    cases = [Case(f"p{i}", i, kind=KEEP if i < 12 else "erase") for i in range(14)]
    it = Work(folder / "report", cases, ("unedited", "edited", "uce"))
    colours: dict[str, list[Tensor]] = {side: [] for side in it.sides}
    generator = torch.Generator().manual_seed(0)

    def draw(case: Case, side: str, _: Any) -> bytes:
        colour = torch.randint(0, 256, (3,), generator=generator)
        colours[side].append(colour.float())
        return png((colour / 255).expand(16, 24, 3), {})

    it.run(draw, lambda *_: {}, TELL)
    return it, colours


def test_figures_of_the_pictures_themselves(tmp_path: Path, packages: None, weights: tuple[Path, Path]) -> None:
    it, colours = work(tmp_path)
    real = tmp_path / "real"
    real.mkdir()
    for i in range(5):
        (real / f"{i}.png").write_bytes(png(torch.full((8 + i, 8, 3), i / 5), {}))
    apart = Apart(Inception.of(weights[0]), real, Perceptual.of(weights[1]))
    found = {(figure.name, figure.side): figure for figure in apart.figures(it, TELL)}
    of = {side: torch.stack(colours[side][:12]) * torch.tensor([1.0, 2.0, 3.0]) for side in it.sides}
    for side in ("edited", "uce"):
        far = found["FID of what is to stay, to unedited", side]
        assert far.value == pytest.approx(by_covariances(of["unedited"].numpy(), of[side].numpy()), rel=1e-4)
        assert (far.n, far.few, far.enough, far.better) == (12, True, RANK, "low")
        near = found["KID of what is to stay, to unedited", side]
        assert near.value == pytest.approx(kid(of["unedited"], of[side]).value)
        w = torch.tensor([1.0, 0.5, 0.25]) / 127.5
        lpips = [float((w * (a - b).abs()).sum()) for a, b in zip(colours["unedited"], colours[side], strict=True)]
        for name, part in (("stay", lpips[:12]), ("go", lpips[12:])):
            figure = found[f"LPIPS of what is to {name}", side]
            assert figure.value == pytest.approx(sum(part) / len(part), rel=1e-5) and figure.n == len(part)
    greys = torch.stack([torch.full((3,), float(round(i / 5 * 255))) for i in range(5)]) * torch.tensor([1.0, 2.0, 3.0])
    to_real = found["FID of what is to stay, to real pictures", "unedited"]
    assert to_real.value == pytest.approx(by_covariances(greys.numpy(), of["unedited"].numpy()), rel=1e-3)
    assert to_real.n == 5 and ("FID of what is to stay, to unedited", "unedited") not in found
    assert set(apart.settings) == {"inception weights", "lpips weights", "real pictures"}


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_weights_are_tensors_alone(tmp_path: Path, packages: None, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": Harmful()}, tmp_path / "evil.pth")
    torch.save({"w": 3}, tmp_path / "numbers.pth")
    save_file({"w": torch.ones(4)}, tmp_path / "other.safetensors")
    for name, words in (("evil", "no file of weights"), ("numbers", "more than tensors"), ("gone", "there is no file")):
        with pytest.raises(ValueError, match=words):
            tensors_of(tmp_path / f"{name}.pth")
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="does not fit torch-fidelity's InceptionV3"):
        Inception.of(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no AlexNet of torchvision"):
        Perceptual.of(tmp_path / "other.safetensors")


def test_what_is_not_there_is_told(tmp_path: Path, weights: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for package, make, file in (("torch_fidelity", Inception, weights[0]), ("lpips", Perceptual, weights[1])):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=f"{package.replace('_', '-')} is not installed; run `pip install"):
            make.of(file)
    with pytest.raises(ValueError, match="give weights for these as well"):
        Apart(real=tmp_path)
    with pytest.raises(ValueError, match="is no folder with pictures"):
        Apart(Inception("k", lambda x: x), tmp_path)
