"""What a method, its source, its options, a preset's parts and a backbone are is asked of them, not guessed by type."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TYPES = {
    "Concept", "PromptTokens", "Direction", "CREOptions", "EIUPOptions", "Draw", "PresetGate",
    "Words", "LearnedFile", "Edit", "ConceptEdit", "CREEdit", "EIUPEdit", "KPOPEdit", "DirectionEdit",
    "ImageGate", "PromptGate", "InFlightGate", "Backbone", "UNet",
    "UNetModel", "BasicTransformerBlock", "SpatialTransformer", "SpatialVideoTransformer",
}  # fmt: skip

# Where a type is asked for all the same: how often, and why.
REASONS = {
    "editing/engine/backbones/unet.py": (3, "what kind of network a MODEL has is the very question"),
    "editing/gates/gates.py": (1, "a prompt is compared with a concept, or judged by a discriminator: two sockets"),
    "editing/presets/parts.py": (1, "pydantic asks which of two documents a value is"),
    "editing/training/harness.py": (
        2,
        "whether weights can be trained, and which modules can compute their inner values again",
    ),
    "jobs/train_direction.py": (1, "an optional socket, of which only a learned one will do"),
    "nodes/gates.py": (1, "an optional socket"),
    "nodes/preset.py": (1, "one socket takes two types"),
    "nodes/learn_concept.py": (1, "only a learned one can be saved"),
}


def asked() -> Counter[str]:
    found: Counter[str] = Counter()
    for folder in ("editing", "jobs", "nodes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                    names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                    found[path.relative_to(ROOT).as_posix()] += bool(names & TYPES)
    return +found


def test_types_are_asked_for_where_there_is_a_reason() -> None:
    assert asked() == {path: often for path, (often, _) in REASONS.items()}
    assert sum(often for often, _ in REASONS.values()) <= 12


def test_only_backbones_know_a_network() -> None:
    """attn2, the host's classes and the sides of a UNet: behind the seam."""
    for folder in ("editing", "nodes", "jobs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            text = path.read_text(encoding="utf-8")
            if "/backbones/" not in name and not name.startswith("editing/training/"):
                assert "UNetModel" not in text and "to_k.in_features" not in text, name
