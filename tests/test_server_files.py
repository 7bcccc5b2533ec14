"""Files, names and numbers through a live server: what it offers it loads, and what it refuses it explains."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from test_server import erase

from conceptguard.tools.host import Host, HostError

pytestmark = pytest.mark.server

STORED = Path(__file__).parent / "stored"
ODD = [
    "[nsfw] v1.0",
    "no nudity's",
    "safe & sound",
    "50% less",
    "(paren)",
    "con",
    " two  spaces ",
    "a;b$c`d",
    "#1 {x}",
    ".hidden",
    "v1..0",
    "刀" * 60,
    "\U0001f52a",
    "folder [1]/no nudity's",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Host]:
    """With files of odd names, a link to a file and one to a folder elsewhere, and an extra_model_paths.yaml."""
    host = Host()
    data, own = (STORED / "direction.safetensors").read_bytes(), host.base / "models" / "concept_guard"
    other, far = host.base / "shared", host.base / "far"
    for path in [own / f"{name}.safetensors" for name in ODD] + [own / "LOUD.SAFETENSORS", far / "x.safetensors"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (own / "linked.safetensors").symlink_to(far / "x.safetensors")
    (own / "linked folder").symlink_to(far, target_is_directory=True)
    (own / "in the way").write_text("a file")
    other.mkdir()
    (other / "shared.safetensors").write_bytes(data)
    config = host.base / "paths.yaml"
    config.write_text(json.dumps({"team": {"base_path": str(host.base), "concept_guard": "shared"}}))
    host.arguments = ("--extra-model-paths-config", str(config))
    with host:
        yield host


def copied(file: str, prefix: Any) -> dict[str, Any]:
    """A graph that loads a direction and saves it anew."""
    return {
        "load": {"class_type": "ConceptGuardLoadDirection", "inputs": {"file": file}},
        "save": {
            "class_type": "ConceptGuardSaveDirection",
            "inputs": {"direction": ["load", 0], "filename_prefix": prefix},
        },
    }


def offered(host: Host) -> list[str]:
    node = host.get("/object_info/ConceptGuardLoadDirection")["ConceptGuardLoadDirection"]
    found: list[str] = node["input"]["required"]["file"][0]
    return found if isinstance(found, list) else node["input"]["required"]["file"][1]["options"]


def saved(host: Host, file: str, prefix: str) -> str:
    name: str = host.run(copied(file, prefix))["outputs"]["save"]["text"][0]
    return name


def test_all_that_is_offered_can_be_loaded(server: Host) -> None:
    names = offered(server)
    links = ["LOUD.SAFETENSORS", "linked.safetensors", "linked folder/x.safetensors", "shared.safetensors"]
    assert set(names) >= {*(f"{name}.safetensors" for name in ODD), *links}
    for i, name in enumerate(names):
        assert saved(server, name, f"copy {i}") == f"copy {i}_00001.safetensors"


def test_saves_go_to_the_own_folder_beside_a_shared_one(server: Host) -> None:
    name = saved(server, "shared.safetensors", "mine/own")
    assert (server.base / "models" / "concept_guard" / name).is_file()
    assert [path.name for path in (server.base / "shared").iterdir()] == ["shared.safetensors"]


def test_a_prefix_may_have_the_hosts_dates(server: Host) -> None:
    name = saved(server, "con.safetensors", "%date:yyyy-MM-dd%/%year% knife")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d/\d{4} knife_00001\.safetensors", name)
    assert name.startswith(str(datetime.now().year))


@pytest.mark.parametrize(
    ("prefix", "complaint"),
    [
        ("刀" * 100, "has 300 bytes, and the name of a file or folder has at most 150 here .*; shorten it"),
        ("in the way/x", 'cannot write "x.safetensors" into the folder "in the way": .*; a file is in the place'),
        ("../x", "cannot name a file here; use letters"),
        ("%KSampler.seed%", "has a % that stands for nothing here; write %date:yyyy-MM-dd%"),
        ("con", "cannot name a file here"),
        ("linked folder/x", "leads out of the models folder by a link; choose another name"),
    ],
)
def test_a_name_that_cannot_be_written_is_explained(server: Host, prefix: str, complaint: str) -> None:
    with pytest.raises(
        HostError, match=rf"ConceptGuardSaveDirection \(node save\): ConceptGuardSaveDirection: .*{complaint}"
    ) as error:
        server.run(copied("con.safetensors", prefix))
    assert str(server.base) not in str(error.value)


REFUSED = r"(?s)ConceptGuardCRE \(node cre\): .*ConceptGuardCRE: strength is .*; give a number from 0 to 4"
BEYOND = [1e308, -1, -1e308, 4.001, float("nan"), float("inf"), "x"]


@pytest.mark.parametrize("value", BEYOND, ids=str)
def test_a_typed_number_beyond_its_bounds_is_refused(host: Host, value: Any) -> None:
    with pytest.raises(HostError, match=REFUSED):
        host.run(erase(cre__strength=value))


@pytest.mark.parametrize("value", [1e12, -1.0, 4.5])
def test_a_linked_number_beyond_its_bounds_is_refused(host: Host, value: float) -> None:
    graph = erase(cre__strength=["number", 0])
    graph["number"] = {"class_type": "PrimitiveFloat", "inputs": {"value": value}}
    with pytest.raises(HostError, match=REFUSED.replace(": .*Con", ": Con")):
        host.run(graph)


def test_a_preset_that_says_a_thing_twice_is_refused(host: Host) -> None:
    text = (STORED / "preset-plain.json").read_text(encoding="utf-8").replace('"author"', '"name": "Another", "author"')
    graph = erase(sample__model=["preset", 0])
    graph["preset"] = {
        "class_type": "ConceptGuardApplyPreset",
        "inputs": {"model": ["demo", 0], "clip": ["demo", 1], "preset": text, "strength": 1.0},
    }
    with pytest.raises(HostError, match="ConceptGuardApplyPreset: preset: it has the name 'name' twice in one place"):
        host.run(graph)
