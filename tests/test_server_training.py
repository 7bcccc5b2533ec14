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


PICTURES = {
    "words": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": "a fox"}},
    "none": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": ""}},
    "size": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 2}},
    "concept": {
        "class_type": "ConceptGuardConcept",
        "inputs": {"clip": ["demo", 1], "text": "beer mug", "name": "", "neutral": "a cat\na dog"},
    },
    "cre": {
        "class_type": "ConceptGuardCRE",
        "inputs": {
            "model": ["demo", 0],
            "concept": ["concept", 0],
            "strength": 1.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
            "blocks": "all",
        },
    },
}


def training(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A graph that trains for two steps on the demo model, behind CRE, and shows the losses."""
    last = {"steps": 2, "precision": "auto", "checkpointing": True, "model": ["cre", 0], "clip": ["demo", 1]}
    return {**DEMO, **PICTURES, "train": {"class_type": class_type, "inputs": {**last, **inputs}}}


def kpop(**inputs: Any) -> dict[str, Any]:
    settings = {
        "text": "a beer mug",
        "neutral": "a coffee cup",
        "name": "",
        "width": 128,
        "height": 128,
        "learning_rate": 1e-4,
        "prompt_learning_rate": 1e-2,
        "lam": 0.3,
        "prompt_size": 4,
        "mechanism": "concat",
        "blocks": "all",
        "weights": "cross-attention",
        "rank": 0,
        "guidance": 3.0,
        "overshoot": 0.0,
        "path_steps": 4,
        "batch_size": 1,
        "checkpoint_every": 1,
        "resume": True,
    }
    return training("ConceptGuardTrainKPOP", **{**settings, **inputs})


def erasure(**inputs: Any) -> dict[str, Any]:
    settings = {
        "concept": ["concept", 0],
        "method": "ESD-x",
        "neutral": "",
        "width": 128,
        "height": 128,
        "learning_rate": 1e-3,
        "rank": 2,
        "eta": 1.0,
        "guidance": 3.0,
        "path_steps": 4,
        "pictures": 1,
        "batch_size": 1,
        "checkpoint_every": 1,
        "resume": True,
    }
    return training("ConceptGuardTrainErasure", **{**settings, **inputs})


def direction(**inputs: Any) -> dict[str, Any]:
    settings = {
        "concept": ["concept", 0],
        "prompts": "a picture of a beer mug",
        "latent": ["size", 0],
        "goal": "away",
        "learning_rate": 0.01,
        "guidance": 2.0,
        "sampling_steps": 4,
        "cfg": 4.0,
        "start_percent": 0.3,
        "end_percent": 1.0,
    }
    return training("ConceptGuardTrainDirection", **{**settings, **inputs})


def learned(**inputs: Any) -> dict[str, Any]:
    settings = {
        "vae": ["demo", 2],
        "images": ["pictures", 0],
        "name": "",
        "tokens": 2,
        "captions": "a cat",
        "start_from": "",
        "learning_rate": 0.01,
        "batch_size": 2,
        "checkpoint_every": 1,
        "resume": True,
    }
    graph = training("ConceptGuardLearnConcept", **{**settings, **inputs})
    return {**graph, "pictures": plain(0xE01010) | {"inputs": {**plain(0xE01010)["inputs"], "batch_size": 2}}}


@pytest.mark.parametrize(
    ("graph", "output"),
    [
        (kpop(), 3),
        (kpop(rank=2, weights="others", path="fresh", keys_and_values="two", prompt_start="concept"), 3),
        (kpop(weights="all", mechanism="additive", precision="bf16", checkpointing=False), 3),
        (kpop(model=["demo", 0], precision="fp32", overshoot=1.0, lam=0.0), 3),
        (erasure(), 2),
        (erasure(method="ESD-u", path="fresh", rank=0, precision="bf16"), 2),
        (erasure(method="CA", neutral="a coffee cup", checkpointing=False), 2),
        (erasure(method="SDD", model=["demo", 0], precision="fp32"), 2),
        (erasure(method="FMN"), 2),
        (direction(), 2),
        (direction(goal="towards", precision="bf16", checkpointing=False, model=["demo", 0]), 2),
        (learned(), 1),
        (learned(precision="fp32", start_from="a fox", checkpointing=False, model=["demo", 0]), 1),
    ],
    ids=[
        "kpop",
        "kpop, low rank",
        "kpop, additive",
        "kpop, plain",
        "esd-x",
        "esd-u",
        "ca",
        "sdd",
        "fmn",
        "direction",
        "towards",
        "concept",
        "concept, plain",
    ],
)
def test_a_training(host: Host, graph: dict[str, Any], output: int) -> None:
    assert host.images(host.run(previewed(graph, output)))["see"]
    assert not list((host.base / "models" / "concept_guard").rglob("unfinished/*"))


def test_what_was_learned_trains_and_edits_further(host: Host) -> None:
    """The outputs of one training go into another and into the sampler, all of it made in inference mode."""
    graph = previewed(direction(), 2)
    graph["further"] = {
        "class_type": "ConceptGuardTrainDirection",
        "inputs": {**graph["train"]["inputs"], "model": ["train", 1], "steps": 3},
    }
    graph["sample"] = {
        "class_type": "KSampler",
        "inputs": {
            "model": ["further", 1],
            "positive": ["words", 0],
            "negative": ["none", 0],
            "latent_image": ["size", 0],
            "seed": 1,
            "steps": 2,
            "cfg": 4.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        },
    }
    graph["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["demo", 2]}}
    graph["see"]["inputs"]["images"] = ["decode", 0]
    assert host.images(host.run(graph))["see"]
