"""The documents: every link leads somewhere, every figure was measured, and the page of figures is its data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conceptguard.benchmarks import papers
from conceptguard.benchmarks.measured import KEPT, PAGE, page
from conceptguard.benchmarks.run import TABLES, chosen
from conceptguard.benchmarks.table import Rate, Record, Table, run, weights
from conceptguard.editing.edits.method import methods
from conceptguard.editing.training.erasure import METHODS as TRAINED
from conceptguard.editing.weights.edit import METHODS as SOLVED
from conceptguard.nodes import NODES

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))))
# A share, with its interval if it has one; or a ratio or a distance of three places.
FIGURE = re.compile(r"\d[\d.]*(?:-\d[\d.]*)? %(?: \(\d+-\d+\))?|\b\d\.\d{3}\b")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --- the figures -----------------------------------------------------------------------------------------------------


def test_the_page_of_figures_is_what_its_data_gives() -> None:
    assert page(TABLES) == PAGE.read_text(encoding="utf-8"), "write it anew: make bench ARGS=--page"


def test_a_figure_of_a_paper_stands_beside_one_of_ours() -> None:
    """A cell that no row of a table measured anew has any more would be told as not measured."""
    tables = {table.name: KEPT / f"{table.name}.json" for table in TABLES}
    for figure in papers.FIGURES:
        record = Record.read(tables[figure.table])
        assert weights() not in record.settings or figure.ours(KEPT) != "not measured", figure


def test_every_record_is_of_a_table_and_its_counts_give_its_intervals() -> None:
    files = sorted(KEPT.glob("*.json"))
    assert {file.stem for file in files} <= {table.name for table in TABLES} and len(files) > 20
    for file in files:
        record = Record.read(file)
        assert record.table == file.stem and record.rows and record.commit and record.command.startswith("make bench")
        assert file.read_text(encoding="utf-8") == written(record), f"{file.name}: an interval that is not its counts'"


def written(record: Record) -> str:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        record.write(Path(folder))
        return (Path(folder) / f"{record.table}.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "docs/limits.md", "docs/methods.md", "docs/recipes.md", "docs/which.md"])
def test_every_figure_was_measured(name: str) -> None:
    told, ours = FIGURE.findall(text(name)), text("docs/measured.md").partition("## The papers' figures")[0]
    missing = [figure for figure in told if not re.search(rf"(?<![\d.]){re.escape(figure)}", ours)]
    assert not missing, f"{name} tells {missing}, which docs/measured.md does not"
    assert name in ("docs/methods.md",) or told


def test_the_reader_of_figures_sees_every_form() -> None:
    assert FIGURE.findall("left 6.7 % (2-21), 4-14 % and 97 %; 0.997 of a call, sigma 0.5, version 1.32.9") == [
        "6.7 % (2-21)",
        "4-14 %",
        "97 %",
        "0.997",
    ]


# --- a run -----------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, object]]) -> Table:
    return Table("made-up", "Made up", "Nothing.", lambda: iter(rows), lambda: iter(rows[:1]))


def test_a_run_leaves_a_record_after_each_row(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"edit": "a", "found": Rate(1, 4)}, {"edit": "b", "time": 1.5, "same": True}]
    records = list(run(table(rows), quick=False, notes=["read me"]))
    assert [(len(r.rows), r.finished) for r in records] == [(1, False), (2, False), (2, True)]
    assert len(list(run(table(rows), quick=True))[-1].rows) == 1
    records[-1].write(tmp_path)
    assert Record.read(tmp_path / "made-up.json") == records[-1]
    shown = page([table(rows)], tmp_path)
    assert "| a | 25 % (5-70) of 4 |  |  |" in shown and "| b |  | 1.500 | yes |" in shown
    assert "## Made up" in shown and "- read me" in shown and 'ARGS="--only made-up"' in shown
    assert "Stopped" not in shown
    records[0].write(tmp_path)
    assert "Stopped before its end." in page([table(rows)], tmp_path)


def test_wilsons_interval() -> None:
    """Of Brown, Cai and DasGupta's formula by hand: 0 of 50 reaches z^2 / (n + z^2)."""
    assert Rate(0, 50).interval[1] == pytest.approx(1.96**2 / (50 + 1.96**2))
    assert str(Rate(123, 128)) == "96.1 % (91-98)" and str(Rate(50, 50)) == "100 % (93-100)"


def test_tables_are_chosen_by_name_or_beginning() -> None:
    assert len({t.name for t in TABLES}) == len(TABLES)
    assert [t.name for t in chosen(["kpop"])] == ["kpop"]
    assert [t.name for t in chosen(["causal", "causal-edit"])] == ["causal-period", "causal-edit", "causal-definition"]
    with pytest.raises(SystemExit, match="no table 'cre'; choose of: judge, "):
        chosen(["cre"])


# --- the links -------------------------------------------------------------------------------------------------------


def links(name: str) -> Iterator[str]:
    """The targets of a page's links and pictures, code aside."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text(name), flags=re.S)
    yield from re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    found = list(links(name))
    for link in found:
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = (ROOT / name).parent / place if place else ROOT / name
        assert target.exists(), f"{name}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{name}: {link} names no heading of {target.name}"


def test_the_front_page_is_short_and_leads_to_every_page() -> None:
    assert len(text("README.md").splitlines()) <= 120
    told = {link.partition("#")[0] for link in links("README.md")}
    assert {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")} | {"CONTRIBUTING.md", "LICENSE"} <= told


def test_every_node_that_edits_judges_or_learns_is_on_the_front_page() -> None:
    """Savers and loaders are told of by their recipe."""
    told = text("README.md") + text("docs/recipes.md")
    for node in NODES:
        name = node.define_schema().display_name
        if not name.startswith(("Save ", "Load ")):
            assert all(word in told for word in name.replace("(", "").replace(")", "").split()), name


def test_every_method_has_a_row_on_the_front_page() -> None:
    rows = re.search(r"^## Methods$(.*?)^## ", text("README.md"), flags=re.M | re.S)
    assert rows is not None
    told = " ".join(re.findall(r"^\| (.*?) \|", rows[1], flags=re.M)).replace("-", " ")
    ways = {way.partition("-")[0] for way in TRAINED}
    assert not [name for name in {*(method.label for method in methods()), *SOLVED, *ways} if name not in told]


# --- the map ---------------------------------------------------------------------------------------------------------


def folders(root: Path) -> set[str]:
    """Those that hold a part of the pack: not what a command or the host leaves there."""
    return {p.name for p in root.iterdir() if p.is_dir() and p.name[0] not in "._" and p.name != "output"}


def test_the_map_names_every_room() -> None:
    rows = re.findall(r"^\| (`[^|]*`) \|", text("CONTRIBUTING.md"), flags=re.M)
    told = {name.rstrip("/") for row in rows for name in re.findall(r"`([a-z_]+/)`", row)}
    assert told == folders(ROOT) | folders(ROOT / "editing")


def test_every_file_that_the_map_names_is_there() -> None:
    told = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|toml|json))`", text("CONTRIBUTING.md"))
    places = [ROOT, ROOT / "editing", ROOT / "locales" / "zh", ROOT / "tests", *(ROOT / "editing").iterdir()]
    places += list((ROOT / "editing").glob("*/*/"))
    missing = [name for name in told if not any((place / name).is_file() for place in places)]
    assert len(told) > 30 and not missing


def test_every_make_target_of_the_pages_is_there() -> None:
    known = set(re.findall(r"^([a-z-]+):", text("Makefile"), flags=re.M))
    for name in PAGES:
        told = set(re.findall(r"`make ([a-z-]+)", text(name)) + re.findall(r"^make ([a-z-]+)", text(name), flags=re.M))
        assert told <= known, f"{name} tells of {sorted(told - known)}"
