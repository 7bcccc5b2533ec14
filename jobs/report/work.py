"""The work of a report in a folder: pictures and scores, each a file that is there whole or not at all.

A run that ended anyhow goes on where it stopped, and any number of workers, on machines that share the folder, take
cases from it: a worker claims a case by a file, keeps that file young while it works, and another takes over the claims
of one that died. All ends in the same files, whoever made them.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...editing.files.header import json_of
from ...editing.files.whole import beside, in_words, moved, put
from .prompts import Case

UNEDITED, EDITED = SIDES = "unedited", "edited"
PATIENCE = 900.0  # seconds without a sign of life, after which the claim of a worker elsewhere is taken over
WAIT = 0.5  # seconds between looks at what others still draw
SCORE_BYTES = 4096  # of a picture's scores and account, at most what they usually take
LABEL_BYTES = 48  # of a class of a classifier in them

Step = Callable[[], None]  # called often while a picture is drawn; raises to end the work
Draw = Callable[[Case, str, Step], bytes]  # a case and a side: the picture's file
Look = Callable[[bytes, Case], dict[str, Any]]  # what there is to say of a picture's file
Tell = Callable[[int, int, str], None]  # done, of how many, in words


@dataclass(frozen=True)
class Work:
    """cases: in their order; sides: "unedited", "edited" and peers, drawn one after the other for each case."""

    path: Path
    cases: Sequence[Case]
    sides: Sequence[str]

    def picture(self, i: int, side: str) -> Path:
        return self.path / "pictures" / f"{i:06}-{side}.png"

    def score(self, i: int, side: str) -> Path:
        return self.path / "scores" / f"{i:06}-{side}.json"

    def claim(self, i: int) -> Path:
        return self.path / "claims" / f"{i:06}"

    def done(self, i: int) -> bool:
        return all(self.score(i, side).is_file() for side in self.sides)

    def missing(self) -> list[int]:
        """The cases that are not done; a look at the folder for all of them."""
        there = self.scored()
        whole = [all(self.score(i, side).name in there for side in self.sides) for i in range(len(self.cases))]
        return [i for i, done in enumerate(whole) if not done]

    def scored(self) -> set[str]:
        """The names of the files of scores."""
        folder = self.path / "scores"
        return {each.name for each in os.scandir(folder)} if folder.is_dir() else set()

    def begin(self, settings: dict[str, Any]) -> None:
        """Say what the folder is for; raises ValueError if it is for something else already."""
        own = {**settings, "sides": list(self.sides), "cases": [asdict(case) for case in self.cases]}
        text = json.dumps(own, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        file = self.path / "settings.json"
        with in_words(file), beside(file) as part:
            part.write_text(text, encoding="utf-8")
            moved(part, file)
        there = read_json(file)
        if there != json.loads(text):
            other = sorted(key for key in {*there, *own} if there.get(key) != json.loads(text).get(key))
            raise ValueError(
                f'the folder "{self.path.name}" holds a report of other {", ".join(other)}; choose another folder, '
                "or delete it"
            )

    def check_room(self, width: int, height: int, labels: int = 0) -> str:
        """What the report takes on the disk, in words; raises ValueError if there is less. labels: of all judges."""
        there = self.scored()
        left = sum(self.score(i, side).name not in there for i in range(len(self.cases)) for side in self.sides)
        need = left * (
            width * height * 3 + SCORE_BYTES + LABEL_BYTES * labels
        )  # a picture of noise, which no PNG makes smaller
        free = shutil.disk_usage(self.path if self.path.is_dir() else self.path.parent).free
        if need > free:
            raise ValueError(
                f'the report may take {size(need)} in the folder "{self.path.name}", whose disk has {size(free)} free; '
                "make room, or give fewer prompts"
            )
        return f"{left} pictures to draw, at most {size(need)} on the disk ({size(free)} free)"

    def run(self, draw: Draw, look: Look, tell: Tell, patience: float = PATIENCE) -> None:
        """Draw and judge all that is missing; returns when nothing is, also if others did it."""
        todo, most = self.missing(), len(self.cases)
        while todo:
            left: list[int] = []
            for at, i in enumerate(todo):
                tell(most - len(todo) + at - len(left), most, f"{self.cases[i].prompt[:60]}")
                if not self.done(i) and not self.took(i, draw, look, patience):
                    left.append(i)
            if left:
                time.sleep(WAIT)
            todo = [i for i in left if not self.done(i)]
        tell(len(self.cases), len(self.cases), "all pictures drawn")

    def took(self, i: int, draw: Draw, look: Look, patience: float) -> bool:
        """Draw a case, unless another has it."""
        if not claimed(self.claim(i), patience):
            return False
        try:
            self.one(i, draw, look)
        finally:
            self.claim(i).unlink(missing_ok=True)
        return True

    def one(self, i: int, draw: Draw, look: Look) -> None:
        """A case; what is there already stays."""
        case, claim = self.cases[i], self.claim(i)

        def alive() -> None:
            if claim.exists():
                os.utime(claim)

        for side in self.sides:
            if not self.picture(i, side).is_file():
                put(draw(case, side, alive), self.picture(i, side))
            if not self.score(i, side).is_file():
                seen = look(self.picture(i, side).read_bytes(), case)
                text = json.dumps(seen, ensure_ascii=False, allow_nan=False)
                put(text.encode(), self.score(i, side))

    def results(self) -> list[dict[str, dict[str, Any]]]:
        """What was said of each case's pictures, by side; raises ValueError if some are missing."""
        if missing := self.missing():
            raise ValueError(f"{len(missing)} of {len(self.cases)} cases are not drawn yet; run the report again")
        return [{side: read_json(self.score(i, side)) for side in self.sides} for i in range(len(self.cases))]


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json_of(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f'"{file.name}" cannot be read ({error}); delete it, and run the report again') from None
    if not isinstance(value, dict):
        raise ValueError(f'"{file.name}" is damaged; delete it, and run the report again')
    return value


def size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def sides_of(names: Iterable[str], taken: Sequence[str] = SIDES) -> list[str]:
    """A side for each name of a peer, such as its files can be called: "SLD, max" is "sld-max"."""
    out = list(taken)
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "peer"
        more = (f"{plain}-{i}" for i in itertools.count(2))
        out.append(next(each for each in itertools.chain([plain], more) if each not in out))
    return out[len(taken) :]


# --- claims ----------------------------------------------------------------------------------------------------------


def claimed(file: Path, patience: float = PATIENCE) -> bool:
    """Claim a case, unless a worker that lives has it. Should two take over the same claim in the same instant, both
    draw the case, and write the same."""
    if file.exists():
        if not abandoned(file, patience):
            return False
        file.unlink(missing_ok=True)
    with in_words(file), beside(file) as part:
        part.write_text(f"{socket.gethostname()} {os.getpid()}", encoding="utf-8")
        return moved(part, file)


def abandoned(file: Path, patience: float) -> bool:
    """Whether the worker of a claim has died: at once if it was one of this machine, else after its patience."""
    try:
        host, _, number = file.read_text(encoding="utf-8").rpartition(" ")
        age = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return True
    if host == socket.gethostname() and number.isdigit():
        return int(number) == os.getpid() or not lives(int(number))
    return age > patience


def lives(number: int) -> bool:
    if os.name == "nt":  # where a signal of 0 would end it
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
