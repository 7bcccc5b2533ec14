"""Turn learned prompts as KPOP's authors save them (.pt, .pth) into our files, once and by hand.

    sh tools/start.sh environment.py editing.converters.prompts prompt_dict.pt models/concept_guard

Their files are pickles. They are read with `weights_only=True`, which builds tensors, lists and dicts and runs nothing
else; what is in them is then checked as any file of ours. Known forms: a prompt is a tensor [k, W] or [1, k, W], or a
pair of these for keys and values; a file holds one prompt, or {concept: prompt}.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.artefacts import Artefact, data_of
from ..files.names import file_in, safe
from ..files.whole import numbered, put_beside
from ..methods.kpop import prompt_of
from ..training.kpop import METHOD

LIMIT = 2**26  # bytes of a file
MEND = "only prompts of KPOP's authors can be turned into ours"


def prompts_in(path: Path, mechanism: str = "concat", blocks: str = "middle") -> list[Artefact]:
    """The prompts of a published file. Raises ValueError for any other file."""
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(f"it has more than {LIMIT} bytes")
        found = torch.load(path, map_location="cpu", weights_only=True)
        return [made(name, value, mechanism, blocks) for name, value in named(found, path.stem)]
    except Exception as error:  # a damaged pickle can raise anything
        why = " ".join(str(error).split())[:200]
        raise ValueError(f'cannot use "{path.name}": {why or type(error).__name__}; {MEND}') from error


def named(found: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(found, dict):
        yield name, found
        return
    if not found or not all(isinstance(key, str) for key in found):
        raise ValueError("it is no {concept: prompt}")
    yield from found.items()


def made(name: str, value: Any, mechanism: str, blocks: str) -> Artefact:
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f'"{name[:40]}" has {len(pair)} parts, not one for keys and one for values')
    k, v = (rows(part, name) for part in pair)
    if k.shape != v.shape:
        raise ValueError(f'"{name[:40]}" has keys {list(k.shape)} and values {list(v.shape)}')
    n, width = k.shape
    artefact = Artefact(
        "prompt",
        name,
        {"k": k, "v": v},
        METHOD,
        (name,),
        text_width=width,
        tokens=n,
        mechanism=mechanism,
        blocks="all" if mechanism == "additive" else blocks,
    )
    prompt_of(artefact)
    return artefact


def rows(part: Any, name: str) -> Tensor:
    """[k, W] fp32."""
    if not isinstance(part, Tensor) or not part.is_floating_point() or part.layout != torch.strided:
        raise ValueError(f'"{name[:40]}" is no tensor of numbers')
    part = part.detach()[0] if part.ndim == 3 and len(part) == 1 else part.detach()
    if part.ndim != 2 or not 0 < part.numel() < LIMIT:
        raise ValueError(f'"{name[:40]}" has the shape {list(part.shape)}, not [k, W]')
    return part.to(torch.float32).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(prog="editing.converters.prompts", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path, help="where the prompts go: ComfyUI's models/concept_guard")
    parser.add_argument("--mechanism", choices=("concat", "additive"), default="concat")
    parser.add_argument("--blocks", default="middle", help='where they were learned: "middle", "middle,output", "all"')
    args = parser.parse_args()
    for artefact in prompts_in(args.file, args.mechanism, args.blocks):
        path = file_in(args.folder, safe(artefact.name, "prompt"))
        print(f"wrote {put_beside(data_of(artefact), path, numbered)}")


if __name__ == "__main__":
    main()
