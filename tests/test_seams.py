"""What a method, its source, its options, a preset's parts and a backbone are is asked of them, not guessed by type."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Sources, gates, parts of presets, methods and backbones: these, whatever derives from them, and the host's networks.
ROOTS = {"Concept", "PromptTokens", "Direction", "Gate", "PresetGate", "Part", "Method", "Backbone"}
NETWORKS = {"UNetModel", "BasicTransformerBlock", "SpatialTransformer", "SpatialVideoTransformer"}

# Where a type is asked for all the same: how often, and why.
REASONS = {
    "editing/engine/backbones/unet.py": (4, "what kind of network and block a MODEL has is the very question"),
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


def trees() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("editing", "jobs", "nodes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def types() -> set[str]:
    """Of the roots, those of their kind that there are today, and all options."""
    classes = [node for _, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bases = {each.name: {base.id for base in each.bases if isinstance(base, ast.Name)} for each in classes}
    found = ROOTS | NETWORKS | {name for name in bases if name.endswith("Options")}
    while further := {name for name, of in bases.items() if of & found} - found:
        found |= further
    return found


def asked() -> Counter[str]:
    found: Counter[str] = Counter()
    known = types()
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                found[name] += bool({n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & known)
    return +found


def test_the_types_are_found() -> None:
    assert {"CREOptions", "SAFREEOptions", "KPOPEdit", "InFlightGate", "Words", "Draw", "Joint", "UNet"} <= types()


def test_types_are_asked_for_where_there_is_a_reason() -> None:
    assert asked() == {path: often for path, (often, _) in REASONS.items()}
    assert sum(often for often, _ in REASONS.values()) <= 12


WORDS = (*NETWORKS, "attn2", "transformer_blocks", "input_blocks", "middle_block", "output_blocks", "double_blocks")
TOLD = {"editing/engine/rows.py": ["attn2"]}  # where other packs' patches lie, whose names are asked for


def test_only_backbones_know_a_network() -> None:
    """The host's classes, attn2 and the parts of networks: behind the seam, or where weights are trained."""
    for name, tree in trees():
        if "/backbones/" not in name and not name.startswith("editing/training/"):
            text = ast.unparse(tree)
            assert [word for word in sorted(WORDS) if word in text] == TOLD.get(name, []), name
