"""How far the edited pictures lie from the unedited, and from real ones: the figures that need pictures themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .distances import RANK, Inception, Perceptual, fid, kid
from .figures import FEW, Figure, bootstrap
from .prompts import KEEP, PICTURES
from .work import UNEDITED, Tell, Work


@dataclass(frozen=True)
class Apart:
    """inception: for FID and KID; real: a folder of real pictures, for these as well; perceptual: for LPIPS."""

    inception: Inception | None = None
    real: Path | None = None
    perceptual: Perceptual | None = None

    def __post_init__(self) -> None:
        if self.real is not None and self.inception is None:
            raise ValueError("pictures are compared with real ones by FID and KID; give weights for these as well")
        if self.real is not None and len(pictures_in(self.real)) < 2:
            raise ValueError(f'"{self.real.name}" is no folder with pictures; give one with {RANK} or more')

    @property
    def settings(self) -> dict[str, Any]:
        """The weights that it looks with. No picture depends on them: they are not part of what makes a report."""
        own = {"inception": self.inception, "lpips": self.perceptual}
        out: dict[str, Any] = {f"{name} weights": it.key for name, it in own.items() if it is not None}
        return out | ({"real pictures": self.real.name} if self.real else {})

    def figures(self, work: Work, tell: Tell) -> list[Figure]:
        """Of all sides but the unedited."""
        stay = [i for i, case in enumerate(work.cases) if case.kind == KEEP]
        go = [i for i, case in enumerate(work.cases) if case.kind != KEEP]
        out = []
        if self.perceptual is not None:
            for side in work.sides[1:]:
                for which, name, better in ((stay, "stay", "low"), (go, "go", "high")):
                    found = [self.between(work, i, side, tell) for i in which]
                    out += bootstrap(f"LPIPS of what is to {name}", side, found, better=better)
        if self.inception is not None and len(stay) > 1:
            out += self.inceptions(self.inception, work, stay, tell)
        return out

    def between(self, work: Work, i: int, side: str, tell: Tell) -> float:
        assert self.perceptual is not None
        tell(i, len(work.cases), f"LPIPS, {side}")
        return self.perceptual.between(work.picture(i, UNEDITED), work.picture(i, side))

    def inceptions(self, network: Inception, work: Work, stay: Sequence[int], tell: Tell) -> list[Figure]:
        def seen(files: Sequence[Path], what: str) -> Tensor:
            return network.features(files, lambda done: tell(done, len(files), f"features, {what}"))

        of = {side: seen([work.picture(i, side) for i in stay], side) for side in work.sides}
        out = [each for side in work.sides[1:] for each in distances(of[UNEDITED], of[side], side, "unedited")]
        if self.real is not None:
            real = seen(pictures_in(self.real), "real pictures")
            out += [each for side in work.sides for each in distances(real, of[side], side, "real pictures")]
        return out


def distances(x: Tensor, y: Tensor, side: str, to: str) -> list[Figure]:
    """Of features [n, d] and [m, d]."""
    n = min(len(x), len(y))
    found = ("FID", fid(x, y), RANK), ("KID", kid(x, y), FEW)
    return [
        Figure(f"{name} of what is to stay, to {to}", side, it.value, it.low, it.high, n, "", "low", enough)
        for name, it, enough in found
    ]


def pictures_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f'there is no folder of real pictures "{folder.name}"')
    return sorted(each for each in folder.rglob("*") if each.suffix.lower() in PICTURES)
