"""Published files of the authors of the papers, which are pickles, into ours:

    sh tools/start.sh environment.py editing.converters.directions theirs.pth ours.safetensors

torch's weights_only reader takes tensors and plain containers from a pickle and refuses all else, so no code of the
file runs; what comes out is checked as any file of ours before it is written.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.artefacts import Artefact, data_of
from ..files.whole import put

LIMIT = 2**26  # bytes; the published files are far smaller


def weights(path: Path) -> dict[str, Tensor]:
    """The named tensors of a .pt or .pth file. Raises ValueError, with the mend, for any other file."""
    mend = "download it again from its authors"
    if not path.is_file() or path.stat().st_size > LIMIT:
        raise ValueError(f'cannot convert "{path.name}": it is no file of at most {LIMIT} bytes; {mend}')
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        pickle.UnpicklingError,
    ) as error:
        why = str(error).split(". ")[0].splitlines()[:1]
        raise ValueError(f'cannot convert "{path.name}": it does not hold tensors alone {why}; {mend}') from None
    if not isinstance(found, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided for k, v in found.items()
    ):
        raise ValueError(f'cannot convert "{path.name}": it holds no named tensors; {mend}')
    return dict(found)


def safe_region(found: Mapping[str, Tensor], name: str) -> Artefact:
    """The authors' `ptuner`: b [1, 77, 1] and a [1, 1, 768], added to the text encoding as x + beta b a."""
    if set(found) != {"a", "b"} or found["b"].shape[::2] != (1, 1) or found["a"].shape[:2] != (1, 1):
        shapes = {key[:20]: tuple(t.shape) for key, t in list(found.items())[:4]}
        raise ValueError(
            f'"{name}" is not a direction of the safe-region authors (b [1, T, 1] and a [1, 1, W]), but '
            f"{shapes}; choose another form or file"
        )
    b, a = found["b"][0].float(), found["a"][0].float()
    return Artefact(
        "direction",
        name,
        {"b": b, "a": a},
        "safe region",
        text_width=a.shape[1],
        tokens=len(b),
        mechanism="add",
        training={"converted": True},
    )


FORMS: dict[str, Callable[[Mapping[str, Tensor], str], Artefact]] = {"safe-region": safe_region}


def convert(source: Path, target: Path, form: str = "safe-region") -> Path:
    made = FORMS[form](weights(source), source.stem)
    try:
        data = data_of(made)
    except ValueError as error:
        raise ValueError(f'cannot convert "{source.name}": {error}; download it again from its authors') from None
    return put(data, target)


def main() -> Any:
    parser = argparse.ArgumentParser(prog="editing.converters.directions", description=__doc__)
    parser.add_argument("source", type=Path, help="the authors' .pt or .pth file")
    parser.add_argument("target", type=Path, help="our file, best in the models folder concept_guard/")
    parser.add_argument("--form", choices=FORMS, default="safe-region")
    args = parser.parse_args()
    if args.target.suffix != ".safetensors" or args.target.exists():
        parser.error("target must be a new file that ends in .safetensors")
    try:
        print(f"wrote {convert(args.source, args.target, args.form)}")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
