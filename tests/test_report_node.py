"""The node of the report card: its folder, its sheet, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import tiny
import torch
from safetensors.torch import save_file

from conceptguard.editing.edits.spec import EditSpec
from conceptguard.editing.engine.host import add_edit
from conceptguard.editing.methods import eiup
from conceptguard.jobs.report.draw import Studio, png
from conceptguard.nodes import report
from conceptguard.nodes.report import ConceptGuardReport, rows_of, squares

from test_report_distances import in_place_of_packages  # isort: skip
from test_report_draw import Bright, Clip, Vae  # isort: skip
from test_report_looks import small_clip  # isort: skip


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda name=name: str(tmp_path / name))
    return tmp_path


def given(**more: Any) -> dict[str, Any]:
    model = tiny.sd1()
    edited = add_edit(model, EditSpec("projection", tiny.concept(), options=tiny.CRE, node="test"))
    latent = {"samples": torch.zeros(2, 4, tiny.SIZE, tiny.SIZE)}
    own = {"model": model, "clip": Clip(), "vae": Vae(), "prompts": "a mug\na cat", "latent": latent, "edited": edited}
    how = {"kind": "erase", "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
    return {**own, **how, "seed": 0, "seeds": 1, "threshold": 0.0, "discriminator_1": Bright(), **more}


def test_it_writes_a_folder_of_its_own_and_goes_on_in_it(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw = Studio.draw
    monkeypatch.setattr(Studio, "draw", lambda *args: drawn.append(args[2]) or draw(*args))
    folder, sheet, verdict = ConceptGuardReport.execute(**given()).args
    assert folder.startswith("concept_guard_reports/knife-") and "100 %" in verdict
    assert {"report.html", "report.json", "report.csv"} < {path.name for path in (places / "output" / folder).iterdir()}
    assert sheet.shape == (1, 2 * tiny.SIZE, 2 * tiny.SIZE, 3) and drawn == ["unedited", "edited"] * 2
    card = json.loads((places / "output" / folder / "report.json").read_text(encoding="utf-8"))
    assert card["pairs"] == 2 and card["preset"] == "knife" and card["checkpoint"] == "width-16"
    again = ConceptGuardReport.execute(**given()).args
    assert again[0] == folder and len(drawn) == 4
    other = ConceptGuardReport.execute(**given(cfg=4.0)).args
    assert other[0] != folder and len(drawn) == 8


def test_peers_are_drawn_and_counted_beside_it(places: Path) -> None:
    model = tiny.sd1()
    other = add_edit(model, EditSpec("erasure", tiny.concept(), options=eiup.DEFAULTS, node="test"))
    patched = model.clone()
    name = next(name for name in model.model.state_dict() if name.endswith("attn2.to_v.weight"))
    patched.add_patches({name: (torch.ones_like(model.model.state_dict()[name]),)}, 0.1)
    folder, sheet, verdict = ConceptGuardReport.execute(**given(peer_1=other, peer_2=patched, peer_3=other)).args
    card = json.loads((places / "output" / folder / "report.json").read_text(encoding="utf-8"))
    assert card["peers"] == {"eiup": "EIUP", "peer-2": "peer 2", "eiup-2": "EIUP"}
    assert "Beside it, EIUP leaves 100 %" in verdict and "Beside it, peer 2 leaves" in verdict
    assert sheet.shape == (1, 2 * tiny.SIZE, 5 * tiny.SIZE, 3)
    scores = {
        side: json.loads((places / "output" / folder / "scores" / f"000000-{side}.json").read_text())
        for side in ("unedited", "edited", *card["peers"])
    }
    latents = {side: each["latent"] for side, each in scores.items()}
    assert len(set(latents.values())) == 4 and latents["eiup"] == latents["eiup-2"]
    assert "account" in scores["eiup"] and "account" not in scores["peer-2"]


def test_what_was_flagged_is_in_squares() -> None:
    image = torch.rand(1, 48, 96, 3, generator=torch.Generator().manual_seed(0))
    seen = squares(image)
    assert seen.shape == image.shape and len(seen.flatten(0, 2).unique(dim=0)) == report.BLOCKS**2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"edited": None}, "one of the two"),
        ({"preset": "{}"}, "one of the two"),
        ({"edited": tiny.sd1()}, "edited carries no edits"),
        ({"prompts": " "}, "prompts is empty"),
        ({"prompts": "../list.csv"}, "outside of the input folder"),
        ({"prompts": "list.csv"}, 'no list of prompts "list.csv"'),
        ({"erased": "owl"}, "none of the prompts is of owl"),
        ({"discriminator_2": Bright()}, "the same name"),
        ({"discriminator_1": "text"}, "does not look at pictures"),
    ],
)
def test_what_it_refuses(more: dict[str, Any], words: str, places: Path) -> None:
    with pytest.raises(ValueError, match=words) as error:
        ConceptGuardReport.execute(**given(**more))
    assert str(error.value).startswith("ConceptGuardReport: ")


def test_prompts_are_lines_or_a_list_in_the_input_folder(places: Path) -> None:
    (places / "input" / "list.csv").write_text("prompt,seed\na mug,4\n", encoding="utf-8")
    assert [(row.prompt, row.seed) for row in rows_of("list.csv")] == [("a mug", 4)]
    assert [row.prompt for row in rows_of("list.csv\na cat")] == ["list.csv", "a cat"]
    assert [row.prompt for row in rows_of("a mug/b")] == ["a mug/b"]


@pytest.fixture
def measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models folder's place for networks that measure, with one of each kind."""
    in_place_of_packages(monkeypatch)
    models = tmp_path / "models"
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(models)])
    folder = models / "measures"
    small_clip(folder / "clip")
    save_file({"w": torch.tensor([1.0, 2.0, 3.0])}, folder / "inception.safetensors")
    torch.save({"features.0.w": torch.ones(3)}, folder / "alex.pth")
    (folder / "notes.txt").write_text("no weights")
    return folder


def test_it_measures_with_networks_of_the_persons_own(places: Path, measures: Path) -> None:
    """What `make report` has: figures that need the pictures themselves, without a picture drawn again for them."""
    options = {each.id: each.options for each in ConceptGuardReport.GET_SCHEMA().inputs if hasattr(each, "options")}
    weights = ["off", "alex.pth", "inception.safetensors"]
    assert [options[name] for name in ("fid", "lpips", "clip_score")] == [weights, weights, ["off", "clip"]]
    real = places / "input" / "real"
    real.mkdir()
    for i in range(3):
        (real / f"{i}.png").write_bytes(png(torch.full((8, 8, 3), i / 3), {}))

    def figures(**more: Any) -> tuple[str, dict[str, Any]]:
        folder = ConceptGuardReport.execute(**given(kind="keep", **more)).args[0]
        card = json.loads((places / "output" / folder / "report.json").read_text(encoding="utf-8"))
        return folder, {each["name"]: each for each in card["figures"] if each["side"] == "edited"}

    first, found = figures()
    assert not {name for name in found if name.startswith(("FID", "KID", "LPIPS", "CLIP"))}
    second, found = figures(fid="inception.safetensors", lpips="alex.pth", real="real")
    ways = {f"{name} of what is to stay, to {to}" for name in ("FID", "KID") for to in ("unedited", "real pictures")}
    assert second == first and ways < found.keys() and found["LPIPS of what is to stay"]["value"] > 0
    third, found = figures(clip_score="clip")
    assert third != first and found["CLIP score of what is to stay"]["n"] == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"fid": "gone.pth"}, 'fid: "gone.pth" is not in the models folder concept_guard/measures/'),
        ({"lpips": "../alex.pth"}, "lpips: .* is not in the models folder"),
        ({"clip_score": "inception.safetensors"}, "clip_score: .* is not in the models folder"),
        ({"fid": "alex.pth"}, "does not fit torch-fidelity's InceptionV3"),
        ({"lpips": "inception.safetensors"}, "is no AlexNet of torchvision"),
        ({"real": "real"}, "is no folder inside the input folder"),
        ({"real": ".."}, "leads out of the input folder"),
    ],
)
def test_what_of_these_it_refuses(more: dict[str, Any], words: str, places: Path, measures: Path) -> None:
    with pytest.raises(ValueError, match=words):
        ConceptGuardReport.execute(**given(**more))
    assert not (places / "output" / "concept_guard_reports").exists()
