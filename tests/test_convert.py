"""The authors' pickles: converted without running anything of theirs, or refused."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import tiny
import torch

from conceptguard.editing.converters.directions import convert, main, weights
from conceptguard.editing.files.artefacts import read
from conceptguard.editing.methods.safe_region import direction_of


def published(path: Path, **changes: Any) -> Path:
    """As torch.save(ptuner().state_dict()) writes it."""
    g = torch.Generator().manual_seed(0)
    torch.save({"b": torch.randn(1, 77, 1, generator=g), "a": torch.randn(1, 1, 768, generator=g), **changes}, path)
    return path


def test_a_published_direction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    source = published(tmp_path / "safe-direction.pth")
    monkeypatch.setattr("sys.argv", ["convert", str(source), str(tmp_path / "x.safetensors")])
    main()
    direction = direction_of(read(tmp_path / "x.safetensors", "direction"))
    found = torch.load(source, weights_only=True)
    assert torch.equal(direction.d, (found["b"] @ found["a"])[0]) and direction.name == "safe-direction"
    assert direction.width == 768 and "wrote" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # never over another file
        main()


class Exploit:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploited",)


def test_pickles_that_would_run_code_or_hold_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Exploit()))
    torch.save({"a": Exploit()}, tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(b"nothing")
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Exploit()))
    torch.save([torch.zeros(1)], tmp_path / "e.pt")
    (tmp_path / "f.pt").write_bytes(published(tmp_path / "x.pt").read_bytes()[:900])
    with (tmp_path / "g.pt").open("wb") as big:
        big.truncate(2**26 + 1)
    for name in "abcdefgh":
        with pytest.raises(ValueError, match=f'cannot convert "{name}.pt"'):
            weights(tmp_path / f"{name}.pt")
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize(
    "changes", [{"b": torch.zeros(77)}, {"c": torch.zeros(1)}, {"a": torch.full((1, 1, 768), float("nan"))}]
)
def test_tensors_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], monkeypatch: Any, capsys: Any) -> None:
    source, target = published(tmp_path / "x.pt", **changes), tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match='"x.pt".* holds NaN or infinity; download it|"x" is not a direction of'):
        convert(source, target)
    monkeypatch.setattr("sys.argv", ["convert", str(source), str(target)])
    with pytest.raises(SystemExit):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("editing.converters.directions: ") and os.listdir(tmp_path) == ["x.pt"]


def test_spms_files_need_no_converter() -> None:
    """Rank 1, names as in their repository: lora_unet, diffusers' path with underscores, and alpha. The host's own
    loader patches every one of them."""
    paths = [
        "down_blocks_0_attentions_0_proj_in",
        "down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "mid_block_attentions_0_transformer_blocks_0_attn2_to_v",
        "up_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0",
    ]
    of = {
        paths[0]: "input_blocks.1.1.proj_in",
        paths[1]: "input_blocks.3.1.transformer_blocks.0.ff.net.0.proj",
        paths[2]: "middle_block.1.transformer_blocks.0.attn2.to_v",
        paths[3]: "output_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
    }
    model, tensors = tiny.sd1(), {}
    held = model.model.diffusion_model.state_dict()
    for path in paths:
        out, rank_in, *rest = held[f"{of[path]}.weight"].shape
        tensors |= {
            f"lora_unet_{path}.lora_up.weight": torch.ones(out, 1, *(1 for _ in rest)),
            f"lora_unet_{path}.lora_down.weight": torch.ones(1, rank_in, *rest),
            f"lora_unet_{path}.alpha": torch.tensor(1.0),
        }
    loaded, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    assert {name.removeprefix("diffusion_model.") for name in loaded.patches} == {
        f"{of[path]}.weight" for path in paths
    }
