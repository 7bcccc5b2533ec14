"""Train the demo model's decoder, or encoder and decoder together, on drawings painted as they are needed.

An encoder that learns starts as the written one (the principal components of each 8x8 patch) and learns what its silent
residual branches may add; it is held near where it began, so that a UNet of the old latents soon reads the new.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from . import world
from .autoencoder import CALM, FINE, SD_SCALE, blocks_of, halves, reconstruction_loss
from .glyphs import Painter
from .measures import psnr, ssim
from .training import cosine, device, dice, step_with, throw

NEAR = 0.02  # the weight of the squared distance to the written encoder's latents
NOISE = 0.2  # the most that is added to latents, so that the decoder forgives a sampler's errors
LEARN, LEARN_ON = 1e-3, 4e-4  # peak learning rates: of a fresh decoder, of a trained one
REDRAWN = 0.5  # the share of steps whose latents a UNet gives back, where there is one
ANY_GROUND = 0.15  # the share of steps whose backgrounds are of any colour, so that every flat colour keeps its own
SQUARE, BATCH = 80, 6  # pixels of the crops that most steps see, and how many
WHOLE = 0.8  # from this share of the steps on, whole pictures


@torch.no_grad()
def silence(layers: nn.Sequential) -> None:
    """Residual branches with random first layers and silent last ones."""
    for block in layers:
        if hasattr(block, "fuse"):
            for conv in block.conv:
                if isinstance(conv, nn.Conv2d):
                    nn.Conv2d.reset_parameters(conv)
            nn.init.zeros_(block.conv[-1].weight)
            nn.init.zeros_(block.conv[-1].bias)


@torch.no_grad()
def let_learn(vae: nn.Module) -> None:
    """Silent branches that can learn from FINE on; the latents stay as they are."""
    encoder = halves(vae)[0][FINE:]
    assert isinstance(encoder, nn.Sequential)
    silence(encoder)
    down = [m for m in encoder if isinstance(m, nn.Conv2d)][-2]
    nn.init.kaiming_uniform_(free := torch.empty_like(down.weight[8:]), a=math.sqrt(5))
    down.weight[8:] = free  # channels that the last convolution does not read yet


def written(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """What `write_encoder` put into the last stride-2 convolution [8, 64, 3, 3] and the last bias [4]."""
    *_, down, last = [m for m in halves(vae)[0] if isinstance(m, nn.Conv2d)]
    assert last.bias is not None
    return down.weight.detach()[:8].clone(), last.bias.detach().clone()


class AutoencoderTrainer:
    """The layers that learn, their optimiser, and the drawings' random numbers: all that a checkpoint holds."""

    def __init__(
        self,
        vae: nn.Module,
        painter: Painter,
        steps: int,
        seed: int = 0,
        lr: float = LEARN_ON,
        encoder_learns: bool = False,
        redraw: Callable[[list[world.Picture], Tensor], Tensor] | None = None,
        batch: int = BATCH,
    ) -> None:
        torch.manual_seed(seed)
        self.batch = batch
        self.lr, self.redraw = lr, redraw
        self.vae, self.painter, self.steps, self.step, self.rng = vae, painter, steps, 0, random.Random(seed)
        self.written = written(vae)
        self.encoder, self.decoder = halves(vae)[0][FINE:], halves(vae)[1]
        if encoder_learns:
            let_learn(vae)
        learning = nn.ModuleList([self.encoder] * encoder_learns + [self.decoder]).requires_grad_(True)
        self.learning = list(learning.parameters())
        self.opt = torch.optim.AdamW(self.learning, lr=lr, betas=(0.9, 0.99), weight_decay=0)

    def drawings(self) -> tuple[list[world.Picture], Tensor]:
        """Whole pictures in [0, 1]; fewer in the last steps, which learn from the whole."""
        count = self.batch // 2 if self.step >= WHOLE * self.steps else self.batch
        pictures = [world.any_picture(self.rng) for _ in range(count)]
        x = torch.stack([self.painter(p) for p in pictures])
        if self.rng.random() < ANY_GROUND:
            for picture, p in zip(x, pictures, strict=True):
                there = (picture == self.painter.paint((), p.background)).all(0)
                picture[:, there] = torch.rand(3, 1, device=x.device)
        return pictures, x.to(device())

    def cropped(self, x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same squares of pictures and, if they are known, of their latents; in the last steps all of them."""
        if self.step >= WHOLE * self.steps:
            return x, z
        n = SQUARE // 8
        at = [[self.rng.randint(0, (world.SIZE - SQUARE) // 8) for _ in range(2)] for _ in x]
        squares = torch.stack(
            [a[:, 8 * v : 8 * v + SQUARE, 8 * u : 8 * u + SQUARE] for a, (v, u) in zip(x, at, strict=True)]
        )
        if z is None:
            return squares, None
        return squares, torch.stack([a[:, v : v + n, u : u + n] for a, (v, u) in zip(z, at, strict=True)])

    def before(self, blocks: Tensor) -> Tensor:
        """The written encoder's latents, divided by CALM as the decoder reads them."""
        weight, bias = self.written
        signed = conv2d(blocks, weight, stride=2, padding=1)
        return signed[:, :4] + bias.view(1, 4, 1, 1)

    def update(self) -> Tensor:
        pictures, x = self.drawings()
        given = None
        if self.redraw and self.rng.random() < REDRAWN:
            given = self.redraw(pictures, CALM * self.before(blocks_of(x))) / CALM
        x, given = self.cropped(x, given)
        blocks = blocks_of(x)
        with torch.autocast(device().type, torch.bfloat16):
            z = self.encoder(blocks).float() if given is None else given
            noise = NOISE / CALM * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
            y = self.decoder(z + noise)
        loss = reconstruction_loss(y.float(), x)
        near = 0 if given is not None else NEAR * (CALM * (z - self.before(blocks))).square().mean()
        (loss + near).backward()
        nn.utils.clip_grad_norm_(self.learning, 1.0)
        step_with(self.opt, cosine(self.step, self.steps, self.lr))
        self.step += 1
        return loss.detach()

    def state(self) -> dict[str, Any]:
        return dice(self.rng) | {
            "step": self.step,
            "vae": self.vae.state_dict(),
            "written": self.written,
            "opt": self.opt.state_dict(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        self.step, self.written = state["step"], tuple(w.to(device()) for w in state["written"])
        self.vae.load_state_dict(state["vae"])
        self.opt.load_state_dict(state["opt"])
        throw(state, self.rng)


@torch.no_grad()
def quality(vae: nn.Module, painter: Painter, count: int = 200, seed: int = 4242) -> dict[str, float]:
    """PSNR and SSIM of held-out drawings through encoder and decoder, and the largest error of a flat colour's mean."""
    rng = random.Random(seed)
    x = torch.stack([painter(world.any_picture(rng)) for _ in range(count)]).to(device())
    flat = (
        torch.rand(32, 3, 1, 1, device="cpu", generator=torch.Generator("cpu").manual_seed(seed))
        .to(x)
        .expand(-1, -1, 64, 64)
    )

    def back(x: Tensor) -> Tensor:
        return torch.cat([vae.decode(vae.encode(part * 2 - 1)) for part in x.split(8)]).add(1).div(2).clamp(0, 1)

    y, z = back(x), torch.cat([vae.encode(part * 2 - 1) * SD_SCALE for part in x.split(8)])
    return {
        "PSNR": psnr(y, x).mean().item(),
        "SSIM": ssim(y, x).mean().item(),
        "flat colours": (back(flat) - flat).abs().flatten(1).mean(1).max().item(),
        "latents' deviation": z.std().item(),
    }
