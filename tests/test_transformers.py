"""The demo's transformers: the twins that train, the host's sockets, and the training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.ldm.flux import math
from nodes import EmptyLatentImage, common_ksampler
from safetensors.torch import save_file
from torch import nn

from conceptguard.demo import load, model, train_flow, training, transformers, world
from conceptguard.demo.train_unet import TextEncoder
from conceptguard.nodes.concept import ConceptGuardConcept
from conceptguard.nodes.cre import ConceptGuardCRE
from conceptguard.nodes.demo import LoadDemo


def net(architecture: str) -> nn.Module:
    """Random weights everywhere, also where training begins silent."""
    torch.manual_seed(0)
    made = transformers.build(architecture)
    transformers.initialise(made)
    with torch.no_grad():
        for w in made.parameters():
            w += 0.05 * torch.randn_like(w)
    return made


def rope_learns() -> bool:
    """Whether this host's rotary positions have a gradient: its kernels of one version (core 0.8.0's) have none."""
    q = torch.randn(1, 1, 2, 4, requires_grad=True)
    try:
        math.apply_rope(q, q, math.rope(torch.arange(2.0)[None], 4, 10)[:, None])[0].sum().backward()
    except (RuntimeError, NotImplementedError):
        return False
    return q.grad is not None


@pytest.mark.parametrize("architecture", transformers.CONFIGS)
def test_what_trains_is_the_stock_forward(architecture: str) -> None:
    made = net(architecture).requires_grad_(True)
    x, t, context, pooled = torch.randn(2, 4, 16, 16), torch.rand(2), torch.randn(2, 77, 128), torch.randn(2, 128)
    with torch.no_grad():
        last = pooled if architecture == "flux" else 77
        stock = made(x.clone(), t, context.clone(), last, transformer_options={})
    found = transformers.flow(architecture, made, x, t, context, pooled)
    torch.testing.assert_close(found, stock, atol=1e-5, rtol=1e-4)
    assert stock.std() > 0.1
    if not rope_learns():
        pytest.skip("no training here: this host's rotary positions have no gradient")
    found.square().mean().backward()
    unused = [k for k, w in made.named_parameters() if w.grad is None]
    assert unused == ["norm_final.weight"] * hasattr(made, "norm_final")  # older hosts' Lumina keeps a norm for nothing


@pytest.mark.parametrize("architecture", transformers.CONFIGS)
def test_a_transformer_fits_into_12_mb(architecture: str) -> None:
    assert 2 * sum(w.numel() for w in transformers.build(architecture).parameters()) < 12e6


@pytest.mark.parametrize("architecture", transformers.CONFIGS)
def test_the_first_prediction_is_silent(architecture: str) -> None:
    torch.manual_seed(0)
    made = transformers.build(architecture)
    transformers.initialise(made)
    out = transformers.flow(
        architecture, made, torch.randn(1, 4, 16, 16), torch.rand(1), torch.randn(1, 77, 128), torch.randn(1, 128)
    )
    assert torch.isfinite(out).all() and not out.any()


def test_pooled_text_is_the_hosts() -> None:
    """At the first end of each prompt, as CLIP pools."""
    _, clip, _ = load.load()
    text = "a cat and a dog"
    (context, about), *_ = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    ids = torch.tensor([[t for t, _ in clip.tokenize(text)["l"][0]]])
    torch.testing.assert_close(train_flow.pooled(ids, context), about["pooled_output"])


def trainer(architecture: str = "flux", steps: int = 4) -> train_flow.FlowTrainer:
    rng = random.Random(0)
    pictures = [world.one_object(rng, "cat"), world.by_reference(rng, "dog", "noto")] * 4
    torch.manual_seed(0)
    data = {"latents": torch.randn(8, 4, 16, 16), "references": torch.zeros(4, 3, 64, 64, dtype=torch.uint8)}
    used = [model.START, model.END, *range(1, 12)]
    read_by = TextEncoder(used).requires_grad_(False), model.ReferenceEncoder().requires_grad_(False)
    return train_flow.FlowTrainer(architecture, pictures, data, read_by, lambda t: [len(w) for w in t.split()], steps)


@pytest.mark.slow
def test_training_resumes_as_if_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_flow, "BATCH", 2)
    training.run(straight := trainer(), tmp_path / "straight.pt")
    stopped = trainer()
    for _ in range(2):
        stopped.update()
    training.saved(tmp_path / "stopped.pt", stopped.state())
    training.run(resumed := trainer(), tmp_path / "stopped.pt")
    for (k, a), b in zip(straight.net.state_dict().items(), resumed.net.state_dict().values(), strict=True):
        assert torch.equal(a, b), k
    assert any(
        not torch.equal(a, b) for a, b in zip(straight.average.values(), trainer().average.values(), strict=True)
    )


def test_the_loss_is_of_the_flow_from_picture_to_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that knew the picture would have none."""
    made = trainer()
    seen = {}

    def perfect(architecture, net, x, t, context, pooled):
        seen.update(x=x, t=t)
        at = t.view(-1, 1, 1, 1)
        picture = made.latents[0]
        return (x - picture) / at  # x = (1 - t) picture + t noise: (x - picture) / t = noise - picture

    made.latents = made.latents[:1].expand(8, -1, -1, -1)
    monkeypatch.setattr(train_flow, "flow", perfect)
    assert made.loss().item() < 1e-4
    assert ((seen["t"] > 0) & (seen["t"] < 1)).all()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, where the weights of transformers are looked for."""
    monkeypatch.setattr(load, "WEIGHTS", tmp_path)
    return tmp_path


def loaded(architecture: str) -> Any:
    """The node's MODEL, CLIP and VAE, of random weights."""
    weights = {f"unet.{k}": v.detach().half() for k, v in net(architecture).state_dict().items()}
    save_file(weights, load.transformer_file(architecture))
    return LoadDemo.execute(architecture).args


@pytest.mark.parametrize("architecture", transformers.CONFIGS)
def test_the_host_samples_a_transformer(architecture: str, folder: Path) -> None:
    """Euler from noise along a flow, with the demo's text encoder and autoencoder, and the schedule it trained with."""
    unet, clip, vae = loaded(architecture)
    assert type(unet.model.diffusion_model).__name__ == {"flux": "Flux", "lumina": "NextDiT"}[architecture]
    sampling = unet.get_model_object("model_sampling")
    assert sampling.sigma_max == pytest.approx(1) and sampling.sigma(torch.tensor(0.5)) == pytest.approx(
        1.8 * 0.5 / (1 + 0.8 * 0.5), abs=1e-3
    )
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a cat", ""))
    latent = EmptyLatentImage().generate(128, 128, 2)[0]
    (made,) = common_ksampler(unet, 1, 2, 4.0, "euler", "simple", positive, negative, latent)
    z = made["samples"]
    assert z.shape == (2, 4, 16, 16) and torch.isfinite(z).all() and z.std() > 0.1
    assert vae.decode(z).shape == (2, 128, 128, 3)
    known = load.load_unet(load.read(load.MODEL_FILE)).get_model_object("latent_format")
    assert unet.get_model_object("latent_format").latent_rgb_factors == known.latent_rgb_factors


@pytest.mark.parametrize("architecture", transformers.CONFIGS)
def test_an_edit_acts_in_a_transformer(architecture: str, folder: Path) -> None:
    """Of a concept made with its own CLIP, in all blocks, as the account says."""
    unet, clip, _ = loaded(architecture)
    (concept,) = ConceptGuardConcept.execute(clip, "a cat", "").args
    edited = ConceptGuardCRE.execute(unet, concept, 1.0, 0.0, 1.0, "all", floor=0.0, evidence="position").args[0]
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a cat", ""))
    latent = EmptyLatentImage().generate(128, 128, 1)[0]
    plain, made = (
        common_ksampler(each, 1, 2, 4.0, "euler", "simple", positive, negative, latent)[0]["samples"]
        for each in (unet, edited)
    )
    assert not torch.allclose(made, plain, atol=1e-3)


def test_an_architecture_without_weights_says_what_to_do(folder: Path) -> None:
    assert LoadDemo.fingerprint_inputs("flux") == LoadDemo.fingerprint_inputs()
    with pytest.raises(ValueError, match=r'Load Demo Model: architecture is "flux", .*demo-flux.* set it to unet'):
        LoadDemo.execute("flux")
    loaded("flux")
    assert LoadDemo.fingerprint_inputs("flux") != LoadDemo.fingerprint_inputs()


def test_transformer_weights_that_do_not_fit_name_the_file() -> None:
    with pytest.raises(load.WeightsError, match=r"demo-flux\.safetensors do not fit"):
        load.load_transformer("flux", {}, load.read(load.MODEL_FILE), Path("demo-flux.safetensors"))


@pytest.mark.parametrize("architecture", transformers.CONFIGS)
def test_the_shipped_weights_fit_the_host(architecture: str) -> None:
    """Newer ones call a norm's weights otherwise, and have left an unused norm away."""
    unet, *_ = load.load(architecture=architecture)
    assert all(torch.isfinite(w).all() and w.abs().any() for w in unet.model.diffusion_model.parameters())
