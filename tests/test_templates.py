"""Example workflows tell what another checkpoint needs; subgraph blueprints are listed by the host, whole, and run."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conceptguard.tools.host import Host, HostError
from conceptguard.tools.workflow import to_api

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
HERE, THERE = -10, -20  # a subgraph's own inputs and outputs, as its links name them


def loaded(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def stem(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", EXAMPLES, ids=stem)
def test_an_example_says_how_to_use_another_checkpoint(path: Path) -> None:
    notes = [node["widgets_values"][0] for node in loaded(path)["nodes"] if node["type"] == "MarkdownNote"]
    assert any("checkpoint" in note for note in notes)
    twin = path.with_name(f"{path.stem}-checkpoint.json")
    assert not twin.is_file() or any(f"*{twin.stem}*" in note for note in notes)


# --- blueprints ------------------------------------------------------------------------------------------------------


def inside(path: Path) -> dict[str, Any]:
    """The one subgraph of a blueprint."""
    workflow = loaded(path)
    (node,), (subgraph,) = workflow["nodes"], workflow["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"] and subgraph["name"] == path.stem
    assert workflow["extra"]["BlueprintDescription"]
    for side in ("inputs", "outputs"):
        assert [(slot["name"], slot["type"]) for slot in node[side]] == [(s["name"], s["type"]) for s in subgraph[side]]
    widgets = {str(each["id"]) for each in subgraph["nodes"]}
    assert {id for id, _ in node["properties"]["proxyWidgets"]} <= widgets
    return subgraph


@pytest.mark.parametrize("path", BLUEPRINTS, ids=stem)
def test_a_blueprints_links_meet_at_both_ends(path: Path) -> None:
    subgraph = inside(path)
    nodes, links = {node["id"]: node for node in subgraph["nodes"]}, {link["id"]: link for link in subgraph["links"]}
    for i, slot in enumerate(subgraph["inputs"]):
        assert slot["linkIds"] and all(links[id]["origin_id"] == HERE for id in slot["linkIds"])
        assert all(links[id]["origin_slot"] == i for id in slot["linkIds"])
    for i, slot in enumerate(subgraph["outputs"]):
        assert [(links[id]["target_id"], links[id]["target_slot"]) for id in slot["linkIds"]] == [(THERE, i)]
    for id, link in links.items():
        if link["origin_id"] != HERE:
            out = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert id in out["links"] and out["type"] == link["type"]
        if link["target_id"] != THERE:
            into = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert into["link"] == id and into["type"] == link["type"]


DEMO = {"MODEL": 0, "CLIP": 1, "VAE": 2}


def graph(path: Path, known: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """A blueprint as a prompt on the demo model, and where its output is."""
    subgraph = inside(path)
    links, result = [], []
    for link in subgraph["links"]:
        start: list[Any] = [link["origin_id"], link["origin_slot"]]
        if start[0] == HERE:
            start = ["size", 0] if link["type"] == "LATENT" else ["demo", DEMO.get(link["type"], -1)]
        if link["target_id"] == THERE:
            result = [str(start[0]), start[1]]
        elif start[1] >= 0:
            links.append([link["id"], *start, link["target_id"], link["target_slot"], link["type"]])
    kept = {link[0] for link in links}
    for node in subgraph["nodes"]:
        node["inputs"] = [slot for slot in node["inputs"] if slot["link"] in kept]  # typed words stay widgets
    prompt = to_api({"nodes": subgraph["nodes"], "links": links}, known)
    prompt["demo"] = {"class_type": "ConceptGuardLoadDemo", "inputs": {}}
    prompt["size"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
    return prompt, result


@pytest.mark.server
def test_the_host_lists_the_blueprints(host: Host) -> None:
    ours = {
        id: each
        for id, each in host.get("/global_subgraphs").items()
        if each["info"]["node_pack"] == "custom_nodes.ConceptGuard"
    }
    assert sorted(each["name"] for each in ours.values()) == [path.stem for path in BLUEPRINTS]
    for id, each in ours.items():
        data = host.get(f"/global_subgraphs/{id}")["data"]
        assert data == (ROOT / "subgraphs" / f"{each['name']}.json").read_text(encoding="utf-8")


@pytest.mark.server
@pytest.mark.parametrize("path", BLUEPRINTS, ids=stem)
def test_a_blueprint_runs(host: Host, path: Path) -> None:
    prompt, result = graph(path, host.get("/object_info"))
    sampler: dict[str, Any] = {"seed": 3, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}
    if (ends := inside(path)["outputs"][0]["type"]) == "MODEL":
        words = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": "the pub"}}
        prompt |= {
            "words": words,
            "sample": {
                "class_type": "KSampler",
                "inputs": {
                    **sampler,
                    "model": result,
                    "positive": ["words", 0],
                    "negative": ["words", 0],
                    "latent_image": ["size", 0],
                    "denoise": 1.0,
                },
            },
        }
        prompt["image"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["demo", 2]}}
        result = ["image", 0]
    else:
        assert ends == "IMAGE"
        for node in prompt.values():
            if node["class_type"] == "KSampler":
                node["inputs"]["steps"] = 2
    prompt["save"] = {"class_type": "SaveImage", "inputs": {"images": result, "filename_prefix": "blueprint"}}
    images = host.images(host.run(prompt))
    assert images and all(file.startswith(b"\x89PNG") for files in images.values() for file in files)


@pytest.mark.server
def test_a_prompt_reaches_a_presets_gate(host: Host) -> None:
    """The same text for the encoder and the gate, and a gate that lacks it says so on its node."""
    edit = {"method": "CRE", "concept": {"name": "cat", "phrases": ["a cat"]}, "gate": {"kind": "prompt"}}
    text = json.dumps({"schema_version": 1, "kind": "concept-guard preset", "name": "x", "edits": [edit]})
    prompt, _ = graph(ROOT / "subgraphs" / "Safe text to image.json", host.get("/object_info"))
    sample = next(node for node in prompt.values() if node["class_type"] == "KSampler")
    sample["inputs"] |= {"steps": 2, "model": ["apply", 0]}
    words = next(node for node in prompt.values() if node["class_type"] == "CLIPTextEncode")
    words["inputs"]["text"] = ["words", 0]
    prompt |= {
        "words": {"class_type": "PrimitiveString", "inputs": {"value": "a cat"}},
        "look": {"class_type": "ConceptGuardPresetGate", "inputs": {"text": ["words", 0]}},
        "apply": {
            "class_type": "ConceptGuardApplyPreset",
            "inputs": {"model": ["demo", 0], "clip": ["demo", 1], "preset": text, "strength": 1.0, "gate": ["look", 0]},
        },
        "show": {"class_type": "SaveImage", "inputs": {"images": ["image", 0], "filename_prefix": "gate"}},
        "image": {"class_type": "VAEDecode", "inputs": {"samples": [key_of(prompt, sample), 0], "vae": ["demo", 2]}},
    }
    assert host.images(host.run(prompt))
    del prompt["apply"]["inputs"]["gate"]
    with pytest.raises(HostError, match="(?s)ConceptGuardApplyPreset.*edit 1: its gate needs the prompt"):
        host.run(prompt)


def key_of(prompt: dict[str, Any], node: dict[str, Any]) -> str:
    return next(key for key, each in prompt.items() if each is node)


@pytest.mark.server
def test_a_preset_with_a_gate_draws_what_the_nodes_draw(host: Host) -> None:
    drawn = []
    for name in ("in-flight-gate", "gated-preset"):
        prompt = to_api(loaded(ROOT / "example_workflows" / f"{name}.json"), host.get("/object_info"))
        for node in prompt.values():
            if node["class_type"] == "KSampler":
                node["inputs"] |= {"seed": 11, "steps": 6}
        images = host.images(host.run(prompt))
        drawn.append([np.asarray(Image.open(BytesIO(file))) for file in images["14"]])
    assert len(drawn[0]) == 4 and all((a == b).all() for a, b in zip(*drawn, strict=True))
