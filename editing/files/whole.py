"""Files that are there whole or not at all: the one way in which anything is written."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

MENDS = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space: what you may store there is used up",
    errno.EROFS: "make its disk writable, or choose another folder",
    errno.EACCES: "let ComfyUI's user write there",
    errno.EPERM: "let ComfyUI's user write there",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ENOTDIR: "a file is in the place of that folder; choose another name",
    errno.EEXIST: "a file is in the place of that folder; choose another name",
    errno.EISDIR: "a folder has that name; choose another",
    errno.EFBIG: "the disk takes no file so large",
}


class NotWritten(ValueError):
    """Names the file and its folder, but not where on the machine that lies, and the mend."""

    def __init__(self, path: Path, error: OSError) -> None:
        why = (error.strerror or type(error).__name__).lower()
        mend = MENDS.get(error.errno or 0, "see that the folder can be written to")
        super().__init__(f'cannot write "{path.name}" into the folder "{path.parent.name}": {why}; {mend}')


def put(data: bytes, path: Path) -> Path:
    """A file with these bytes; an older one of that name is replaced."""
    with whole(path) as part:
        part.write_bytes(data)
    return path


def put_beside(data: bytes, path: Path, names: Callable[[Path], Iterator[Path]] | None = None) -> Path:
    """A new file with these bytes: of the names that `names` makes of the path, the first that nobody has.

    Of several writers at once, each gets a file of its own.
    """
    with in_words(path), beside(path) as part:
        part.write_bytes(data)
        return next(new for new in (names or alike)(path) if moved(part, new))


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; once all went well, the file goes to its place."""
    with in_words(path), beside(path) as part:
        yield part
        os.replace(part, path)


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """What goes wrong while a file is written is told in few words."""
    try:
        yield
    except OSError as error:
        raise NotWritten(path, error) from error


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A short name that nobody has in the same folder, and nothing of that name afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def moved(part: Path, new: Path) -> bool:
    """Give a file another name, unless one has it already."""
    try:
        os.link(part, new)
        return True
    except FileExistsError:
        return False
    except OSError:  # a disk without links: take the name first, then fill it
        return filled(part, new)


def filled(part: Path, new: Path) -> bool:
    try:
        os.close(os.open(new, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    try:
        os.replace(part, new)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return True


def numbered(path: Path) -> Iterator[Path]:
    """name_00001.json, name_00002.json, .., from behind the last that the folder has."""
    pattern = re.compile(rf"{re.escape(path.stem)}_(\d{{5,}})\.[^.]*", re.IGNORECASE)
    taken = [int(found[1]) for name in os.listdir(path.parent) if (found := pattern.fullmatch(name))]
    return (path.with_name(f"{path.stem}_{i:05}{path.suffix}") for i in count(max(taken, default=0) + 1))


def alike(path: Path) -> Iterator[Path]:
    """name.json, name-2.json, name-3.json, .."""
    return (path if i == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}") for i in count(1))
