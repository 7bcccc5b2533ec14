"""The report as files: the page needs nothing from elsewhere, escapes what it shows, blurs what was flagged."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from conceptguard.jobs.report import page
from conceptguard.jobs.report.draw import opened, png
from conceptguard.jobs.report.figures import Figure, Pair, Seen
from conceptguard.jobs.report.page import verdict, write
from conceptguard.jobs.report.prompts import ERASE, KEEP, Case
from conceptguard.jobs.report.work import EDITED, SIDES, UNEDITED, Work

EVIL = '<script>alert("x")</script>'
CASES = [
    Case(f"a mug {EVIL}", 1, group=EVIL),
    Case("=cmd|' /C calc'!A0", 2),
    Case("a cat", 3, group="cat", kind=KEEP),
]
FLAGGED = {0: (True, False), 1: (True, True), 2: (False, False)}
SETTINGS = {"checkpoint": f"model {EVIL}", "checkpoint_sha256": "ab12", "preset": EVIL, "steps": 20}


class Reader(HTMLParser):
    """Tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    it = Work(tmp_path, CASES, SIDES)

    def draw(case: Case, side: str, _: object) -> bytes:
        record = {"seconds": 1.0, "latent": f"{side if case.kind == ERASE else ''}", "warm": True}
        return png(torch.full((64, 96, 3), case.seed / 4), record)

    def look(data: bytes, case: Case) -> dict[str, object]:
        record = opened(data)[1]
        side = UNEDITED if not (it.score(case.seed - 1, UNEDITED)).is_file() else EDITED
        flagged = FLAGGED[case.seed - 1][SIDES.index(side)]
        return {**record, "scores": {f"judge {EVIL}": {EVIL: 0.9 if flagged else 0.1}}, "flagged": flagged}

    it.run(draw, look, lambda *_: None)
    return it


def test_the_page_is_whole_and_harmless(work: Work) -> None:
    path = write(work, SETTINGS, {f"judge {EVIL}": "flag"})
    text = path.read_text(encoding="utf-8")
    tags = Reader(text).tags
    assert "script" not in {tag for tag, _ in tags} and not [a for _, a in tags for k in a if k.startswith("on")]
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", text))
    pictures = [a for tag, a in tags if tag == "img"]
    assert len(pictures) == 6 and all((a["src"] or "").startswith("data:image/jpeg;base64,") for a in pictures)
    assert [a["content"] for tag, a in tags if tag == "meta" and a.get("name") == "viewport"]
    assert text.count("&lt;script&gt;") > 5


def test_peers_stand_beside_it(tmp_path: Path) -> None:
    sides = (*SIDES, "uce", "sld-max")
    it = Work(tmp_path, [Case("a mug", 0), Case("a cat", 1, kind=KEEP)], sides)

    def draw(case: Case, side: str, _: object) -> bytes:
        return png(torch.full((64, 64, 3), sides.index(side) / 4), {"seconds": 1.0, "latent": side, "warm": True})

    def look(data: bytes, case: Case) -> dict[str, object]:
        record = opened(data)[1]
        hit = case.kind == ERASE and record["latent"] in (UNEDITED, "uce")
        return {**record, "scores": {"j": {"mug": float(hit)}}, "flagged": hit}

    it.run(draw, look, lambda *_: None)
    about = {**SETTINGS, "peers": {"uce": f"UCE {EVIL}", "sld-max": "SLD max"}}
    text = write(it, about, {"j": "flag"}).read_text(encoding="utf-8")
    tags = Reader(text).tags
    assert "script" not in {tag for tag, _ in tags} and len([1 for tag, _ in tags if tag == "img"]) == 8
    assert re.findall(r'<th scope="col">(.*?)</th>', text)[1:5] == [
        "unedited",
        "edited",
        "UCE &lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;",
        "SLD max",
    ]
    card = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert card["peers"] == about["peers"]
    assert "Beside it, SLD max leaves 0 % (0-79.3) and flags 0 % (0-79.3) of other things newly." in card["verdict"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text(encoding="utf-8"))))
    assert [row["side"] for row in rows[:4]] == list(sides) and [row["flagged"] for row in rows[:4]] == list("1010")


def test_what_was_flagged_is_blurred_and_the_worst_comes_first(work: Work) -> None:
    tags = Reader(write(work, SETTINGS, {}).read_text(encoding="utf-8")).tags
    assert [a["id"] for tag, a in tags if tag == "article"] == ["case-1", "case-0", "case-2"]
    switches = [i for i, (tag, a) in enumerate(tags) if tag == "input" and a["type"] == "checkbox"]
    assert len(switches) == 3 and all(tags[i + 1][0] == "img" for i in switches), "the style blurs what follows one"
    assert all("flagged" in (tags[i + 1][1]["alt"] or "") for i in switches)


def test_figures_and_cases_lie_beside_it(work: Work) -> None:
    write(work, SETTINGS, {})
    card = json.loads((work.path / "report.json").read_text(encoding="utf-8"))
    assert (
        card["pairs"] == 3 and card["few"] and card["checkpoint_sha256"] == "ab12" and card["settings"]["steps"] == 20
    )
    removal = next(figure for figure in card["figures"] if figure["name"] == "removal")
    assert (removal["value"], removal["n"], removal["few"]) == (0.5, 2, True)
    rows = list(csv.DictReader(io.StringIO((work.path / "report.csv").read_text(encoding="utf-8"))))
    assert [(row["case"], row["side"], row["flagged"]) for row in rows] == [
        (str(i), side, str(int(FLAGGED[i][j]))) for i in range(3) for j, side in enumerate(SIDES)
    ]
    assert rows[2]["prompt"] == "'" + CASES[1].prompt and rows[4]["same"] == "1"


def test_the_page_shows_no_more_pairs_than_a_phone_takes(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SHOWN", 1)
    text = write(work, SETTINGS, {}).read_text(encoding="utf-8")
    assert text.count("<article") == 1 and "1 of 3 pairs" in text


def test_the_verdict_says_what_is_not_shown() -> None:
    def left(side: str, value: float, low: float, high: float, n: int = 200) -> Figure:
        return Figure("flagged, of what is to go", side, value, low, high, n)

    seen = Seen({}, False, "", 1.0)
    pairs = [Pair(Case("a", 0), seen, seen)] * 200
    clear = [left(UNEDITED, 0.9, 0.85, 0.93), left(EDITED, 0.01, 0.0, 0.04)]
    assert verdict(clear, pairs) == [
        "What is to go was found in 90 % (85-93) of its 200 pictures unedited, and in 1 % (0-4) of them edited."
    ]
    unclear = verdict([left(UNEDITED, 0.2, 0.1, 0.4, 30), left(EDITED, 0.1, 0.05, 0.3, 30)], pairs)
    assert "overlap" in unclear[1] and "With 30 pictures" in unclear[2]
    assert "does not draw it" in verdict([left(UNEDITED, 0.0, 0.0, 0.02), left(EDITED, 0.0, 0.0, 0.02)], pairs)[1]
    assert "No judge" in verdict([], pairs)[0]
