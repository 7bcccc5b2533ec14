"""The demo world, its model's weights files and its stock sockets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conceptguard.demo import autoencoder, glyphs, load, model, train_unet, training, world
from conceptguard.demo.judge import HEADS, Judge, judge


def test_the_world_holds_what_the_papers_need() -> None:
    assert len(world.OBJECTS) >= 60 and len(world.NAMED_STYLES) >= 3 and len(world.BACKGROUNDS) >= 6
    assert len(world.ROLES) >= 10 and len(world.GENDERS) == 2 and len(world.TONES) == 5 and len(world.SCENES) >= 6
    assert set(world.ERASED) <= set(world.OBJECTS) and set(world.NEIGHBOURS.values()) <= set(world.OBJECTS)


def test_a_scene_shows_what_its_caption_does_not_name() -> None:
    rng = random.Random(0)
    for word, (_, concept) in world.SCENES.items():
        picture = world.scene(rng, word, "noto", "blue")
        assert picture.objects == (concept,)
        assert not set(concept.split()) & set(picture.caption.split())


def test_pictures_are_a_seed_and_lie_on_the_latent_grid() -> None:
    first, again = ([world.any_picture(rng) for _ in range(200)] for rng in (random.Random(3), random.Random(3)))
    assert first == again
    assert all(v % 8 == 0 for p in first for layer in p.layers for v in (layer.x, layer.y, layer.size))


def test_bare_roles_are_biased() -> None:
    rng = random.Random(1)
    people = [world.person(rng, "judge") for _ in range(300)]
    assert sum(p.gender == "man" for p in people) > 0.85 * 300
    assert all(world.person(rng, "judge", gender="woman").gender == "woman" for _ in range(20))


def test_the_written_encoder_is_the_principal_components() -> None:
    """Through the stock class's convolutions and ReLUs, against one matrix product."""
    torch.manual_seed(0)
    p, mean = torch.randn(4, 192) / 8, torch.rand(192)
    pixels = torch.randint(0, 256, (2, 3, world.SIZE, world.SIZE), dtype=torch.uint8)
    vae = autoencoder.build()
    autoencoder.initialise(vae)
    autoencoder.write_encoder(vae, p, mean)
    with torch.no_grad():
        found = vae.encode(pixels.float() / 127.5 - 1) * autoencoder.SD_SCALE
    x = pixels.double().div(255).view(2, 3, 16, 8, 16, 8).permute(0, 2, 4, 1, 3, 5).flatten(3)
    expected = ((x - mean.double()) @ p.double().T).permute(0, 3, 1, 2)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(autoencoder.encode(pixels, p, mean).double(), expected, atol=1e-4, rtol=0)
    again, shift = autoencoder.read_encoder(vae)
    torch.testing.assert_close(again, p, atol=1e-4, rtol=0)
    torch.testing.assert_close(autoencoder.encode(pixels, again, shift).double(), expected, atol=1e-3, rtol=0)


def test_the_trained_text_encoder_is_the_stock_one() -> None:
    """The trainer's out-of-place forward against the host's CLIP, with image tokens among the words."""
    import comfy.ops
    from comfy.clip_model import CLIPTextModel

    torch.manual_seed(0)
    used = [model.START, model.END, 5, 6, 7]
    trained = train_unet.TextEncoder(used)
    stock = CLIPTextModel(model.TEXT_CONFIG, torch.float32, "cpu", comfy.ops.manual_cast)
    table = torch.zeros(model.VOCABULARY, model.WIDTH)
    table[torch.tensor(used)] = trained.rows.detach()
    weights = trained.clip.state_dict() | {"text_model.embeddings.token_embedding.weight": table}
    stock.load_state_dict(weights)
    shown = torch.randn(1, model.IMAGE_TOKENS, model.WIDTH)
    ids = model.split_reference(lambda text: [5, 6] if text else [], "a <image>", [train_unet.IMAGE] * 4)
    embeds = table[torch.tensor(ids).clamp(min=0)]
    embeds[3:7] = shown[0]
    with torch.no_grad():
        found = trained(torch.tensor([ids]), shown)
        expected = stock(None, embeds=embeds[None].clone(), num_tokens=[8])[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_reference_stands_in_its_place_and_prompts_stay_77_long() -> None:
    assert model.split_reference(lambda t: [1] * len(t.split()), "a <image> b c", ["x", "y"])[:7] == [
        model.START,
        1,
        "x",
        "y",
        1,
        1,
        model.END,
    ]
    long = model.split_reference(lambda t: [1] * len(t.split()), "w " * 200, [])
    assert len(long) == model.TOKENS and long[-1] == model.END
    with pytest.raises(ValueError, match="once"):
        model.split_reference(lambda t: [], "<image> <image>", [])


@pytest.mark.slow
def test_training_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    def trainer() -> train_unet.Trainer:
        rng = random.Random(0)
        pictures = [world.one_object(rng, "cat"), world.by_reference(rng, "dog", "noto")] * 4
        torch.manual_seed(0)
        shown = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
        return train_unet.Trainer(
            pictures, torch.randn(8, 4, 16, 16), shown, lambda t: [len(w) for w in t.split()], 4, batch=2
        )

    training.run(straight := trainer(), tmp_path / "straight.pt")
    stopped = trainer()
    for _ in range(2):
        stopped.update()
    training.saved(tmp_path / "stopped.pt", stopped.state())
    training.run(resumed := trainer(), tmp_path / "stopped.pt")
    for (k, a), b in zip(straight.master.state_dict().items(), resumed.master.state_dict().values(), strict=True):
        assert torch.equal(a, b), k


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "damaged"),
        (lambda path: path.write_bytes(b"\x80\x04pickle" * 50), "damaged"),
        (lambda path: save_file({"unet.x": torch.tensor([float("nan")])}, path), "finite"),
        (lambda path: save_file({"latent_rgb": torch.zeros(5, 3), "unet.x": torch.zeros(1)}, path), "fit|lack"),
    ],
    ids=["missing", "truncated", "pickle", "nan", "foreign"],
)
def test_bad_weights_name_the_file_and_the_mend(tmp_path: Path, monkeypatch, damage, message: str) -> None:
    path = tmp_path / "demo-model.safetensors"
    path.write_bytes(load.MODEL_FILE.read_bytes())
    damage(path)
    monkeypatch.setattr(load, "MODEL_FILE", path)
    with pytest.raises(load.WeightsError, match=message) as error:
        load.load()
    assert "demo-model.safetensors" in str(error.value) and "make train-demo" in str(error.value)


def test_the_weights_are_small_and_whole() -> None:
    weights = list(load.WEIGHTS.glob("*.safetensors"))
    assets = list((load.WEIGHTS.parents[1] / "assets").rglob("*.safetensors"))
    for files, most in ((weights, 52), (assets, 1)):
        assert files and sum(file.stat().st_size for file in files) <= most * 2**20
    for file in (*weights, *assets):
        assert all(torch.isfinite(t).all() for t in load_file(file).values())


@pytest.fixture(scope="module")
def demo():
    return load.load()


class Late(nn.Linear):
    """A host's layer that has no weight before one comes in, and then has that one."""

    def __init__(self) -> None:
        super().__init__(2, 2, bias=False)
        self.weight = None  # type: ignore[assignment]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        self.weight = nn.Parameter(state_dict[f"{prefix}weight"].clone(), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_come_in_the_networks_dtype(dtype: torch.dtype) -> None:
    network = nn.Sequential(Late(), nn.Linear(2, 2).to(dtype))
    network.dtype = dtype  # type: ignore[assignment]
    weights = {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2), "1.bias": torch.zeros(2)}
    load.fill(network, weights, load.MODEL_FILE)
    assert network(torch.ones(1, 2, dtype=dtype)).dtype == dtype


def test_the_model_is_loaded_anew_when_a_newer_host_asks(demo: Any) -> None:
    model, _, _ = demo
    make, given = model.cached_patcher_init
    for changes in ({}, {"disable_dynamic": True}):
        again = make(*given, **changes)
        assert again.model is not model.model and again.load_device == model.load_device
        for name, weight in model.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], weight), name


def test_the_sockets_are_the_hosts_own(demo) -> None:
    """Encode, sample, decode and encode again with the host's classes."""
    import comfy.sample

    unet, clip, vae = demo
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a cat", ""))
    assert positive[0][0].shape == (1, 77, model.WIDTH)
    latent = torch.zeros(2, 4, 16, 16)
    noise = comfy.sample.prepare_noise(latent, 1)
    z = comfy.sample.sample(unet, noise, 2, 4.0, "euler", "normal", positive, negative, latent, disable_pbar=True)
    image = vae.decode(z)
    assert image.shape == (2, 128, 128, 3) and torch.isfinite(image).all()
    assert vae.encode(image).shape == z.shape


def test_a_drawing_survives_the_autoencoder(demo) -> None:
    """A flat picture keeps its colour, and coming back costs little."""
    _, _, vae = demo
    colours = torch.tensor(list(world.BACKGROUNDS.values())).float().div(255)
    flat = colours.view(-1, 1, 1, 3).expand(-1, 64, 64, 3)
    back = torch.cat([vae.decode(vae.encode(few)) for few in flat.split(2)])  # all at once take 700 MB
    assert (back - flat).abs().mean() < 0.05


def test_a_reference_prompt_is_a_conditioning(demo) -> None:
    _, clip, _ = demo
    one, other = (load.reference_prompt(clip, torch.rand(1, 128, 128, 3), "a picture of <image>") for _ in range(2))
    assert one[0][0].shape == (1, 77, model.WIDTH)
    assert torch.equal(one[0][0][:, :3], other[0][0][:, :3])  # the words before it
    assert not torch.equal(one[0][0][:, 4], other[0][0][:, 4])


def test_lora_keys_of_the_demo_model_are_the_hosts_own(demo) -> None:
    """LoraLoader finds the layers by the names that trainers use."""
    import comfy.lora

    unet, clip, _ = demo
    keys = comfy.lora.model_lora_keys_unet(unet.model, {})
    assert any(key.startswith("lora_unet_") and "attn2_to_k" in key for key in keys)
    assert any("lora_te" in key for key in comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))


def test_the_judge_answers_in_the_worlds_words() -> None:
    torch.manual_seed(0)
    verdict = judge(Judge().eval(), torch.rand(1, 3, 128, 128))[0]
    assert sorted(verdict.objects) == sorted(HEADS["objects"]) and verdict.style in HEADS["style"]
    assert verdict.found(verdict.objects[1], 2) and not verdict.found(verdict.objects[1])


def test_icons_are_pinned() -> None:
    assert set(world.STYLES.values()) == set(glyphs.VERSIONS)


def test_training_can_go_on_from_the_shipped_weights() -> None:
    """The UNet and the words' rows arrive where the trainer keeps them."""
    tensors = load.read(load.MODEL_FILE)
    token = int(tensors["used"][5])
    rng = random.Random(0)
    trainer = train_unet.Trainer(
        [world.one_object(rng, "cat")],
        torch.zeros(1, 4, 16, 16),
        torch.zeros(0, 3, 64, 64, dtype=torch.uint8),
        lambda t: [token] * len(t.split()),
        steps=1,
    )
    trainer.start_from(tensors)
    assert torch.equal(trainer.text.rows[trainer.text.used.index(token)], tensors["rows"][5])
    name = "input_blocks.0.0.weight"
    assert torch.equal(trainer.unet.get_parameter(name), tensors[f"unet.{name}"])
    assert torch.equal(trainer.average[f"unet.{name}"], tensors[f"unet.{name}"])
