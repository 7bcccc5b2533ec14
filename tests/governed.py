"""A policy in a folder of its own, put on the host as a server does, and what runs under it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
from documents import WORDS

from conceptguard.editing.policy.enforce import Enforcement, Told
from conceptguard.editing.policy.file import PolicyFile
from conceptguard.editing.policy.govern import Files
from conceptguard.editing.policy.record import Record
from conceptguard.nodes.discriminator import encoder_of
from conceptguard.nodes.preset_routes import SHIPPED, read_file

CRE: dict[str, Any] = {"method": "CRE", "concept": WORDS, "floor": 0.0}
EIUP: dict[str, Any] = {"method": "EIUP", "concept": WORDS, "weights": [-1, -0.5]}


def preset(*edits: dict[str, Any]) -> str:
    document = {"schema_version": 1, "kind": "concept-guard preset", "name": "No knives", "edits": edits or (CRE,)}
    return json.dumps(document)


def write(folder: Path, *edits: dict[str, Any], rule: dict[str, Any] | None = None, **policy: Any) -> None:
    (folder / "mine.json").write_text(preset(*edits))
    rules = [{"presets": ["mine.json"], **(rule or {})}]
    (folder / "policy.json").write_text(json.dumps({"on": True, "rules": rules, **policy}))


@contextmanager
def governed(folder: Path, *edits: dict[str, Any], **policy: Any) -> Iterator[Enforcement]:
    """While a policy of these edits is on."""
    write(folder, *edits, **policy)
    said: list[str] = []
    files = Files(read_file, lambda artefact, clip: encoder_of(artefact, None, clip))
    asked = Told({"prompt": "p1", "user": "me"}, said.append)
    enforcement = Enforcement(
        PolicyFile(folder / "policy.json", SHIPPED), Record(folder / "record"), files, lambda: asked
    )
    enforcement.said = said  # type: ignore[attr-defined]
    enforcement.refresh()
    try:
        yield enforcement
    finally:
        enforcement.off()


def prompt(clip: Any, text: str) -> Any:
    """As CLIP Text Encode makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(model: Any, clip: Any, text: str = "a knife on a table", negative: str = "", **options: Any) -> Any:
    return tiny.sample(model, prompt(clip, text), prompt(clip, negative), **options)
