"""Texts of a preset, which come from anybody: nothing in them hides, names a file, or leads out of a folder."""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, Field

JOINERS = "\u200c\u200d"  # several scripts cannot be written without them


def plain(text: str, allowed: str = "") -> str:
    """Raise for characters that do not show, or change how others show."""
    for c in text:
        if c not in allowed and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            raise ValueError(f"holds the invisible character U+{ord(c):04X}; take it out")
    return text


def line(text: str, allowed: str = "") -> str:
    if plain(text, allowed) != text.strip():
        raise ValueError("begins or ends with a space; take it away")
    return text


def name(text: str) -> str:
    if line(text) != unicodedata.normalize("NFC", text):
        raise ValueError("is not in Unicode's composed form (NFC); write it anew")
    return text


def phrase(text: str) -> str:
    if "embedding:" in line(text, JOINERS).lower():  # the host's text encoders read a file there
        raise ValueError('names a file ("embedding:"); a phrase of a preset is words alone')
    return text


def file_name(text: str) -> str:
    if not text.lower().endswith(".safetensors") or any(c in '/\\:*?"<>|' for c in name(text)) or text.startswith("."):
        raise ValueError("must be the bare name of a .safetensors file, without a folder")
    return text


Name = Annotated[str, Field(min_length=1, max_length=80), AfterValidator(name)]
Phrase = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(phrase)]
Prose = Annotated[str, Field(max_length=4000), AfterValidator(lambda text: plain(text, "\n" + JOINERS))]
Line = Annotated[str, Field(max_length=200), AfterValidator(line)]
Percent = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
