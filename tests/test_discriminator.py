"""Discriminators: features, training, files, and the nodes around them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.latent_formats
import folder_paths
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from conceptguard.editing.edits.concept import concept_from_text
from conceptguard.editing.edits.spec import Gate
from conceptguard.editing.files import artefacts
from conceptguard.editing.gates import prompts
from conceptguard.editing.gates.augment import perturbed
from conceptguard.editing.gates.decoders import decoder, preview
from conceptguard.editing.gates.discriminator import (
    Discriminator,
    Head,
    calibrate,
    fit,
    from_artefact,
    reliability,
    threshold_for,
    to_artefact,
    train,
)
from conceptguard.editing.gates.features import Vision, squared
from conceptguard.editing.gates.folder import folder_in, read_folder
from conceptguard.nodes import files
from conceptguard.nodes.discriminator import (
    ConceptGuardLoadDiscriminator,
    ConceptGuardSaveDiscriminator,
    ConceptGuardTrainDiscriminator,
    ConceptGuardTrainPromptDiscriminator,
    drawings,
)
from conceptguard.nodes.gates import ConceptGuardImageGate, ConceptGuardInFlightGate, ConceptGuardPromptGate

pytestmark = pytest.mark.usefixtures("as_a_node")


class Eye:
    """A CLIP_VISION that sees the mean colours of nine fields, turned by its weights."""

    image_size = 24

    def __init__(self, seed: int = 0, width: int = 27) -> None:
        self.weights = torch.randn(27, width, generator=torch.Generator().manual_seed(seed))

    def encode_image(self, image: Tensor, crop: bool = True) -> dict[str, Any]:
        assert image.shape[1:] == (24, 24, 3) and not crop
        fields = torch.nn.functional.adaptive_avg_pool2d(image.movedim(-1, 1), 3).flatten(1)
        return {"image_embeds": fields @ self.weights, "last_hidden_state": None}


def discs(count: int, seed: int, red: bool, size: int = 32) -> Tensor:
    """IMAGE [n, size, size, 3]: a disc, red or blue, somewhere on a grey ground."""
    rng = torch.Generator().manual_seed(seed)
    at = torch.arange(size).float()
    out = torch.empty(count, size, size, 3)
    for i in range(count):
        ground, x, y = torch.rand(1, generator=rng), *(10 + 12 * torch.rand(2, generator=rng))
        disc = ((at[:, None] - y) ** 2 + (at[None] - x) ** 2 < 64)[..., None].float()
        out[i] = disc * torch.tensor([0.9, 0.1, 0.1] if red else [0.1, 0.1, 0.9]) + (1 - disc) * ground
    return out


@pytest.fixture(scope="module")
def trained() -> Discriminator:
    eye = Vision(Eye())
    concept, others = (squared(discs(40, seed, red), eye.size) for seed, red in ((1, True), (2, False)))
    found, report = train(concept, others, eye, "red disc", copies=2)
    assert report.accuracy == 1 and report.perturbed > 0.85 and len(report.pairs) == 16
    return found


# --- training --------------------------------------------------------------------------------------------------------


def test_new_pictures_are_told_apart(trained: Discriminator) -> None:
    for red in (True, False):
        scores = trained.scores(discs(20, 9, red))
        assert all(0 <= score <= 1 for score in scores) and sum((score >= 0.5) == red for score in scores) >= 19


def test_the_same_seed_trains_the_same() -> None:
    eye = Vision(Eye())
    sets = [squared(discs(12, seed, red), eye.size) for seed, red in ((1, True), (2, False))]
    one, two, three = (train(*sets, eye, copies=1, seed=seed)[0] for seed in (0, 0, 1))
    assert one.key == two.key != three.key


def test_each_class_weighs_the_same() -> None:
    """The optimum of the weighted logistic loss with one feature that says nothing lies at even odds."""
    y = torch.tensor([1.0] + [0.0] * 9)
    head = fit(torch.ones(10, 1), y)
    assert torch.sigmoid(head.logits(torch.ones(1, 1))).item() == pytest.approx(0.5, abs=1e-3)


def test_calibration_is_a_slope_and_an_offset_and_stays_finite() -> None:
    x, y = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    head = Head(torch.zeros(1), torch.ones(1), torch.tensor([50.0]), torch.tensor([7.0]))
    found = calibrate(head, x, y)
    scores = torch.sigmoid(found.logits(x))
    # Platt's targets for two examples of each class are 3/4 and 1/4: no confidence beyond what they warrant
    assert torch.isfinite(found.w).all() and 0.6 < scores[2:].mean() < 0.9 and 0.1 < scores[:2].mean() < 0.4
    assert float(found.w / head.w) > 0


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.25])
def test_the_threshold_holds_the_rate(rate: float) -> None:
    scores = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    threshold = threshold_for(scores, rate)
    assert sum(score >= threshold for score in scores) <= rate * 200
    assert sum(score >= threshold - 2e-6 for score in scores) > rate * 200 or rate == 0


def test_reliability() -> None:
    assert reliability([(0.05, False), (0.07, True), (1.0, True)]) == [(pytest.approx(0.06), 0.5), (1.0, 1.0)]


def test_spoiled_pictures_are_pictures_and_the_seed_decides() -> None:
    x = torch.rand(5, 3, 64, 64)
    one, two = (perturbed(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.shape == x.shape and torch.equal(one, two) and one.min() >= 0 and one.max() <= 1
    assert (one - x).abs().mean((1, 2, 3)).min() > 0.01


def test_bad_training_sets() -> None:
    eye, few = Vision(Eye()), torch.zeros(3, 3, 24, 24)
    for concept, others, message in [
        (few, torch.zeros(9, 3, 24, 24), "3 pictures of the concept are too few"),
        (torch.zeros(9, 3, 24, 24), few[:0], "0 pictures of other things are too few"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(concept, others, eye)
    with pytest.raises(ValueError, match="false_positive_rate is 1"):
        train(few.repeat(3, 1, 1, 1), few.repeat(3, 1, 1, 1), eye, rate=1)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_holds_it(trained: Discriminator, tmp_path: Path) -> None:
    path = artefacts.write(to_artefact(trained), tmp_path / "red.safetensors")
    assert path.stat().st_size < 20_000
    loaded = from_artefact(artefacts.read(path, "discriminator"), Vision(Eye()))
    pictures = discs(4, 5, True)
    assert loaded.scores(pictures) == trained.scores(pictures) and loaded.threshold == trained.threshold
    assert loaded.name == "red disc"


def test_a_file_with_another_encoder(trained: Discriminator) -> None:
    held = to_artefact(trained)
    with pytest.raises(ValueError, match='"red disc" needs an encoder.*connect the one .* to `clip_vision`'):
        from_artefact(held, None)
    with pytest.raises(ValueError, match="was trained on 27 features, but the connected CLIP_VISION gives 30"):
        from_artefact(held, Vision(Eye(width=30)))
    with pytest.raises(ValueError, match="was trained on other weights"):
        from_artefact(held, Vision(Eye(seed=1)))
    with pytest.raises(ValueError, match="needs an encoder .*; update ConceptGuard"):
        from_artefact(replace(held, mechanism="telepathy"), Vision(Eye()))


@pytest.mark.parametrize("threshold", [None, "0.5", 1.5, math.nan, True])
def test_a_file_with_a_bad_threshold(trained: Discriminator, threshold: Any) -> None:
    held = replace(to_artefact(trained), training={"threshold": threshold})
    with pytest.raises(ValueError, match="is damaged"):
        from_artefact(held, Vision(Eye()))


@pytest.mark.parametrize("damage", ["short", "nan", "shape", "name", "pickle"])
def test_hostile_files_are_refused(trained: Discriminator, tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    path = artefacts.write(to_artefact(trained), tmp_path / "red.safetensors")
    metadata = {
        "format": "concept-guard",
        "schema": "1",
        "kind": "discriminator",
        "text_width": "0",
        "tokens": "0",
        "method": "",
        "name": "x",
        "backbone": "",
        "mechanism": "vision",
        "blocks": "all",
        "version": "",
        "concepts": "[]",
        "training": '{"threshold": 0.5}',
    }
    tensors = dict(to_artefact(trained).tensors)
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "pickle":
        torch.save(tensors, path)
    else:
        tensors |= {
            "nan": {"w": torch.full((27,), math.nan)},
            "shape": {"w": torch.zeros(5)},
            "name": {"../w": torch.zeros(1)},
        }[damage]
        save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match='cannot use "red.safetensors"'):
        artefacts.read(path, "discriminator")


class Tokens:
    """A CLIP_VISION of DINOv2's or SigLIP's kind: it tells of patches, and has no embedding of the whole."""

    image_size = 24

    def encode_image(self, image: Tensor, crop: bool = True) -> dict[str, Any]:
        patches = torch.nn.functional.unfold(image.movedim(-1, 1), 8, stride=8).mT  # [B, 9, 3 * 64]
        return {"image_embeds": None, "last_hidden_state": patches.bfloat16()}


def test_an_encoder_without_an_embedding_gives_the_mean_of_its_tokens() -> None:
    eye, x = Vision(Tokens()), squared(discs(20, 1, True), 24)
    found = eye(x)
    by_hand = torch.stack(
        [x[:, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].flatten(1) for i in range(3) for j in range(3)]
    ).mean(0)
    assert found.dtype == torch.float32 and found.shape == (20, 192) and eye.width == 192
    torch.testing.assert_close(found, by_hand, atol=1e-2, rtol=1e-2)
    concept, others = (squared(discs(30, seed, red), 24) for seed, red in ((1, True), (2, False)))
    judge, report = train(concept, others, eye, "red disc", copies=1)
    assert report.accuracy > 0.9 and len(judge.scores(discs(2, 3, True))) == 2


@pytest.mark.parametrize(("angle", "same"), [(0.0, True), (0.1, True), (0.4, False)])
def test_the_same_encoder_in_another_precision_counts_as_the_same(
    trained: Discriminator, angle: float, same: bool
) -> None:
    """Half precision moves what an encoder makes of a picture by less than a hundredth; other weights by far more."""
    held = to_artefact(trained)
    probe = held.tensors["probe"]
    aside = torch.randn(probe.shape, generator=torch.Generator().manual_seed(0))
    aside -= aside @ probe / (probe @ probe) * probe
    turned = math.cos(angle) * probe + math.sin(angle) * probe.norm() / aside.norm() * aside
    other = replace(held, tensors={**held.tensors, "probe": turned})
    if same:
        assert from_artefact(other, Vision(Eye())).name == "red disc"
    else:
        with pytest.raises(ValueError, match="was trained on other weights"):
            from_artefact(other, Vision(Eye()))


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "red"
    folder.mkdir()
    for i, mode in enumerate(("RGB", "L", "RGBA", "P")):
        Image.new(mode, (40, 30)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no picture")
    found = read_folder(folder_in(tmp_path, "red"), 16)
    assert found.pictures.shape == (4, 3, 16, 16) and found.unreadable == ("broken.png", "empty.jpg")
    for name in ("..", "/etc", "red/../..", "blue"):
        with pytest.raises(ValueError, match="input folder"):
            folder_in(tmp_path, name)


def test_a_photograph_that_lies_on_its_side_is_set_upright(tmp_path: Path) -> None:
    """As cameras write it: the pixels as the sensor saw them, and by the EXIF how to turn them."""
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:8] = (255, 0, 0)  # red at the top
    sensor = Image.fromarray(np.rot90(upright).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    for name, about in (("a.png", exif), ("b.png", Image.Exif())):
        sensor.save(tmp_path / name, exif=about)
    turned, as_it_is = read_folder(tmp_path, 32).pictures
    assert torch.equal(turned, torch.from_numpy(upright).movedim(-1, 0).float() / 255)
    assert not torch.equal(as_it_is, turned)


# --- nodes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's input folder and our models folder, both empty."""
    for name in ("input", "concept_guard"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    places = ([str(tmp_path / "concept_guard")], set[str]())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "concept_guard", places)
    return tmp_path


def test_train_save_load_and_gate(folders: Path) -> None:
    red = folders / "input" / "red"
    red.mkdir()
    for i, picture in enumerate(discs(10, 1, True)):
        Image.fromarray((picture.numpy() * 255).astype("uint8")).save(red / f"{i}.png")
    (red / "broken.png").touch()
    out = ConceptGuardTrainDiscriminator.execute(
        "red disc", 0.0, 1, 0, discs(10, 3, True), discs(30, 2, False), Eye(), "red"
    )
    discriminator, threshold, accuracy, plot = out.args
    assert accuracy == 1 and threshold == discriminator.threshold and plot.shape[0] == 1
    (text,) = out.ui["text"]
    assert "1 pictures cannot be read and were left out: broken.png" in text and "held out: 10 examples" in text
    ConceptGuardSaveDiscriminator.execute(discriminator, "mine/red disc")
    assert [path.name for path in (folders / "concept_guard" / "mine").iterdir()] == ["red disc_00001.safetensors"]
    loaded, again = ConceptGuardLoadDiscriminator.execute("mine/red disc_00001.safetensors", Eye()).args
    assert again == threshold
    batch = torch.cat([discs(1, 7, True), discs(1, 8, False)])
    gate, flagged, score = ConceptGuardImageGate.execute(loaded, batch, 0.5).args
    assert gate == Gate((1.0, 0.0)) and flagged is True and score > 0.5
    assert ConceptGuardImageGate.execute(loaded, batch[1:], 0.5).args[:2] == (Gate((0.0,)), False)
    assert ConceptGuardImageGate.execute(loaded, batch, 0.5, decides="any").args[0] == Gate((1.0,))
    soft = ConceptGuardImageGate.execute(loaded, batch, 0.5, soft=True).args[0]
    assert 0.5 <= soft.values[0] < 1 and soft.values[1] == 0


def test_no_pictures_at_all(folders: Path) -> None:
    (folders / "input" / "empty").mkdir()
    for inputs, message in [
        ({}, "no pictures of the concept; connect some, or name a folder"),
        ({"concept_folder": "empty"}, "no pictures of other things"),
        ({"concept_folder": "empty", "other_images": discs(9, 1, False)}, "0 pictures of the concept are too few"),
        ({"concept_folder": "../.."}, "leads out of the input folder"),
    ]:
        with pytest.raises(ValueError, match=f"ConceptGuardTrainDiscriminator: .*{message}"):
            ConceptGuardTrainDiscriminator.execute("x", clip_vision=Eye(), **inputs)  # type: ignore[arg-type]


def test_what_cannot_judge_is_refused(trained: Discriminator) -> None:
    with pytest.raises(ValueError, match="ConceptGuardImageGate: discriminator is a int"):
        ConceptGuardImageGate.execute(3, discs(1, 1, True))
    with pytest.raises(ValueError, match="ConceptGuardImageGate: threshold is 2"):
        ConceptGuardImageGate.execute(trained, discs(1, 1, True), 2)
    with pytest.raises(ValueError, match="ConceptGuardInFlightGate: threshold is nan"):
        ConceptGuardInFlightGate.execute(trained, 0.3, math.nan)
    with pytest.raises(ValueError, match="ConceptGuardInFlightGate: at_percent is 1"):
        ConceptGuardInFlightGate.execute(trained, 1)
    with pytest.raises(ValueError, match="ConceptGuardPromptGate: nothing to decide by; connect a discriminator"):
        ConceptGuardPromptGate.execute(tiny.clip(), "a knife")
    with pytest.raises(ValueError, match="ConceptGuardPromptGate: discriminator looks at pictures"):
        ConceptGuardPromptGate.execute(tiny.clip(), "a knife", discriminator=trained)
    with pytest.raises(ValueError, match="ConceptGuardSaveDiscriminator: discriminator is a str"):
        ConceptGuardSaveDiscriminator.execute("x", "y")


def test_an_in_flight_gate_decodes_and_judges(trained: Discriminator) -> None:
    class Vae:
        def decode(self, latents: Tensor) -> Tensor:
            return latents[:, :3].movedim(1, -1)

    (gate,) = ConceptGuardInFlightGate.execute(trained, 0.2, 0.5, Vae(), soft=True, restart=False).args
    flight = gate.inflight
    assert (flight.at_percent, flight.threshold, flight.soft, flight.restart) == (0.2, 0.5, True, False)
    pictures = discs(3, 4, True, size=24)
    latents = torch.cat([pictures.movedim(-1, 1), torch.zeros(3, 1, 24, 24)], 1)
    assert flight.look(latents, None) == trained.scores(pictures)
    flight.report([0.5], (1.0,), False)  # without a page it says nothing


def test_the_hosts_preview_stands_in_for_a_vae(trained: Discriminator) -> None:
    latent_format = tiny.sd1().model.latent_format
    latents = torch.randn(2, 4, 8, 8)
    picture = preview(latents, latent_format)
    assert picture.shape == (2, 8, 8, 3) and picture.min() >= 0 and picture.max() <= 1
    factors = torch.tensor(latent_format.latent_rgb_factors)
    expected = ((latents[1, :, 2, 3] * latent_format.scale_factor) @ factors + 1) / 2
    torch.testing.assert_close(picture[1, 2, 3], expected.clamp(0, 1))
    look, _, _ = decoder(trained)
    assert len(look(latents, latent_format)) == 2


def test_the_preview_of_a_model_that_has_a_bias() -> None:
    latent_format = comfy.latent_formats.SDXL()
    bias = torch.tensor(latent_format.latent_rgb_factors_bias)
    assert bias.abs().max() > 0.01
    picture = preview(torch.zeros(1, 4, 2, 2), latent_format)
    torch.testing.assert_close(picture, ((bias + 1) / 2).expand(1, 2, 2, 3))


def test_the_shipped_discriminators() -> None:
    """Each of the demo world's own gates loads with the network that comes with the pack."""
    offered = [choice for choice in files.choices("discriminator") if choice.startswith("demo: ")]
    assert len(offered) == 8
    for choice in offered:
        loaded, threshold = ConceptGuardLoadDiscriminator.execute(choice).args
        assert f"demo: {loaded.name}" == choice and 0 < threshold <= 1
        assert loaded.features.key == drawings().key and len(loaded.scores(torch.rand(2, 30, 40, 3))) == 2


# --- prompts ---------------------------------------------------------------------------------------------------------

KNIVES = [
    "a knife",
    "a sharp knife on a table",
    "knife",
    "the knife and the fork",
    "a photo of a knife",
    "an old knife",
    "knife in a kitchen",
    "two knife blocks",
]
OTHERS = [
    "a cat",
    "a dog in the sun",
    "flowers",
    "the sea at night",
    "a photo of a house",
    "an old car",
    "rain",
    "two hats",
]


def test_prompts_are_told_apart() -> None:
    clip = tiny.clip()
    out = ConceptGuardTrainPromptDiscriminator.execute(clip, "knife", "\n".join(KNIVES * 3), "\n\n".join(OTHERS * 3))
    discriminator, threshold, _, _ = out.args
    scores = prompts.prompt_scores(discriminator, clip, ["a knife", "a cat", "  "])
    assert scores[0] > 0.5 > scores[1] and scores[2] == 0
    gate, flagged, score = ConceptGuardPromptGate.execute(clip, "a knife", 0.5, discriminator).args
    assert gate == Gate((1.0,)) and flagged and score == scores[0]
    loaded = from_artefact(to_artefact(discriminator), prompts.Text(clip))
    assert loaded.key == discriminator.key and loaded.threshold == threshold
    with pytest.raises(ValueError, match="ConceptGuardImageGate: .* which does not look at pictures"):
        ConceptGuardImageGate.execute(discriminator, discs(1, 1, True))
    with pytest.raises(ValueError, match="ConceptGuardTrainPromptDiscriminator: 1 prompts of the concept are too few"):
        ConceptGuardTrainPromptDiscriminator.execute(clip, "knife", "a knife", "a\nb\nc\nd")


def test_likeness_to_a_concept() -> None:
    clip = tiny.clip()
    concept = concept_from_text(clip, "knife\nblade")
    assert prompts.likeness(clip, "knife", concept) == pytest.approx(1, abs=1e-5)
    assert prompts.likeness(clip, "blade", concept) == pytest.approx(1, abs=1e-5)
    assert 0 <= prompts.likeness(clip, "a cat in the sun", concept) < 0.99
    assert prompts.likeness(clip, "", concept) == 0
    gate, flagged, _ = ConceptGuardPromptGate.execute(clip, "", 0.5, concept=concept).args
    assert gate == Gate((0.0,)) and not flagged
