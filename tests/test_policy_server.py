"""A policy on a real server: the example graphs under it, two users, a damaged file, what its routes tell."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_policy_record import LINE
from test_server import RUNNABLE, shortened, workflow

from conceptguard.demo import lora
from conceptguard.tools.host import Host, HostError
from conceptguard.tools.workflow import to_api

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parent.parent
TEXT = 'on = true\nprompts = true\n[[rules]]\npresets = ["knives.json"]\n'
KNIVES = {
    "schema_version": 1,
    "kind": "concept-guard preset",
    "name": "No knives",
    "edits": [{"method": "CRE", "concept": {"name": "knife", "phrases": ["a kitchen knife"]}}],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("base")
    folder = base / "user" / "__concept_guard"
    folder.mkdir(parents=True)
    (folder / "policy.toml").write_text(TEXT)
    (folder / "knives.json").write_text(json.dumps(KNIVES))
    with Host(base=base, arguments=("--multi-user",)) as running:
        yield running


def own(server: Host) -> Path:
    return server.base / "user" / "__concept_guard"


def entries(server: Host) -> list[dict[str, Any]]:
    file = own(server) / "record" / "record.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def asked(server: Host, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", data, headers)
    try:
        with server._opener.open(request, timeout=60) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def ended(server: Host, prompt_id: str) -> None:
    while prompt_id not in server.get(f"/history/{prompt_id}"):
        time.sleep(0.05)


def graph(text: str = "a kitchen knife", seed: int = 1, **sampler: Any) -> dict[str, Any]:
    """Stock nodes alone around the demo model."""
    inputs = {"steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, **sampler}
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": {"class_type": "ConceptGuardLoadDemo", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": {**inputs, **links, "seed": seed}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }


def test_it_says_at_the_start_what_it_governs(server: Host) -> None:
    assert "policy.toml governs all models: No knives; models that it cannot edit are refused" in server.log()


def test_a_stock_graph_is_edited_and_recorded(server: Host) -> None:
    assert server.images(server.run(graph()))
    entry = entries(server)[-1]
    assert (entry["verdict"], entry["prompts"], entry["node_id"]) == ("edited", ["a kitchen knife", ""], "5")
    assert entry["edits"][0]["steps"]["acted"] == 4 and entry["seconds"] > 0 and entry["prompt_id"]


def test_two_users_are_told_apart_and_nobody_can_say_who_he_is(server: Host) -> None:
    users = [json.loads(asked(server, "/users", {"username": name})[1]) for name in ("ann", "ben")]
    for i, user in enumerate(users):
        body = {"prompt": graph(seed=10 + i), "extra_data": {"concept_guard_user": "mallory"}}
        status, answer, _ = asked(server, "/prompt", body, **{"comfy-user": user, "Content-Type": "application/json"})
        assert status == 200
        ended(server, json.loads(answer)["prompt_id"])
        assert entries(server)[-1]["user"] == user
    body = {"prompt": graph(seed=12), "extra_data": {"concept_guard_user": "mallory"}}
    ended(server, json.loads(asked(server, "/prompt", body)[1])["prompt_id"])
    assert "user" not in entries(server)[-1]


def test_its_counters_are_for_monitors_and_not_for_other_sites(server: Host) -> None:
    status, text, headers = asked(server, "/concept_guard/policy/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    lines = text.decode().splitlines()
    assert all(LINE.fullmatch(line) for line in lines) and "concept_guard_policy_on 1" in lines
    for path in ("/concept_guard/policy/metrics", "/concept_guard/policy"):
        assert asked(server, path, Origin="http://elsewhere.example")[0] == 403


def test_the_page_learns_what_was_done_and_nothing_of_who(server: Host) -> None:
    found = server.get("/concept_guard/policy")
    assert found["on"] and found["governs"].startswith("all models: No knives")
    assert found["last"][0]["did"][0].startswith('"knife" acted in 4 of 4 steps')
    assert "kitchen" not in json.dumps(found) and "ann" not in json.dumps(found["last"])


@pytest.mark.parametrize("path", ["__concept_guard/policy.toml", "..%2F__concept_guard%2Fpolicy.toml"])
def test_no_request_reaches_its_file(server: Host, path: str) -> None:
    before = (own(server) / "policy.toml").read_bytes()
    for headers in ({}, {"comfy-user": "__concept_guard"}):
        status, answer, _ = asked(server, f"/userdata/{path}", "on = false", **headers)
        assert status >= 400 or b"policy" not in answer or (own(server) / "policy.toml").read_bytes() == before
        assert b"on = true" not in asked(server, f"/userdata/{path}", **headers)[1]
    assert (own(server) / "policy.toml").read_bytes() == before


def test_a_damaged_file_leaves_the_server_up_and_nothing_sampled(server: Host) -> None:
    file = own(server) / "policy.toml"
    file.write_text("on = tru")
    with pytest.raises(HostError, match=r'KSampler \(node 5\): .*"policy.toml" is damaged: it is not TOML'):
        server.run(graph(seed=20))
    found = server.get("/concept_guard/policy")
    assert "is damaged" in found["error"] and found["refused_count"] >= 1
    assert str(server.base) not in json.dumps(found)
    file.write_text(TEXT)
    assert server.images(server.run(graph(seed=20)))


def test_on_false_takes_it_off_and_true_puts_it_on(server: Host) -> None:
    file = own(server) / "policy.toml"
    file.write_text(TEXT.replace("true", "false", 1))
    plain = server.images(server.run(graph(seed=21)))
    count = len(entries(server))
    file.write_text(TEXT)
    assert list(server.images(server.run(graph(seed=21, cfg=4.01))).values()) != list(plain.values())
    assert len(entries(server)) == count + 1
    os.utime(file)


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_an_example_graph_runs_under_it(server: Host, path: Path) -> None:
    lora.write(server.base / "models" / "loras")
    count = len(entries(server))
    assert server.images(server.run(shortened(to_api(workflow(path.stem), server.get("/object_info")))))
    lines = entries(server)[count:]
    made = [entry for entry in lines if not entry.get("why", "").startswith("a training")]  # which draws no picture
    assert made and {entry["verdict"] for entry in made} == {"edited"}, [entry.get("why") for entry in lines]
    assert all("knife" in [edit["source"] for edit in entry["edits"]] for entry in made)
