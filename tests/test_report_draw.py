"""A report's pictures are the sampler node's, with the engine's account in their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from conceptguard.editing.edits.spec import EditSpec, Gate
from conceptguard.editing.engine.host import add_edit, digest_of
from conceptguard.jobs.measure import Sampling
from conceptguard.jobs.report.draw import Studio, opened
from conceptguard.jobs.report.looks import by_classes, by_judge
from conceptguard.jobs.report.page import pairs_of
from conceptguard.jobs.report.prompts import KEEP, Case
from conceptguard.jobs.report.report import Report
from conceptguard.jobs.report.work import EDITED, UNEDITED

CASES = [Case("a mug", 5, 4.0), Case("a cat", 6, kind=KEEP)]
TEXTS = {"a mug": 1, "a cat": 3, "": 2}


class Clip:
    """Encodes texts by a table."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> Any:
        return tiny.cond(TEXTS[text])


class Vae:
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(z[:, :3]).movedim(1, -1)


class Bright:
    name, key, models = "bright", "bright", ()

    def scores(self, images: torch.Tensor) -> list[float]:
        return images.mean((1, 2, 3)).tolist()


def studio(gate: Gate, see: Any = lambda _: None) -> Studio:
    model = tiny.sd1()
    edited = add_edit(model, EditSpec("projection", tiny.concept(), options=tiny.CRE, gate=gate, node="test"))
    return Studio(
        {UNEDITED: lambda _: model, EDITED: lambda _: edited},
        Clip(),
        Vae(),
        torch.zeros(1, 4, tiny.SIZE, tiny.SIZE),
        Sampling(2, 7.0),
        [by_judge(Bright(), 0.5)],
        see=see,
    )


def report(folder: Path, it: Studio) -> Report:
    return Report(folder, CASES, it, {"checkpoint": "tiny", "preset": "one edit"}, (tiny.SIZE, tiny.SIZE))


def test_a_picture_is_the_samplers_own_and_carries_its_record() -> None:
    seen: list[Any] = []
    data = studio(Gate(), seen.append).draw(CASES[0], UNEDITED, lambda: None)
    z = tiny.sample(tiny.sd1(), tiny.cond(1), tiny.cond(2), steps=2, cfg=4.0, seed=5)
    image, record = opened(data)
    assert record["latent"] == digest_of(z) and record["seconds"] > 0 and not record["warm"] and len(seen) == 2
    assert torch.equal(image, (Vae().decode(z) * 255).round() / 255)


def test_from_beginning_to_end(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    it = report(tmp_path, studio(Gate()))
    page = it(lambda i, most, _: done.append((i, most)))
    pairs = pairs_of(it.work)
    assert page.name == "report.html" and done == [(0, 2), (1, 2), (2, 2)]
    assert not any(p.same for p in pairs) and [p.before.warm for p in pairs] == [False, True]
    account = pairs[0].after.account
    assert (
        account is not None and account["open"] and not account["gated"] and account["edits"][0]["steps"]["acted"] == 2
    )
    for p in pairs:
        for side in (p.before, p.after):
            assert side.flagged == (side.scores["bright"]["bright"] >= 0.5)


def test_a_closed_gate_leaves_the_picture_bit_for_bit(tmp_path: Path) -> None:
    it = report(tmp_path, studio(Gate((0.0,))))
    it(lambda *_: None)
    for p in pairs_of(it.work):
        assert p.same and p.after.account is not None and p.after.account["gated"] and not p.after.account["open"]
        assert it.work.picture(0, UNEDITED).is_file()


def test_settings_hold_all_that_pictures_depend_on(tmp_path: Path) -> None:
    report(tmp_path, studio(Gate())).estimate()
    other = studio(Gate())
    other.negative = "a cat"
    with pytest.raises(ValueError, match="of other negative"):
        report(tmp_path, other).estimate()
    twice = studio(Gate())
    twice.looks = [*twice.looks, *twice.looks]
    with pytest.raises(ValueError, match="the same name"):
        report(tmp_path / "b", twice).draw(lambda *_: None)


def test_a_classifier_flags_by_its_surest_class() -> None:
    look = by_classes("c", "k", ["mug", "cat"], lambda x: torch.tensor([[0.4, 0.6], [0.7, 0.3]]), frozenset(["Mug"]))
    scores = look.see(torch.zeros(2, 8, 8, 3), CASES)
    assert scores[0] == pytest.approx({"mug": 0.4, "cat": 0.6}) and [look.flags(each) for each in scores] == [
        False,
        True,
    ]
