"""The demo model's autoencoder: ComfyUI's `TAESD`, which has no normalisation and so keeps a flat background's colour.

The encoder is not trained but written down: it is exactly the linear map of each 8x8 patch onto its four principal
components. The decoder is trained to draw sharp glyphs from those 16x16 latents, as a super-resolution net would.
"""

from __future__ import annotations

import time
from collections.abc import Callable

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

    Each stride-2 convolution uses four of its nine taps, so three of them read exactly one 8x8 patch. Residual branches
    are zero. A signed number crosses a ReLU as the pair (x, -x), since relu(x) - relu(-x) = x.
    """
    for w in vae.taesd_encoder.parameters():
        w.zero_()
    first, *downs, last = [m for m in vae.taesd_encoder if isinstance(m, nn.Conv2d)]
    first.weight[:3, :, 1, 1] = torch.eye(3)
    taps = [(1, 1), (1, 2), (2, 1), (2, 2)]
    # P as functionals of [4 components x 4 quadrants, 2x2 block, 2x2 pixel x rgb]
    f = p.view(4, 3, 2, 2, 2, 2, 2, 2).permute(0, 2, 5, 3, 6, 4, 7, 1).reshape(16, 4, 12) / CALM
    for i, (dy, dx) in enumerate(taps):
        downs[0].weight[3 * i : 3 * i + 3, :3, dy, dx] = torch.eye(3)  # 2x2 blocks of non-negative pixels: 12 channels
        downs[1].weight[:16, :12, dy, dx], downs[1].weight[16:32, :12, dy, dx] = f[:, i], -f[:, i]
        for k in range(4):
            signs = torch.tensor([1.0, -1.0])
            downs[2].weight[k, [4 * k + i, 16 + 4 * k + i], dy, dx] = signs
            downs[2].weight[4 + k, [4 * k + i, 16 + 4 * k + i], dy, dx] = -signs
    last.weight[:, :4, 1, 1], last.weight[:, 4:8, 1, 1] = torch.eye(4), -torch.eye(4)
    last.bias.copy_(-p @ mean / CALM)
    vae.vae_scale.fill_(SD_SCALE / CALM)
    vae.vae_shift.zero_()


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


def crop(pixels: Tensor, latents: Tensor, batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Random squares of `size` latents and what they show, in [0, 1]."""
    which = torch.randint(len(pixels), (batch,)).tolist()
    at = torch.randint(latents.shape[-1] - size + 1, (batch, 2)).tolist()
    z = torch.stack([latents[i, :, y : y + size, x : x + size] for i, (y, x) in zip(which, at, strict=True)])
    x = torch.stack(
        [pixels[i, :, 8 * y : 8 * (y + size), 8 * x : 8 * (x + size)] for i, (y, x) in zip(which, at, strict=True)]
    )
    return z.float(), x.float() / 255


def train_decoder(
    vae: nn.Module,
    pixels: Tensor,
    latents: Tensor,
    steps: int,
    seed: int = 0,
    batch: int = 6,
    lr: float = 1e-3,
    noise: float = 0.2,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Fit the decoder to (latents, pixels): squares first, whole pictures in the last fifth.

    Noise on the latents makes it forgive a sampler's errors. Convolutions compute in bf16.
    """
    torch.manual_seed(seed)
    decoder = vae.taesd_decoder.requires_grad_(True)
    for block in decoder:
        if hasattr(block, "fuse"):
            nn.init.zeros_(block.conv[-1].weight)
    opt = torch.optim.AdamW(decoder.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.05)
    start, shown = time.time(), 0.0
    for step in range(steps):
        whole = step >= 0.8 * steps
        z, x = crop(pixels, latents, batch // 2 if whole else batch, 16 if whole else 10)
        z = z + noise * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
        with torch.autocast("cpu", torch.bfloat16):
            y = decoder(z / CALM)
        loss = reconstruction_loss(y.float(), x)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        opt.step()
        schedule.step()
        shown = 0.98 * shown + 0.02 * loss.item() if step else loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"decoder {step}/{steps} loss {shown:.4f} {time.time() - start:.0f}s", flush=True)
            save()
    decoder.requires_grad_(False)
