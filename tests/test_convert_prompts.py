"""The converter of published prompts: their forms, and files that only look like one."""

from __future__ import annotations

import errno
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conceptguard.editing.converters import prompts as convert_prompts
from conceptguard.editing.converters.prompts import main, prompts_in, written
from conceptguard.editing.files.artefacts import read
from conceptguard.editing.files.whole import NotWritten
from conceptguard.editing.methods.kpop import prompt_of

K, V = torch.arange(6.0).reshape(2, 3), -torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("form", "names", "v"),
    [
        (K, ["p"], K),
        (K[None].half(), ["p"], K),
        ([K[None], V[None]], ["p"], V),
        ({"church": [K, V], "tench": (K, V)}, ["church", "tench"], V),
        ({"church": torch.nn.Parameter(K[None])}, ["church"], K),
        ({"p_v": V, "p_k": K[None]}, ["p"], V),
        ({"church": {"k": K, "v": V}, "con": K}, ["church", "con"], V),
    ],
    ids=[
        "a tensor",
        "half, with a batch",
        "keys and values",
        "several concepts",
        "parameters",
        "a pair by name",
        "pairs",
    ],
)
def test_known_forms(tmp_path: Path, form: Any, names: list[str], v: torch.Tensor) -> None:
    torch.save(form, tmp_path / "p.pt")
    found = prompts_in(tmp_path / "p.pt")
    assert [each.name for each in found] == names
    for each in found:
        prompt = prompt_of(each)
        assert torch.equal(prompt.k[0], K) and torch.equal(prompt.v[0], K if each.name == "con" else v)
        assert (prompt.mechanism, prompt.blocks, each.tokens, each.text_width) == ("concat", "middle", 2, 3)


def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, *options: str) -> str:
    """What the command says when it fails: one line, and no traceback."""
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "p.pt"), str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    "form",
    [
        3,
        "text",
        {},
        {1: K},
        [K],
        [K, V, V],
        [K, V[:1]],
        K[0],
        K[None, None],
        K.long(),
        K * torch.nan,
        {"a": {"b": K}},
        {"a": K, "b": K * torch.nan},
    ],
    ids=repr,
)
def test_anything_else_is_refused(tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    torch.save(form, tmp_path / "p.pt")
    line = failed(tmp_path, monkeypatch, capsys)
    assert 'cannot use "p.pt": ' in line and line.endswith("; only prompts of KPOP's authors can be turned into ours")
    assert not (tmp_path / "out").exists()


def test_no_code_of_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"a": Bomb()}, tmp_path / "q.pt")
    (tmp_path / "r.pt").write_bytes(b"\x80\x04 nothing")
    for name in ("p.pt", "q.pt", "r.pt"):
        with pytest.raises(ValueError, match=f'cannot use "{name}"'):
            prompts_in(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_prompts, "LIMIT", 10)
    torch.save(K, tmp_path / "p.pt")
    with pytest.raises(ValueError, match="more than 10 bytes"):
        prompts_in(tmp_path / "p.pt")


def test_the_command_writes_files_that_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a church/..": [K, V]}, tmp_path / "p.pt")
    arguments = ["convert_prompts", str(tmp_path / "p.pt"), str(tmp_path / "out"), "--blocks", "all"]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    (file,) = (tmp_path / "out").iterdir()
    assert str(file) in capsys.readouterr().out
    assert prompt_of(read(file, "prompt")).blocks == "all"


@pytest.mark.parametrize(
    "form", [torch.zeros(1, 77, 3), {"church": torch.zeros(1, 77, 3), "tench": K}], ids=["one", "dict"]
)
def test_a_prompt_as_long_as_a_text_is_asked_about(tmp_path: Path, form: Any, monkeypatch: Any, capsys: Any) -> None:
    torch.save(form, tmp_path / "p.pt")
    line = failed(tmp_path, monkeypatch, capsys)
    assert "has 77 tokens, as many as a whole text; say what it does: --mechanism additive if" in line
    assert not (tmp_path / "out").exists()
    for mechanism in ("additive", "concat"):
        assert prompts_in(tmp_path / "p.pt", mechanism)[0].mechanism == mechanism


def test_names_that_no_system_takes_are_changed(tmp_path: Path) -> None:
    torch.save({"con": K, "(paren)": K, "../x": K, "\u5200" * 100: K, "": K}, tmp_path / "p.pt")
    paths = written(prompts_in(tmp_path / "p.pt"), tmp_path / "out")
    names = ["con_", "_(paren)", "x", "\u5200" * 20, "prompt"]
    assert [path.name for path in paths] == [f"{name}_00001.safetensors" for name in names]
    assert read(paths[0], "prompt").name == "con"


def test_all_of_a_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    torch.save({"a": K, "b": K}, tmp_path / "p.pt")
    (tmp_path / "out").mkdir()
    there = tmp_path / "out" / "a_00001.safetensors"
    there.write_text("mine")
    put = convert_prompts.put_beside

    def full(data: bytes, path: Path, names: Any) -> Path:
        if path.stem == "b":
            raise NotWritten(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return put(data, path, names)

    monkeypatch.setattr(convert_prompts, "put_beside", full)
    assert 'cannot write "b.safetensors" into the folder "out"' in failed(tmp_path, monkeypatch, capsys)
    assert list((tmp_path / "out").iterdir()) == [there] and there.read_text() == "mine"


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert failed(tmp_path, monkeypatch, capsys).endswith('cannot use "p.pt": no such file or directory')
