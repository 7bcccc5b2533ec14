"""`make train-demo`: latents, and weights files from checkpoints as they stand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conceptguard.demo import autoencoder, load, mix, model, train, train_flow, train_unet, training, world
from conceptguard.demo.train import Stages


class Painter:
    """A picture as its background, with a grey square a layer."""

    def __call__(self, picture: world.Picture) -> Tensor:
        x = torch.tensor(world.BACKGROUNDS[picture.background]).float().div(255).view(3, 1, 1).repeat(1, 128, 128)
        for i, layer in enumerate(picture.layers):
            grey = (int(layer.glyph[:4], 16) % 97) / 97
            x[:, layer.y : layer.y + layer.size, layer.x : layer.x + layer.size] = grey + 0.01 * i
        return x


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    made = Stages(tmp_path, tmp_path / "weights", {}, go_on=True)
    vars(made)["painter"] = Painter()
    return made


def test_latents_are_the_encoders_of_every_picture(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "PICTURES", 60)
    data = stages.latents()
    rng = random.Random(train.SEED)
    pictures = [mix.any_picture(rng) for _ in range(60)]
    assert pictures == stages.pictures
    x = torch.stack([Painter()(p) for p in pictures])
    with torch.no_grad():
        expected = autoencoder.encode_with(stages.first_autoencoder(), (x * 255).round() / 255)
    torch.testing.assert_close(data["latents"].float(), expected, atol=5e-3, rtol=5e-3)
    assert len(data["references"]) == sum(p.reference is not None for p in pictures) > 0
    monkeypatch.setattr(autoencoder, "encode", None)  # the second time they are read
    assert torch.equal(stages.latents()["latents"], data["latents"])


@pytest.mark.slow
def test_weights_are_of_the_checkpoints_as_they_stand(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load.read(load.MODEL_FILE)
    token = int(tensors["used"][5])
    rng = random.Random(0)
    pictures, data = [world.one_object(rng, "cat")], torch.zeros(1, 4, 16, 16)
    shown = torch.zeros(0, 3, 64, 64, dtype=torch.uint8)
    unet = train_unet.Trainer(pictures, data, shown, lambda t: [token] * len(t.split()), steps=1)
    unet.average["unet.out.2.bias"].fill_(0.25)
    training.saved(stages.folder / "unet.pt", unet.state())
    read_by = train_unet.TextEncoder(unet.text.used), model.ReferenceEncoder()
    both = {"latents": data, "references": shown}
    flux = train_flow.FlowTrainer("flux", pictures, both, read_by, lambda t: [token] * len(t.split()), 9)
    flux.average["img_in.bias"].fill_(0.5)
    training.saved(stages.folder / "flux.pt", flux.state())
    stages.write()
    assert "wrote demo-flux.safetensors, demo-model.safetensors into" in capsys.readouterr().out
    path = stages.weights / load.MODEL_FILE.name
    demo, _, vae = load.load(path)
    assert demo.model.diffusion_model.out[2].bias.eq(0.25).all()
    x = torch.rand(1, 128, 128, 3)
    assert vae.encode(x).shape == (1, 4, 16, 16)
    file = stages.weights / load.transformer_file("flux").name
    assert file.stat().st_size < 12e6 and not (stages.weights / load.WITNESS_FILE.name).exists()
    weights = load.part(load.read(file), "unet.")
    made = load.load_transformer("flux", weights, load.read(path), file)
    assert made.model.diffusion_model.img_in.bias.eq(0.5).all()
