"""The demo model's autoencoder: what is written, what may learn, and the training of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from conceptguard.demo import autoencoder, redraw, train_autoencoder, train_unet, training, world
from conceptguard.demo.autoencoder import FINE, SD_SCALE, halves


@pytest.fixture
def vae() -> nn.Module:
    torch.manual_seed(0)
    vae = autoencoder.build().requires_grad_(False)
    autoencoder.initialise(vae)
    autoencoder.write_encoder(vae, torch.randn(4, 192) / 8, torch.rand(192))
    return vae


def test_the_layers_before_the_learning_ones_only_move_pixels(vae: nn.Module) -> None:
    x = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(autoencoder.blocks_of(x), halves(vae)[0][:FINE](x))
        stock = vae.encode(2 * x - 1) * SD_SCALE
        torch.testing.assert_close(autoencoder.encode_with(vae, x), stock, atol=1e-5, rtol=1e-5)


def test_branches_that_may_learn_begin_silent(vae: nn.Module) -> None:
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = autoencoder.encode_with(vae, x)
        train_autoencoder.let_learn(vae)
        torch.testing.assert_close(autoencoder.encode_with(vae, x), before)
        block = halves(vae)[0][FINE]
        assert block.conv[0].weight.abs().max() > 0 and not block.conv[-1].weight.any()


class Painter:
    """Any colours at all."""

    def __call__(self, picture: world.Picture) -> torch.Tensor:
        return torch.rand(3, world.SIZE, world.SIZE)

    def paint(self, layers: tuple[()], background: str) -> torch.Tensor:
        return torch.zeros(3, world.SIZE, world.SIZE)


def trainer(steps: int, encoder_learns: bool = True) -> train_autoencoder.AutoencoderTrainer:
    torch.manual_seed(0)
    vae = autoencoder.build().requires_grad_(False)
    autoencoder.initialise(vae)
    autoencoder.write_encoder(vae, torch.randn(4, 192) / 8, torch.rand(192))
    return train_autoencoder.AutoencoderTrainer(vae, Painter(), steps, encoder_learns=encoder_learns)  # type: ignore[arg-type]


def test_training_resumes_as_if_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_autoencoder, "SQUARE", 32)
    monkeypatch.setattr(train_autoencoder, "BATCH", 2)
    monkeypatch.setattr(train_autoencoder, "WHOLE", 2.0)
    training.run(straight := trainer(4), tmp_path / "straight.pt")
    stopped = trainer(4)
    for _ in range(2):
        stopped.update()
    training.saved(tmp_path / "stopped.pt", stopped.state())
    training.run(resumed := trainer(4), tmp_path / "stopped.pt")
    for (k, a), b in zip(straight.vae.state_dict().items(), resumed.vae.state_dict().values(), strict=True):
        assert torch.equal(a, b), k
    first = trainer(4).vae.state_dict()
    moved = {k for k, a in straight.vae.state_dict().items() if not torch.equal(a, first[k])}
    assert {f"taesd_encoder.{FINE}.conv.4.weight", "taesd_encoder.14.weight"} <= moved  # both halves learn ...
    assert any(k.startswith("taesd_decoder") for k in moved)
    assert not any(
        k.startswith(f"taesd_encoder.{i}.") for k in moved for i in range(FINE)
    )  # ... behind the written part


def test_a_training_that_diverged_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = trainer(4)
    monkeypatch.setattr(broken, "update", lambda: torch.tensor(torch.nan))
    with pytest.raises(RuntimeError, match="the loss is nan"):
        training.run(broken, tmp_path / "autoencoder.pt")
    assert not list(tmp_path.iterdir())


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [training.cosine(step, 100, 1.0) for step in range(100)]
    assert rates[0] < rates[2] < rates[4] and max(rates) <= 1 and rates[-1] < 0.01
    assert all(a >= b for a, b in zip(rates[5:], rates[6:], strict=False))


def test_a_decoder_learns_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_autoencoder, "SQUARE", 32)
    alone = trainer(2, encoder_learns=False)
    before = {k: v.clone() for k, v in alone.vae.state_dict().items()}
    alone.update()
    moved = {k for k, v in alone.vae.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith("taesd_decoder.") for k in moved)


def test_a_decoder_learns_from_redrawn_latents_of_the_same_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the UNet gives back is cropped with the pictures that it should become."""
    monkeypatch.setattr(train_autoencoder, "SQUARE", 32)
    monkeypatch.setattr(train_autoencoder, "REDRAWN", 1.0)
    monkeypatch.setattr(train_autoencoder, "NOISE", 0.0)
    alone, seen = trainer(10, encoder_learns=False), {}

    def redraw(pictures: list[world.Picture], z: torch.Tensor) -> torch.Tensor:
        assert len(pictures) == len(z) and z.shape[1:] == (4, 16, 16)
        return z

    def watched(z: torch.Tensor) -> torch.Tensor:
        seen["z"] = z
        return autoencoder.halves(alone.vae)[1](z)

    def compared(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen["x"] = x
        return y.mean()

    alone.redraw, alone.decoder = redraw, watched  # type: ignore[assignment]
    monkeypatch.setattr(train_autoencoder, "reconstruction_loss", compared)
    alone.update()
    with torch.no_grad():
        expected = autoencoder.encode_with(alone.vae, seen["x"]) / autoencoder.CALM
    torch.testing.assert_close(seen["z"], expected, atol=1e-4, rtol=1e-4)


def test_redrawn_latents_are_the_unets_clean_ones() -> None:
    """A UNet that predicts nothing gives back the noised latents, scaled: what it adds is its prediction."""
    rng = random.Random(0)
    token = 5
    pictures = [world.one_object(rng, "cat")]
    unet = train_unet.Trainer(
        pictures,
        torch.zeros(1, 4, 16, 16),
        torch.zeros(0, 3, 64, 64, dtype=torch.uint8),
        lambda t: [token] * len(t.split()),
        steps=1,
    )
    again = redraw.Redraw(unet.state(), lambda t: [token] * len(t.split()))
    z = torch.full((3, 4, 16, 16), 2.0)
    torch.manual_seed(1)
    back = again(pictures * 3, z)  # its output layer is silent at first
    error = (back - z).flatten(1).std(1)
    assert ((back - z).flatten(1).mean(1).abs() < 0.2 * error + 0.05).all() and (error > 0.1).all()
