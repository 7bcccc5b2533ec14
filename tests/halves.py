"""Two runs of the tests beside each other: whichever comes to a file first has all of its tests, the other none.

`make test` gives both runs the same empty folder as CONCEPT_GUARD_SHARE. Whatever a file costs here and today, the runs
end within a file of each other, and no list of costs has to be kept.
"""

from __future__ import annotations

from pathlib import Path

import pytest


class Half:
    """What one of the runs has: the files whose names it was the first to write into the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[Path, bool] = {}

    def has(self, file: Path) -> bool:
        if file not in self.files:
            try:
                (self.folder / f"{file.parent.name}-{file.name}").touch(exist_ok=False)
                self.files[file] = True
            except FileExistsError:
                self.files[file] = False
        return self.files[file]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        return None if self.has(item.path) else True  # dealt with
