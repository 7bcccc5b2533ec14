"""The converter of published prompts: their forms, and files that only look like one."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conceptguard.editing.converters import prompts as convert_prompts
from conceptguard.editing.converters.prompts import main, prompts_in
from conceptguard.editing.files.artefacts import read
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
    ],
    ids=["a tensor", "half, with a batch", "keys and values", "several concepts", "parameters"],
)
def test_known_forms(tmp_path: Path, form: Any, names: list[str], v: torch.Tensor) -> None:
    torch.save(form, tmp_path / "p.pt")
    found = prompts_in(tmp_path / "p.pt")
    assert [each.name for each in found] == names
    for each in found:
        prompt = prompt_of(each)
        assert torch.equal(prompt.k[0], K) and torch.equal(prompt.v[0], v)
        assert (prompt.mechanism, prompt.blocks, each.tokens, each.text_width) == ("concat", "middle", 2, 3)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    "form",
    [3, "text", {}, {1: K}, [K], [K, V, V], [K, V[:1]], K[0], K[None, None], K.long(), K * torch.nan, {"a": {"b": K}}],
    ids=repr,
)
def test_anything_else_is_refused(tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(form, tmp_path / "p.pt")
    monkeypatch.setattr(sys, "argv", ["convert_prompts", str(tmp_path / "p.pt"), str(tmp_path / "out")])
    with pytest.raises(ValueError):
        main()
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


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
