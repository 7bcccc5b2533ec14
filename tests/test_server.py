"""The pack in a real ComfyUI server: it loads, and every example workflow runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from conceptguard.demo import lora
from conceptguard.tools.host import Host, HostError
from conceptguard.tools.workflow import to_api

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))

pytestmark = pytest.mark.server


# The same graph with another loader: its checkpoint is the user's.
TWINS = {"erase-a-concept-checkpoint": "erase-a-concept", "safety-preset-checkpoint": "safety-preset"}
# And for transformers, whose files are the user's too: test_transformer_templates has small ones.
TRANSFORMERS = {f"erase-a-concept-{name}" for name in ("flux", "z-image", "qwen-image")}
RUNNABLE = [path for path in EXAMPLES if path.stem not in {*TWINS, *TRANSFORMERS}]


@pytest.fixture(autouse=True, scope="module")
def demo_lora(host: Host) -> None:
    """The LoRA that two-concepts-with-lora names: a user chooses one of theirs, a server without a browser has none."""
    lora.write(host.base / "models" / "loras")


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def test_the_pack_loads(host: Host) -> None:
    from conceptguard.nodes import NODES

    assert "IMPORT FAILED" not in host.log()
    known = host.get("/object_info")
    for node in NODES:
        node_id = node.GET_SCHEMA().node_id
        assert node_id.startswith("ConceptGuard")
        assert node_id in known
        assert known[node_id]["python_module"] == "custom_nodes.ConceptGuard"


def test_the_host_lists_the_examples(host: Host) -> None:
    templates = host.get("/api/workflow_templates").get("ConceptGuard", [])
    assert sorted(templates) == sorted(path.stem for path in EXAMPLES)


def test_a_refused_prompt_names_the_node(host: Host) -> None:
    with pytest.raises(HostError, match=r"EmptyImage \(node 7\): .*width"):
        host.run(
            {
                "7": {"class_type": "EmptyImage", "inputs": {"width": 0, "height": 8, "batch_size": 1, "color": 0}},
                "8": {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}},
            }
        )


def shortened(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same prompt with trainings of two steps; `make bench` makes all of them."""
    for node in prompt.values():
        if node["class_type"].startswith(("ConceptGuardTrain", "ConceptGuardLearn")):
            node["inputs"]["steps"] = 2
    return prompt


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_an_example_runs(host: Host, path: Path) -> None:
    images = host.images(host.run(shortened(to_api(workflow(path.stem), host.get("/object_info")))))
    assert images, f"{path.name} made no image"
    for files in images.values():
        assert all(file.startswith(b"\x89PNG") for file in files)


@pytest.mark.parametrize("name", TWINS)
def test_a_checkpoint_twin_differs_by_its_loader_alone(host: Host, name: str) -> None:
    """And by what a checkpoint of another size and training wants: picture size and cfg."""
    known = host.get("/object_info")
    twin, demo = (to_api(workflow(n), known) for n in (name, TWINS[name]))
    assert twin.keys() == demo.keys()
    for node, there in demo.items():
        here = twin[node]
        if there["class_type"] == "ConceptGuardLoadDemo":
            assert here["class_type"] == "CheckpointLoaderSimple"
            continue
        assert here["class_type"] == there["class_type"]
        changed = {k for k in there["inputs"] if here["inputs"][k] != there["inputs"][k]}
        assert changed <= {"width", "height", "cfg"}
    with pytest.raises(HostError, match="ckpt_name"):  # all else is valid
        host.run(twin)


def test_the_panel_gets_the_shipped_presets_and_their_checks(host: Host) -> None:
    presets = host.get("/concept_guard/presets")
    assert [preset["id"] for preset in presets] == sorted(path.stem for path in (ROOT / "presets").glob("*.json"))
    assert host.post("/concept_guard/presets/check", json.loads(presets[0]["text"]))["name"] == presets[0]["name"]
    assert host.post("/concept_guard/presets/check", {"kind": "x" * 300_000})["error"] == (
        "preset: it is larger than 256 KB; a preset is words and numbers"
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_a_thumbnail(path: Path) -> None:
    assert path.with_suffix(".jpg").read_bytes().startswith(b"\xff\xd8")


SEEDS = itertools.count()


def erase(**changes: Any) -> dict[str, Any]:
    """A small graph: two steps on the demo model, with inputs changed as `node__input=value`."""
    graph: dict[str, Any] = {
        "demo": {"class_type": "ConceptGuardLoadDemo", "inputs": {}},
        "words": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": "a cat"}},
        "none": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": ""}},
        "size": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "concept": {"class_type": "ConceptGuardConcept", "inputs": {"clip": ["demo", 1], "text": "cat", "name": ""}},
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
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["cre", 0],
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
        },
        "image": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["demo", 2]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["image", 0], "filename_prefix": "test"}},
    }
    for where, value in changes.items():
        node, name = where.split("__")
        graph[node]["inputs"][name] = value
    return graph


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concept__text": "  "}, "ConceptGuardConcept.*text is empty"),
        ({"cre__start_percent": 0.9, "cre__end_percent": 0.2}, "ConceptGuardCRE.*start_percent"),
        ({"cre__end_percent": 1.8}, "ConceptGuardCRE.*end_percent"),
        ({"cre__strength": float("nan")}, "ConceptGuardCRE.*strength"),
        ({"cre__blocks": "sideways"}, "ConceptGuardCRE.*sideways"),
    ],
    ids=["empty text", "start after end", "percent", "nan", "blocks"],
)
def test_bad_input_is_an_error_on_its_node_and_the_next_run_is_right(
    host: Host, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(HostError, match=f"(?s){message}"):
        host.run(erase(**changes))
    assert host.images(host.run(erase(sample__seed=next(SEEDS))))  # a prompt run twice is cached, and makes nothing
