"""The demo model's autoencoder: ComfyUI's `TAESD`, which has no normalisation and so keeps a flat background's colour.

The encoder is first written down: it is exactly the linear map of each 8x8 patch onto its four principal components.
From there it and the decoder, which draws sharp glyphs from 16x16 latents, learn together (train_autoencoder.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, unfold

from . import world
from .glyphs import Painter

SD_SCALE = 0.18215  # SD1's latent format: latents times this have unit variance
CALM = 3.0  # the decoder's input is tanh(x / 3) * 3: latents are divided by this to stay where that is nearly straight


def build() -> nn.Module:
    from comfy.taesd.taesd import TAESD

    return TAESD(latent_channels=4)


def halves(vae: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """The encoder's and the decoder's layers, in plain Sequentials: the classes of newer hosts cannot be sliced."""
    encoder, decoder = vae.get_submodule("taesd_encoder"), vae.get_submodule("taesd_decoder")
    assert isinstance(encoder, nn.Sequential) and isinstance(decoder, nn.Sequential)
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


def initialise(module: nn.Module) -> None:
    """The host's layers skip their initialisation (they expect a checkpoint): run torch's own."""
    for m in module.modules():
        for base in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding):
            if isinstance(m, base):
                base.reset_parameters(m)  # type: ignore[arg-type]


def paint_set(painter: Painter, pictures: list[world.Picture]) -> Tensor:
    """The pictures' pixels, uint8 [n, 3, SIZE, SIZE]."""
    return torch.stack([(painter(p) * 255).round().to(torch.uint8) for p in pictures])


def patches(pixels: Tensor) -> Tensor:
    """uint8 [n, 3, SIZE, SIZE] to its 8x8 patches in [0, 1]: [n, 192, (SIZE/8)^2]."""
    return unfold(pixels.float() / 255, 8, stride=8)


def principal_components(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The whitened projection P [4, 192] and mean m [192] of the patches: P (x - m) has unit covariance."""
    x = patches(pixels).permute(1, 0, 2).flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(x))
    return (vectors[:, -4:].flip(1) * values[-4:].flip(0).rsqrt()).T.float(), x.mean(1).float()


def encode(pixels: Tensor, p: Tensor, mean: Tensor) -> Tensor:
    """What the written encoder does, as one matrix product; in the sampler's units: [n, 4, SIZE/8, SIZE/8]."""
    z = torch.einsum("kd,ndl->nkl", p, patches(pixels) - mean[:, None])
    return z.unflatten(2, (world.SIZE // 8, -1))


@torch.no_grad()
def write_encoder(vae: nn.Module, p: Tensor, mean: Tensor) -> None:
    """Write z = P (x - m) / CALM into the stock encoder's weights, and the units of the sampler around it.

    Each stride-2 convolution uses four of its nine taps, so three of them read exactly one 8x8 patch: the first two lay
    a 4x4 block's 48 numbers side by side (`FINE`), the third weighs them. Residual branches are zero. A signed number
    crosses a ReLU as the pair (x, -x), since relu(x) - relu(-x) = x.
    """
    for w in vae.taesd_encoder.parameters():
        w.zero_()
    first, *downs, last = [m for m in vae.taesd_encoder if isinstance(m, nn.Conv2d)]
    first.weight[:3, :, 1, 1] = torch.eye(3)
    # P as functionals of the four 4x4 blocks, each in the order of FINE: [4 components, 4 blocks, 48]
    f = p.view(4, 3, 2, 2, 2, 2, 2, 2).permute(0, 2, 5, 3, 6, 4, 7, 1).reshape(4, 4, 48) / CALM
    for i, (dy, dx) in enumerate([(1, 1), (1, 2), (2, 1), (2, 2)]):
        downs[0].weight[3 * i : 3 * i + 3, :3, dy, dx] = torch.eye(3)
        downs[1].weight[12 * i : 12 * i + 12, :12, dy, dx] = torch.eye(12)
        downs[2].weight[:4, :48, dy, dx], downs[2].weight[4:8, :48, dy, dx] = f[:, i], -f[:, i]
    last.weight[:, :4, 1, 1], last.weight[:, 4:8, 1, 1] = torch.eye(4), -torch.eye(4)
    last.bias.copy_(-p @ mean / CALM)
    vae.vae_scale.fill_(SD_SCALE / CALM)
    vae.vae_shift.zero_()


FINE = 7  # the encoder's first layer that reads 4x4 blocks; those before it only lay pixels side by side


def blocks_of(x: Tensor) -> Tensor:
    """What a written encoder's layers before FINE make of pixels [n, 3, h, w] in [0, 1]: [n, 64, h/4, w/4]."""
    n, _, h, w = x.shape
    x = x.view(n, 3, h // 4, 2, 2, w // 4, 2, 2).permute(0, 3, 6, 4, 7, 1, 2, 5).reshape(n, 48, h // 4, w // 4)
    return torch.cat([x, x.new_zeros(n, 16, h // 4, w // 4)], 1)


def encode_with(vae: nn.Module, x: Tensor) -> Tensor:
    """The encoder's latents of pixels in [0, 1], in the sampler's units, without the layers that only move pixels."""
    return halves(vae)[0][FINE:](blocks_of(x)) * CALM


@torch.no_grad()
def read_encoder(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """P and an m of a written encoder: it is linear, so black and each single bright value of a patch tell them."""
    probes = torch.cat([torch.zeros(1, 192), torch.eye(192)]).view(193, 3, 8, 8)
    z = vae.encode(2 * probes - 1).flatten(1) * SD_SCALE
    p = (z[1:] - z[0]).T
    return p, -torch.linalg.pinv(p) @ z[0]


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 of pixels and of their differences: the second keeps outlines sharp without a perceptual net."""
    return l1_loss(y, x) + sum(l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
