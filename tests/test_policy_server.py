"""A policy on a real server: the example graphs under it, two users, a damaged file, what its routes tell."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_policy_early import header
from test_policy_record import LINE
from test_server import RUNNABLE, shortened, workflow
from test_server_nodes import VARIANTS, graph_of

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


def laid_out(base: Path) -> Path:
    """The policy and its preset, where a server of this base looks for them: that folder."""
    folder = base / "user" / "__concept_guard"
    folder.mkdir(parents=True)
    (folder / "policy.toml").write_text(TEXT)
    (folder / "knives.json").write_text(json.dumps(KNIVES))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("base")
    laid_out(base)
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


def test_two_users_at_once_have_a_line_each(server: Host) -> None:
    """The second prompt waits in the queue while the first runs."""
    users = [json.loads(asked(server, "/users", {"username": name})[1]) for name in ("cay", "dan")]
    count = len(entries(server))

    def post(i: int) -> str:
        headers = {"comfy-user": users[i], "Content-Type": "application/json"}
        answer = asked(server, "/prompt", {"prompt": graph(seed=30 + i)}, **headers)[1]
        return str(json.loads(answer)["prompt_id"])

    with ThreadPoolExecutor(2) as pool:
        prompts = list(pool.map(post, range(2)))
    for each in prompts:
        ended(server, each)
    who = {entry["prompt_id"]: entry["user"] for entry in entries(server)[count:]}
    assert who == dict(zip(prompts, users, strict=True))


def test_a_model_that_the_policy_refuses_is_refused_before_it_is_loaded(server: Host) -> None:
    """A file of which there is no more than its header, which could not be loaded at all."""
    header(server.base / "models" / "diffusion_models" / "aura.safetensors", "aura")
    prompt = graph(seed=40)
    prompt["8"] = {"class_type": "UNETLoader", "inputs": {"unet_name": "aura.safetensors", "weight_dtype": "default"}}
    prompt["5"]["inputs"]["model"] = ["8", 0]
    with pytest.raises(HostError, match=r"KSampler \(node 5\): ConceptGuard policy: cannot edit AuraFlow"):
        server.run(prompt)
    entry = entries(server)[-1]
    assert (entry["verdict"], entry["node_id"]) == ("refused", "5") and "prompt_id" not in entry
    assert server.get("/concept_guard/policy")["refused_count"] >= 1


def lora_training(server: Host) -> dict[str, Any]:
    """The host's own training node, on pictures that are there; older cores give a MODEL beside the LoRA."""
    known = server.get("/object_info")
    prompt = graph(seed=41)
    inputs = {"model": ["1", 0], "latents": ["11", 0], "positive": ["2", 0], "steps": 1, "batch_size": 1, "rank": 2}
    inputs |= {"grad_accumulation_steps": 1, "learning_rate": 0.001, "optimizer": "SGD", "loss_function": "MSE"}
    inputs |= {"seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32", "algorithm": "LoRA"}
    inputs |= {"gradient_checkpointing": False, "existing_lora": "[None]"}
    prompt["8"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": 255}}
    prompt["9"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["8", 0], "vae": ["1", 2]}}
    prompt["11"] = {"class_type": "RebatchLatents", "inputs": {"latents": ["9", 0], "batch_size": 1}}  # it wants a list
    prompt["10"] = {"class_type": "TrainLoraNode", "inputs": inputs}
    lora = {"model": ["1", 0], "lora": ["10", known["TrainLoraNode"]["output"].index("LORA_MODEL")]}
    prompt["12"] = {"class_type": "LoraModelLoader", "inputs": lora}
    for node in (prompt["10"], prompt["12"]):  # newer cores ask for more
        asked = known[node["class_type"]]["input"]["required"]
        node["inputs"] = {name: spec[-1].get("default") for name, spec in asked.items()} | node["inputs"]
    prompt["5"]["inputs"]["model"] = ["12", 0]
    return prompt


def test_the_hosts_training_passes_with_a_line_and_what_it_trained_is_edited(server: Host) -> None:
    count = len(entries(server))
    assert server.images(server.run(lora_training(server)))
    said = [(entry["verdict"], entry.get("why", "")[:10]) for entry in entries(server)[count:]]
    assert said == [("passed", "a training"), ("edited", "")]


OWN = {"ConceptGuardCausalPeriod", "ConceptGuardConceptMap", "ConceptGuardLearnConcept", "ConceptGuardReport"}
OWN |= {"ConceptGuardTrainDirection", "ConceptGuardTrainErasure", "ConceptGuardTrainKPOP"}


def test_every_node_of_ours_that_samples_or_trains_runs_in_a_graph_under_it() -> None:
    """All but the report card's in an example; whoever adds one has it in an example, or below."""
    ask = re.compile(r"comfy\.sample|jobs\.(measure|search|train\w*|map|report)|from \.\.jobs|sampler_inputs")
    asking = {path for path in (ROOT / "nodes").glob("*.py") if ask.search(path.read_text(encoding="utf-8"))}
    ids = {id for path in asking for id in re.findall(r'"(ConceptGuard\w+)"', path.read_text(encoding="utf-8"))}
    shown = "".join(path.read_text(encoding="utf-8") for path in RUNNABLE)
    assert ids >= OWN and not [id for id in OWN - {"ConceptGuardReport"} if f'"{id}"' not in shown]


def test_its_counters_are_for_monitors_and_not_for_other_sites(server: Host) -> None:
    status, text, headers = asked(server, "/concept_guard/policy/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    lines = text.decode().splitlines()
    assert all(LINE.fullmatch(line) for line in lines) and "concept_guard_policy_on 1" in lines
    for path in ("/concept_guard/policy/metrics", "/concept_guard/policy"):
        assert asked(server, path, Origin="http://elsewhere.example")[0] == 403


def test_the_page_learns_what_was_done_and_nothing_of_who(server: Host) -> None:
    server.run(graph(seed=51))
    found = server.get("/concept_guard/policy")
    assert found["on"] and found["governs"].startswith("all models: No knives")
    assert found["last"][0]["did"][0].startswith('"knife" acted in 4 of 4 steps')
    last = json.dumps(found["last"])
    assert not re.search(r"\bann\b", last) and "kitchen" not in json.dumps(found)


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


def test_a_kill_in_the_middle_of_a_run_costs_that_run_alone(tmp_path: Path) -> None:
    """The server that comes after it goes on with the same record, behind a line that was torn."""
    folder = laid_out(tmp_path)
    with Host(base=tmp_path) as first:
        first.run(graph(seed=1))
        first.post("/prompt", {"prompt": graph(seed=2, steps=500)})
        while not first.get("/queue")["queue_running"]:
            time.sleep(0.05)
        assert first.process is not None
        first.process.kill()
    with (folder / "record" / "record.jsonl").open("ab") as file:
        file.write(b'{"verdict": "edi')
    with Host(base=tmp_path) as second:
        second.run(graph(seed=3))
        assert second.get("/concept_guard/policy")["on"]
    lines = (folder / "record" / "record.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and [json.loads(lines[i])["verdict"] for i in (0, 2)] == ["edited", "edited"]


def test_the_report_card_draws_under_it(server: Host) -> None:
    count = len(entries(server))
    server.run(graph_of("Report", VARIANTS["Report"][0]))
    verdicts = {entry["verdict"] for entry in entries(server)[count:]}
    assert verdicts == {"edited"}
