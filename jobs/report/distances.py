"""How far sets of pictures lie apart: KID and FID of features, LPIPS of pairs.

The networks are the person's own: torch-fidelity's InceptionV3 and lpips' AlexNet, packages that people may install,
each with a file of weights. Nothing is fetched, and no pickle is opened: a .pth is read as tensors alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from comfy.model_management import get_torch_device
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ...editing.gates.features import weights_digest
from ...editing.gates.packages import installed

RANK = 2048  # features of a picture: with fewer pictures than that, FID's covariances are not of full rank
RESAMPLES = 100  # of FID, each of which costs a decomposition
BATCH = 32


@dataclass(frozen=True)
class Distance:
    """An estimate with the 95 % interval of its bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """KID's polynomial kernel (x . y / d + 1)^3 of features [n, d] and [m, d]: [n, m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd(xx: Tensor, yy: Tensor, xy: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The unbiased squared MMD of samples that hold picture i a[i] times and picture j b[j] times.

    A picture is never compared with itself, nor with its copies in a resample: those would pass for likeness.
    """

    def within(k: Tensor, w: Tensor) -> Tensor:
        pairs = w[:, None] * w[None]
        pairs = pairs - pairs.diag().diag()
        return (k * pairs).sum() / pairs.sum()

    between = (xy * a[:, None] * b[None]).sum() / (a.sum() * b.sum())
    return within(xx, a) + within(yy, b) - 2 * between


def kid(x: Tensor, y: Tensor, resamples: int = 500, seed: int = 0) -> Distance:
    """Kernel inception distance (Binkowski et al. 2018) of two sets of features [n, d], [m, d], with its interval."""
    if min(len(x), len(y)) < 2:
        raise ValueError(f"KID compares two pictures of each kind at least, not {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    kernels = kernel(x, x), kernel(y, y), kernel(x, y)
    value = mmd(*kernels, torch.ones(len(x)).double(), torch.ones(len(y)).double())
    rng = torch.Generator().manual_seed(seed)

    def again(n: int) -> Tensor:
        return torch.bincount(torch.randint(n, (n,), generator=rng), minlength=n).double()

    spread = torch.stack([mmd(*kernels, again(len(x)), again(len(y))) for _ in range(resamples)])
    spread = spread[spread.isfinite()]  # a tiny set may be drawn as copies of one picture
    low, high = spread.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Distance(value.item(), low, high)


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, d] as their mean, and A with A^T A their covariance."""
    mean = x.mean(0)
    return mean, (x - mean) / (len(x) - 1) ** 0.5


def frechet(x: Tensor, y: Tensor) -> float:
    """||mu_1 - mu_2||^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) (Heusel et al. 2017) of features [n, d] and [m, d].

    With C_1 = A^T A and C_2 = B^T B, the root's trace is the sum of the singular values of A B^T.
    """
    (m1, A), (m2, B) = centred(x), centred(y)
    if len(x) > A.shape[1]:  # of d x d, which is smaller, one has the same
        A = root(A.T @ A)
    if len(y) > B.shape[1]:
        B = root(B.T @ B)
    cross = torch.linalg.svdvals(A @ B.T).sum()
    return float((m1 - m2).square().sum() + A.square().sum() + B.square().sum() - 2 * cross)


def root(C: Tensor) -> Tensor:
    """Of a covariance [d, d]."""
    values, Q = torch.linalg.eigh(C)
    return (Q * values.clamp_min(0).sqrt()) @ Q.T


def fid(x: Tensor, y: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Distance:
    """Frechet inception distance of two sets of features [n, d], [m, d].

    Resamples with return know fewer pictures and lie farther apart: the interval is their spread about their own mean,
    laid around the value.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"FID compares two pictures of each kind at least, not {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    rng = torch.Generator().manual_seed(seed)

    def again(a: Tensor) -> Tensor:
        return a[torch.randint(len(a), (len(a),), generator=rng)]

    value = frechet(x, y)
    spread = torch.tensor([frechet(again(x), again(y)) for _ in range(resamples)]).double()
    low, high = (spread - spread.mean()).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Distance(value, max(value + low, 0.0), value + high)


# --- networks --------------------------------------------------------------------------------------------------------


def tensors_of(file: Path) -> dict[str, Tensor]:
    """A file of weights, tensors and nothing else."""
    if not file.is_file():
        raise ValueError(f'there is no file of weights "{file}"')
    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # whatever a reader makes of a file that is none of its own
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f'"{file.name}" is no file of weights ({why}); give a state dict, best as safetensors'
        ) from None
    if not isinstance(found, Mapping) or not all(isinstance(each, Tensor) for each in found.values()):
        raise ValueError(f'"{file.name}" holds more than tensors; give a state dict')
    return dict(found)


@dataclass(frozen=True)
class Inception:
    """see: uint8 pictures [n, 3, h, w] to features [n, 2048]; key: of the weights."""

    key: str
    see: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, file: Path) -> Inception:
        """torch-fidelity's InceptionV3, which is the first FID's. It reads its weights as a pickle of anything: it is
        given what was read here, in a file of our own."""
        weights = tensors_of(file)
        build = installed("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        with tempfile.TemporaryDirectory() as folder:
            torch.save(weights, own := Path(folder) / "weights.pth")
            try:
                network = build("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(own))
            except RuntimeError as error:
                raise misfit(file, "torch-fidelity's InceptionV3", error) from None
        network.to(device := get_torch_device())
        return cls(weights_digest(weights), lambda pictures: network(pictures.to(device))[0])

    @torch.no_grad()
    def features(self, files: Sequence[Path], tick: Callable[[int], None] = lambda _: None) -> Tensor:
        """Of pictures of one size or of several: [n, 2048]. tick: is told how many are done."""
        out = []
        for i in range(0, len(files), BATCH):
            tick(i)
            shown = [pixels(file) for file in files[i : i + BATCH]]
            alike = len({picture.shape for picture in shown}) == 1
            out += [self.see(torch.stack(shown))] if alike else [self.see(each[None]) for each in shown]
        return torch.cat(out).float().cpu()


@dataclass(frozen=True)
class Perceptual:
    """LPIPS (Zhang et al. 2018), version 0.1 with AlexNet. see: two pictures [1, 3, h, w] in [-1, 1]."""

    key: str
    see: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, file: Path) -> Perceptual:
        """file: torchvision's AlexNet for ImageNet; the package brings its own linear layers."""
        lpips, weights = installed("lpips"), tensors_of(file)
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        named = {
            name: f"features.{name.split('.', 1)[1]}" for name in network.net.state_dict()
        }  # slice1.0 is features.0
        if missing := sorted(set(named.values()) - weights.keys()):
            raise ValueError(f'"{file.name}" is no AlexNet of torchvision (it has no {missing[0]}); give that')
        try:
            network.net.load_state_dict({name: weights[own] for name, own in named.items()})
        except RuntimeError as error:
            raise misfit(file, "AlexNet", error) from None
        key, device = weights_digest(network.state_dict()), get_torch_device()
        network.eval().to(device)
        return cls(key, lambda a, b: network(a.to(device), b.to(device)))

    @torch.no_grad()
    def between(self, a: Path, b: Path) -> float:
        return float(self.see(*(pixels(file)[None] / 127.5 - 1 for file in (a, b))))


def misfit(file: Path, what: str, error: Exception) -> ValueError:
    why = " ".join(str(error).split())[:200]
    return ValueError(f'"{file.name}" does not fit {what} ({why}); give the weights that were made for it')


def pixels(file: Path) -> Tensor:
    """A picture's bytes, uint8 [3, h, w]."""
    with Image.open(file) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).movedim(-1, 0)
