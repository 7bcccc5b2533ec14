"""What looks at a report's pictures: the CLIP score against one by hand, a classifier whose classes somebody chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd1_clip
import numpy as np
import pytest
import torch
from PIL import Image

from conceptguard.editing.gates.classifiers import Classifier
from conceptguard.jobs.report.looks import CLASSES, by_judge, clip_score
from conceptguard.jobs.report.prompts import Case

MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pictures
TOKENIZER = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"


def small_clip(path: Path) -> Path:
    """A small random CLIP with the real tokenizer and preprocessor, in a folder of transformers' form."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "eos_token_id": 49407}, vision_config={**small, "patch_size": 32}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(path)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_clip(tmp_path_factory.mktemp("clip") / "small")


def by_hand(folder: Path, image: torch.Tensor, text: str) -> float:
    """The shorter side to 224, the middle of it, the projections of both encoders, their cosine by numpy."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    picture = Image.fromarray((image.numpy() * 255).round().astype(np.uint8))
    scale = 224 / min(picture.size)
    wide, high = (int(side * scale) for side in picture.size)
    picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - 224) // 2, (high - 224) // 2
    pixels = np.asarray(picture.crop((left, top, left + 224, top + 224))) / 255
    x = torch.from_numpy((pixels - MEAN) / SPREAD).float().movedim(-1, 0)[None]
    ids = [pair[0] for pair in comfy.sd1_clip.SDTokenizer(tokenizer_path=str(TOKENIZER)).tokenize_with_weights(text)[0]]
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(x).pooler_output)[0].numpy().astype(np.float64)
        read = model.text_projection(model.text_model(torch.tensor([ids])).pooler_output)[0].numpy().astype(np.float64)
    return float(max(100 * (seen @ read) / np.linalg.norm(seen) / np.linalg.norm(read), 0))


def test_the_clip_score_is_a_hundred_times_the_cosine(folder: Path) -> None:
    look, generator = clip_score(folder), torch.Generator().manual_seed(3)
    found = []
    for i, text in enumerate(("a mug", "a photo of two cats, beside a beer mug", "", "a red fox")):
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        size = [(96, 128), (224, 224), (300, 240), (512, 512)][i]
        image = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1).movedim(1, -1)[0]
        ((scores),) = look.see(image[None], [Case(text, 0)])
        reference = by_hand(folder, image, text)
        found.append(reference)
        assert scores["score"] == pytest.approx(reference, abs=0.35) and look.flags(scores) is False
    assert max(found) - min(found) > 2, "scores that tell nothing apart test nothing"


def test_a_folder_without_a_clip_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no CLIP model for the CLIP score .* give a folder with config.json"):
        clip_score(tmp_path)


def classifier(chosen: list[int], labels: tuple[str, ...]) -> Any:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    return Classifier(
        "shapes", lambda x: logits[: len(x)], {"w": logits}, chosen, 8, (0, 0, 0), (1, 1, 1), labels=labels
    )


def test_a_classifier_of_chosen_classes_tells_all_of_them() -> None:
    images = torch.rand(2, 8, 8, 3)
    look = by_judge(classifier([0, 1], ("mug", "cup", "cat")), 0.6)
    scores = look.see(images, [])
    assert look.kind == CLASSES and [set(each) for each in scores] == 2 * [{"mug", "cup", "cat"}] and look.labels == 3
    assert [look.flags(each) for each in scores] == [True, False]
    assert scores[0]["mug"] == pytest.approx(2.718281828**2 / (2.718281828**2 + 2.718281828 + 1))
    nameless = by_judge(classifier([0], ()), 0.6)
    assert nameless.kind == "flag" and [set(each) for each in nameless.see(images, [])] == 2 * [{"shapes"}]
