"""Names of files: a strict rule for those that we write, and a wide one for those that are there to be read."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

# What every system takes: a letter first, no reserved name, nothing that a shell or a path reads otherwise.
PART = re.compile(r"(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))\w[\w ()+,=@-]*(?:\.[\w ()+,=@-]+)*", re.IGNORECASE)
BYTES = 150  # of a file's or folder's name; most systems take 255, to which a number and an ending count
DEPTH = 8  # folders inside one another
CLOCK = {"year": "yyyy", "month": "MM", "day": "dd", "hour": "hh", "minute": "mm", "second": "ss"}


def file_in(folder: Path, name: str, ending: str = ".safetensors") -> Path:
    """Where to write: folder/name.safetensors for a name such as "sharp things" or "mine/sharp things".

    Never outside the folder. Raises ValueError, with the mend, for a name that some system would not take.
    """
    name = name.strip().removesuffix(ending)
    parts = name.split("/")
    if "%" in name:
        raise ValueError(
            f"{name[:60]!r} has a % that stands for nothing here; write %date:yyyy-MM-dd%, %year%, %month%, %day%, "
            "%hour%, %minute% or %second%"
        )
    longest = max(parts, key=size)
    if size(longest) > BYTES:
        raise ValueError(
            f'"{longest[:20]}.." has {size(longest)} bytes, and the name of a file or folder has at most {BYTES} here '
            "(a letter beyond a-z takes 2 to 4); shorten it"
        )
    if len(parts) > DEPTH or not all(PART.fullmatch(part) and not part.endswith(" ") for part in parts):
        raise ValueError(
            f"{name[:60]!r} cannot name a file here; use letters, digits, spaces and - _ , with / for a "
            "folder inside the models folder"
        )
    path = folder.joinpath(*parts[:-1], f"{parts[-1]}{ending}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of the models folder by a link; choose another name")
    return path


def size(text: str) -> int:
    """Its bytes, as a disk counts them."""
    return len(text.encode(errors="replace"))


def safe(name: str, otherwise: str) -> str:
    """A name like this one that `file_in` takes; `otherwise` if nothing of it remains."""
    part = shortened(re.sub(r"[^\w ()+,=@-]+", "_", name).strip(" _"), 60) or otherwise
    for candidate in (part, f"{part}_", f"_{part}"):
        if PART.fullmatch(candidate):
            return candidate
    return otherwise


def shortened(text: str, most: int) -> str:
    """Its first letters that have no more than so many bytes in all."""
    return text.encode(errors="ignore")[:most].decode(errors="ignore").strip()


def inside(name: str) -> str:
    """A name of a file that is there, in the host's own spelling: whatever it lists, links too. Raises ValueError for
    one that leads out of the folder by its path."""
    parts = re.split(r"[/\\]" if os.sep == "\\" else "/", name)
    if ".." in parts or os.path.isabs(name) or os.path.splitdrive(name)[0] or "\0" in name:
        raise ValueError(f"{name[:60]!r} leads out of the models folder; choose a file inside it")
    return name


def is_learned(name: str) -> bool:
    return name.lower().endswith(".safetensors")


def dated(prefix: str, now: datetime | None = None) -> str:
    """With the date and time in place of %date:yyyy-MM-dd%, %year%, .. as the host's save nodes have it."""
    now = now or datetime.now()

    def value(found: re.Match[str]) -> str:
        if found[1].startswith("date:"):
            return formatted(found[1].removeprefix("date:"), now)
        return formatted(CLOCK[found[1]], now) if found[1] in CLOCK else found[0]

    return re.sub("%([^%]+)%", value, prefix)


def formatted(text: str, now: datetime) -> str:
    """The host's page writes dates so: yy or yyyy, and M, d, h (of 24), m and s, with a leading 0 if doubled."""
    numbers = {"M": now.month, "d": now.day, "h": now.hour, "m": now.minute, "s": now.second}

    def value(found: re.Match[str]) -> str:
        sign = found[0]
        if sign.startswith("y"):
            return f"{now.year:04}"[-len(sign) :]
        return str(numbers[sign[0]]).zfill(len(sign))

    return re.sub("yyyy|yy|MM?|dd?|hh?|mm?|ss?", value, text)
