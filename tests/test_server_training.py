"""Every node that learns, in a real ComfyUI server: it runs nodes in inference mode, where autograd refuses tensors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from conceptguard.tools.host import Host

pytestmark = pytest.mark.server

SEEDS = itertools.count()
DEMO = {"demo": {"class_type": "ConceptGuardLoadDemo", "inputs": {}}}
CONCEPT, OTHER = "knife mug spoon owl fox", "cat tree book lamp hill"


def plain(color: int) -> dict[str, Any]:
    inputs = {"width": 64, "height": 64, "batch_size": 12, "color": color}
    return {"class_type": "EmptyImage", "inputs": inputs}


def previewed(graph: dict[str, Any], output: int) -> dict[str, Any]:
    """The graph with its node "train", whose picture is the given output, of a seed that no run before had."""
    graph["train"]["inputs"]["seed"] = next(SEEDS)
    return {**graph, "see": {"class_type": "PreviewImage", "inputs": {"images": ["train", output]}}}


def discriminator(**inputs: Any) -> dict[str, Any]:
    pictures = {"red": plain(0xE01010), "blue": plain(0x1010E0)}
    sources = {"concept_images": ["red", 0], "other_images": ["blue", 0]}
    settings = {"name": "red", "false_positive_rate": 0.01, "copies": 1, **sources, **inputs}
    return {**pictures, "train": {"class_type": "ConceptGuardTrainDiscriminator", "inputs": settings}}


def prompt_discriminator() -> dict[str, Any]:
    lines = {"concept_prompts": CONCEPT.replace(" ", "\n"), "other_prompts": OTHER.replace(" ", "\n")}
    settings = {"clip": ["demo", 1], "name": "things", "false_positive_rate": 0.01, **lines}
    return {**DEMO, "train": {"class_type": "ConceptGuardTrainPromptDiscriminator", "inputs": settings}}


@pytest.mark.parametrize("copies", [0, 1])
def test_a_discriminator_of_pictures(host: Host, copies: int) -> None:
    assert host.images(host.run(previewed(discriminator(copies=copies), 3)))["see"]


def test_a_discriminator_of_prompts(host: Host) -> None:
    assert host.images(host.run(previewed(prompt_discriminator(), 3)))["see"]
