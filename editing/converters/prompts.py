"""Turn learned prompts as KPOP's authors save them (.pt, .pth) into our files, once and by hand.

    sh tools/start.sh environment.py editing.converters.prompts prompt_dict.pt models/concept_guard

Their files are pickles. They are read with `weights_only=True`, which builds tensors, lists and dicts and runs nothing
else; what is in them is then checked as any file of ours. Known forms: a prompt is a tensor [k, W] or [1, k, W], or a
pair of these for keys and values, in a list or as {p_k, p_v}; a file holds one prompt, or {concept: prompt}.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..edits.encode import CONTEXT
from ..files.artefacts import Artefact, data_of
from ..files.names import file_in, safe
from ..files.whole import numbered, put_beside
from ..methods.kpop import prompt_of
from ..training.kpop import METHOD

LIMIT = 2**26  # bytes of a file
PAIRS = ({"p_k", "p_v"}, {"k", "v"})  # names of what is for keys and what for values
MEND = "only prompts of KPOP's authors can be turned into ours"


class Unclear(ValueError):
    """A file may mean several things, and only a person knows which."""


def prompts_in(path: Path, mechanism: str | None = None, blocks: str = "middle") -> list[Artefact]:
    """The prompts of a published file. Raises ValueError for any other file, and for one that can be read two ways."""
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(f"it has more than {LIMIT} bytes")
        found = torch.load(path, map_location="cpu", weights_only=True)
        prompts = [made(name, value, mechanism, blocks) for name, value in named(found, path.stem)]
        for prompt in prompts:
            data_of(prompt)  # refuses what could not be read again, such as NaN
        return prompts
    except Unclear:
        raise
    except OSError as error:
        raise ValueError(f'cannot use "{path.name}": {(error.strerror or "no file").lower()}') from error
    except Exception as error:  # a damaged pickle can raise anything
        why = " ".join(str(error).split())[:200]
        raise ValueError(f'cannot use "{path.name}": {why or type(error).__name__}; {MEND}') from error


def named(found: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(found, dict) or is_pair(found):
        yield name, found
        return
    if not found or not all(isinstance(key, str) for key in found):
        raise ValueError("it is no {concept: prompt}")
    yield from found.items()


def is_pair(value: Any) -> bool:
    return isinstance(value, dict) and set(value) in PAIRS


def made(name: str, value: Any, mechanism: str | None, blocks: str) -> Artefact:
    if is_pair(value):
        value = [value[key] for key in sorted(value)]
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f'"{name[:40]}" has {len(pair)} parts, not one for keys and one for values')
    k, v = (rows(part, name) for part in pair)
    if k.shape != v.shape:
        raise ValueError(f'"{name[:40]}" has keys {list(k.shape)} and values {list(v.shape)}')
    n, width = k.shape
    if mechanism is None and n == CONTEXT:
        raise Unclear(
            f'"{name[:40]}" has {n} tokens, as many as a whole text; say what it does: --mechanism additive if it is '
            "added to a text's encoding, --mechanism concat if it is appended to it. One that stands in a text's "
            "place, as in some of the authors' files, cannot be used here"
        )
    mechanism = mechanism or "concat"
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


def written(prompts: Sequence[Artefact], folder: Path) -> list[Path]:
    """A new file for each, or none at all."""
    ready = [(data_of(prompt), file_in(folder, safe(prompt.name, "prompt"))) for prompt in prompts]
    paths: list[Path] = []
    try:
        for data, path in ready:
            paths.append(put_beside(data, path, numbered))
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(prog="editing.converters.prompts", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path, help="where the prompts go: ComfyUI's models/concept_guard")
    parser.add_argument("--mechanism", choices=("concat", "additive"), help="how they join a text; asked if unclear")
    parser.add_argument("--blocks", default="middle", help='where they were learned: "middle", "middle,output", "all"')
    args = parser.parse_args()
    try:
        for path in written(prompts_in(args.file, args.mechanism, args.blocks), args.folder):
            print(f"wrote {path}")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
