"""The one way in which files are written: whole or not at all, never over another, and with errors that help."""

from __future__ import annotations

import errno
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conceptguard.editing.files import whole
from conceptguard.editing.files.whole import NotWritten, alike, numbered, put, put_beside

WRITERS = 20


def test_a_file_replaces_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "x.json"
    assert put(b"1", path) == path and put(b"2", path).read_bytes() == b"2"
    assert os.listdir(path.parent) == ["x.json"]


def test_two_ways_to_number(tmp_path: Path) -> None:
    path = tmp_path / "knife.safetensors"
    made = [put_beside(b"", path, numbered).name for _ in range(2)]
    put(b"", tmp_path / "KNIFE_00007.SAFETENSORS")
    put(b"", tmp_path / "knife_99.safetensors")
    made += [put_beside(b"", path, numbered).name, *(put_beside(b"", path, alike).name for _ in range(3))]
    names = ("knife_00001", "knife_00002", "knife_00008", "knife", "knife-2", "knife-3")
    assert made == [f"{name}.safetensors" for name in names]
    assert put_beside(b"", path).name == "knife-4.safetensors"


@pytest.mark.parametrize("linked", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("names", [numbered, alike])
def test_writers_at_once_lose_nothing(tmp_path: Path, names: Any, linked: bool, monkeypatch: Any) -> None:
    if not linked:  # as on a memory card
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    begin = threading.Barrier(WRITERS)

    def write(i: int) -> Path:
        begin.wait()
        return put_beside(str(i).encode() * 10_000, tmp_path / "x.json", names)

    with ThreadPoolExecutor(WRITERS) as pool:
        paths = list(pool.map(write, range(WRITERS)))
    assert [path.read_bytes() for path in paths] == [str(i).encode() * 10_000 for i in range(WRITERS)]
    assert sorted(tmp_path.iterdir()) == sorted(set(paths)) and len(set(paths)) == WRITERS


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_are_for_whom_the_system_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        paths = [put(b"", tmp_path / "a"), put_beside(b"", tmp_path / "b"), put_beside(b"", tmp_path / "c", numbered)]
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o666 & ~mask}


def failing(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "/srv/secret/place")

    return fail


WAYS = [put, put_beside]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("number", "mend"),
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "let ComfyUI's user write there"), (errno.EIO, "see that the")],
)
def test_an_error_leaves_nothing_and_says_what_to_do(
    tmp_path: Path, way: Any, number: int, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_bytes", failing(number))
    with pytest.raises(NotWritten) as error:
        way(b"1", tmp_path / "concept_guard" / "x.json")
    assert str(error.value).startswith('cannot write "x.json" into the folder "concept_guard": ')
    assert mend in str(error.value) and "srv" not in str(error.value) and str(tmp_path) not in str(error.value)
    assert os.listdir(tmp_path / "concept_guard") == []


def test_an_error_at_the_last_moment_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", failing(errno.ENOSPC))
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    for way in WAYS:
        with pytest.raises(NotWritten, match="free some space"):
            way(b"1", tmp_path / "x.json")
    assert os.listdir(tmp_path) == []


def test_what_is_in_the_way(tmp_path: Path) -> None:
    """Real errors of the system, also for one that may write anywhere."""
    (tmp_path / "a").write_text("a file")
    (tmp_path / "b").mkdir()
    for way, path, mend in [
        (put, tmp_path / "a" / "x.json", "a file is in the place of that folder"),
        (put_beside, tmp_path / "a" / "b" / "x.json", "a file is in the place of that folder"),
        (put, tmp_path / "b", "a folder has that name"),
        (put, tmp_path / f"{'刀' * 100}.json", "shorten the name"),
        (put_beside, tmp_path / f"{'刀' * 100}.json", "shorten the name"),
    ]:
        with pytest.raises(NotWritten, match=mend) as error:
            way(b"", path)
        assert str(tmp_path) not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole.whole(tmp_path / "x") as part:
        part.write_bytes(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
