"""A report from its beginning to its end: what a node and a command both call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .apart import Apart
from .draw import Studio
from .page import write
from .prompts import Case
from .work import PATIENCE, Tell, Work


@dataclass(frozen=True)
class Report:
    """folder: where all of it lies; about: names and hashes, at least `checkpoint` and `preset`."""

    folder: Path
    cases: Sequence[Case]
    studio: Studio
    about: dict[str, Any]
    size: tuple[int, int]  # width and height of a picture, pixels
    apart: Apart = Apart()

    @property
    def settings(self) -> dict[str, Any]:
        """All that the pictures and scores depend on."""
        studio, (width, height) = self.studio, self.size
        how = {key: value for key, value in asdict(studio.how).items() if key != "batch"}
        judges = {look.name: look.key for look in studio.looks}
        return {**self.about, **how, "negative": studio.negative, "size": f"{width} x {height}", "judges": judges}

    @property
    def work(self) -> Work:
        return Work(self.folder, self.cases, tuple(self.studio.models))

    def estimate(self) -> str:
        """Begin in the folder, and say what it will take; raises ValueError where that cannot be."""
        self.work.begin(self.settings)
        labels = sum(look.labels for look in self.studio.looks)
        return self.work.check_room(*self.size, labels)

    def draw(self, tell: Tell, patience: float = PATIENCE) -> None:
        names = [look.name for look in self.studio.looks]
        if len(set(names)) < len(names):
            raise ValueError(f"two discriminators have the same name ({', '.join(names)}); rename one of them")
        self.work.run(self.studio.draw, self.studio.look, tell, patience)

    def write(self, tell: Tell = lambda *_: None) -> Path:
        """The page, once all is drawn."""
        kinds = {look.name: look.kind for look in self.studio.looks}
        return write(self.work, self.settings | self.apart.settings, kinds, self.apart.figures(self.work, tell))

    def __call__(self, tell: Tell, said: Callable[[str], None] = lambda _: None) -> Path:
        said(self.estimate())
        self.draw(tell)
        return self.write(tell)
