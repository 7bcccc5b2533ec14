"""Names of files: strict for those that are written, wide for those that are there, and dates as the host has them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from conceptguard.editing.files.names import dated, file_in, inside, safe


@pytest.mark.parametrize("name", ["a", "sharp things", "mine/sharp-2", "v1.5", "klinge_ü", "x.safetensors", "刀" * 50])
def test_names(tmp_path: Path, name: str) -> None:
    path = file_in(tmp_path, name)
    assert path.suffix == ".safetensors" and path.stem == name.split("/")[-1].removesuffix(".safetensors")
    assert path.is_relative_to(tmp_path)


BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/../../x",
    "/etc/x",
    "a//b",
    "a\\..\\x",
    "C:/x",
    "C:x",
    ".hidden",
    "a\0b",
    "a\nb",
    "con",
    "NUL.txt",
    "x.",
    "a*b",
    "~/x",
    "$HOME",
    "a/ /b",
    "a:b",
    "\u202ex",
    "\ud800",
    "a/" * 9 + "x",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_some_system_would_not_take(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a file here; use letters"):
        file_in(tmp_path, name)


def test_spaces_around_a_typed_name_go(tmp_path: Path) -> None:
    assert file_in(tmp_path, " x ").stem == "x"


@pytest.mark.parametrize("name", ["x" * 151, "刀" * 100, f"x/{'刀' * 51}", "\ud800" * 200])
def test_length_is_counted_in_bytes(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="has [0-9]+ bytes, and the name of .* at most 150 here .*; shorten it"):
        file_in(tmp_path, name)


def test_a_link_that_leads_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads out"):
        file_in(tmp_path / "in", "out/x")


NOW = datetime(2026, 3, 4, 15, 6, 7)
DATES = {
    "%date:yyyy-MM-dd%": "2026-03-04",
    "knife/%date:yy-M-d hh-mm-ss%": "knife/26-3-4 15-06-07",
    "%date:h-m-s%": "15-6-7",
    "%year%-%month%-%day% %hour%%minute%%second%": "2026-03-04 150607",
    "x%width%": "x%width%",
    "50%": "50%",
    "%KSampler.seed%": "%KSampler.seed%",
}


@pytest.mark.parametrize("prefix", DATES)
def test_dates_are_written_as_the_host_writes_them(prefix: str) -> None:
    assert dated(prefix, NOW) == DATES[prefix]


@pytest.mark.parametrize("name", ["50%", "%KSampler.seed%", "x%width%"])
def test_a_sign_that_stands_for_nothing_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="has a % that stands for nothing here; write %date:yyyy-MM-dd%"):
        file_in(tmp_path, dated(name, NOW))


@pytest.mark.parametrize(
    "name",
    [
        "[nsfw] v1.0",
        "no nudity's",
        "safe & sound",
        "50% less",
        "(paren)",
        "con",
        "x.SAFETENSORS",
        "a/b/c",
        "..x",
        "刀" * 80,
    ],
)
def test_what_is_there_may_have_any_name(name: str) -> None:
    assert inside(name) == name


@pytest.mark.parametrize("name", ["../x", "a/../../x", "..", "a/..", "/etc/x", "a\0b"])
def test_but_none_that_leads_out(name: str) -> None:
    with pytest.raises(ValueError, match="leads out of the models folder"):
        inside(name)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("sharp things", "sharp things"),
        ("con", "con_"),
        ("(knife)", "_(knife)"),
        ("a church/..", "a church"),
        ("../../x", "x"),
        ("  ", "otherwise"),
        ("???", "otherwise"),
        ("刀" * 100, "刀" * 20),
        ("v1.5", "v1_5"),
        ("\ud800", "otherwise"),
        ("x" * 59 + " y", "x" * 59),
    ],
)
def test_any_name_can_be_made_one_to_write(tmp_path: Path, name: str, made: str) -> None:
    assert safe(name, "otherwise") == made
    assert file_in(tmp_path, made).stem == made
