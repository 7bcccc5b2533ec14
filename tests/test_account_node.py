"""The account where people find it: the node, the words on the edits' nodes, and the pictures' metadata."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import tiny
import torch
from comfy_execution.utils import CurrentNodeContext
from PIL import Image
from test_server import erase

from conceptguard.editing.edits.spec import Direction, EditSpec
from conceptguard.editing.engine.host import add_edit, edits_of
from conceptguard.nodes import edit as edit_node
from conceptguard.nodes import metadata
from conceptguard.nodes.account import ConceptGuardAccount
from conceptguard.nodes.cre import ConceptGuardCRE
from conceptguard.nodes.direction import ConceptGuardFairDirection, ConceptGuardSafeDirection
from conceptguard.nodes.eiup import ConceptGuardEIUP
from conceptguard.nodes.kpop import ConceptGuardKPOP
from conceptguard.tools.host import Host

NODES = [ConceptGuardCRE, ConceptGuardEIUP, ConceptGuardKPOP, ConceptGuardSafeDirection, ConceptGuardFairDirection]


def cre(model: Any, name: str = "knife", seed: int = 100, **inputs: Any) -> Any:
    return add_edit(model, EditSpec("projection", tiny.concept(name, seed), options=tiny.CRE, node="Test", **inputs))


def test_the_node_tells_of_the_run_that_made_the_latent(model: Any) -> None:
    edited = cre(cre(model, blocks="middle"), "gun", 200, end_percent=0.5)
    latents = [tiny.sample(edited, batch=2, steps=steps) for steps in (2, 4)]
    text, applied, where = ConceptGuardAccount.execute(edited, {"samples": latents[0]}).args
    document = json.loads(text)
    assert applied and document["applied"] and document["steps"] == 2
    assert [edit["source"] for edit in document["edits"]] == ["knife", "gun"]
    assert [edit["blocks"]["named"] for edit in document["edits"]] == [1, 7]
    assert where.shape == (4, 8 * tiny.SIZE, 8 * tiny.SIZE, 3)  # two edits of two images
    out = ConceptGuardAccount.execute(edited, {"samples": latents[1]})
    assert out.ui["text"][0].splitlines() == [
        'Test "knife": acted in 4 of 4 steps, 1 of 1 blocks',
        'Test "gun": acted in 2 of 4 steps, 7 of 7 blocks',
    ]


def test_it_names_what_is_missing(model: Any) -> None:
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    with pytest.raises(ValueError, match="ConceptGuardAccount: model carries no edits; connect the MODEL that goes"):
        ConceptGuardAccount.execute(model, latent)
    with pytest.raises(ValueError, match="ConceptGuardAccount: no run of this MODEL is known"):
        ConceptGuardAccount.execute(cre(model), latent)


def test_every_edit_node_tells_and_asks_for_rows() -> None:
    for node in NODES:
        schema = node.GET_SCHEMA()
        assert schema.inputs[-1].id == "rows" and schema.inputs[-1].optional
        assert schema.inputs[-1].options == ["conditional", "all"]
        assert "unique_id" in [hidden.value.lower() for hidden in schema.hidden]


def test_rows_reach_the_edit(model: Any) -> None:
    assert [spec.rows for spec in edits_of(ConceptGuardCRE.execute(model, tiny.concept(), rows="all").args[0])] == [
        "all"
    ]
    assert edits_of(ConceptGuardEIUP.execute(model, tiny.concept(), rows="all").args[0])[0].rows == "all"
    shift = Direction("d", torch.ones(1, tiny.WIDTH))
    assert edits_of(ConceptGuardSafeDirection.execute(model, shift, rows="all").args[0])[0].rows == "all"
    fair = edits_of(ConceptGuardFairDirection.execute(model, shift, shift, rows="all").args[0])
    assert [spec.rows for spec in fair] == ["all", "all"]
    assert edits_of(ConceptGuardCRE.execute(model, tiny.concept()).args[0])[0].rows == "conditional"


def test_edits_of_one_node_are_told_together(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(edit_node, "telling", lambda node: told.append)
    tiny.sample(ConceptGuardCRE.execute(model, tiny.concept(), floor=0.0).args[0])
    assert told == ["acted in 2 of 2 steps, 7 of 7 blocks"]
    told.clear()
    tiny.sample(cre(cre(model, report=told.append), "gun", 200, report=told.append))
    line = "acted in 2 of 2 steps, 7 of 7 blocks"
    assert told == [f'"knife" {line}\n"gun" {line}']


def prompt(**more: Any) -> dict[str, Any]:
    return {"prompt": {}, **more}


def test_pictures_get_the_account_of_their_prompt(model: Any) -> None:
    """A prompt of the page brings its workflow, one of a script nothing."""
    page = metadata.remember(prompt(extra_data={"extra_pnginfo": {"workflow": {"nodes": []}}}))
    script = metadata.remember(prompt(prompt_id="mine"))
    assert script["prompt_id"] == "mine" != page["prompt_id"]
    for asked in (page, script):
        with CurrentNodeContext(asked["prompt_id"], "7", None):
            tiny.sample(cre(model))
            for account in [account for _, account in last(model)]:
                metadata.write(account)
        (document,) = asked["extra_data"]["extra_pnginfo"]["concept_guard"]
        assert document["edits"][0]["said"] == "acted in 2 of 2 steps, 7 of 7 blocks"
    assert page["extra_data"]["extra_pnginfo"]["workflow"] == {"nodes": []}


def last(model: Any) -> Any:
    edited = cre(model)
    tiny.sample(edited)
    from conceptguard.editing.engine.host import accounts_of

    return list(accounts_of(edited).runs)  # type: ignore[union-attr]


def test_what_no_prompt_asked_for_is_written_nowhere(model: Any) -> None:
    ((_, account),) = last(model)
    metadata.write(account)  # outside of any prompt
    with CurrentNodeContext("unheard of", "7", None):
        metadata.write(account)


def test_few_prompts_are_remembered() -> None:
    for i in range(100):
        metadata.remember(prompt(prompt_id=f"many {i}"))
    assert len(metadata._metadata) <= metadata.KEPT
    assert metadata.remember({"no": "prompt"}) == {"no": "prompt"}


@pytest.mark.server
@pytest.mark.slow
def test_a_server_writes_it_into_the_picture(host: Host) -> None:
    graph = erase(sample__seed=4711)
    graph["account"] = {"class_type": "ConceptGuardAccount", "inputs": {"model": ["cre", 0], "latent": ["sample", 0]}}
    entry = host.run(graph)
    assert entry["outputs"]["account"]["text"][0].startswith('ConceptGuardCRE "cat": acted in 2 of 2 steps, ')
    (png,) = host.images(entry)["save"]
    (document,) = json.loads(Image.open(io.BytesIO(png)).info["concept_guard"])
    assert document["applied"] and document["prompts"]["positive"]["edited"]
    assert 'ConceptGuardCRE: "cat" acted in 2 of 2 steps' in host.log()


def test_a_preset_for_other_models_is_an_error_unless_ticked(
    model: Any, clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conceptguard.editing.engine.backbones import unet
    from conceptguard.nodes.preset import ConceptGuardApplyPreset

    words = {"name": "owl", "phrases": ["an owl"]}
    document: dict[str, Any] = {
        "schema_version": 1,
        "kind": "concept-guard preset",
        "name": "No owls",
        "base_models": ["SDXL"],
        "edits": [{"method": "CRE", "concept": words}],
    }
    text = json.dumps(document)
    ConceptGuardApplyPreset.execute(model, clip, text)  # of a kind that no preset can name
    monkeypatch.setitem(unet.FAMILIES, tiny.WIDTH, "SD1.x")
    with pytest.raises(
        ValueError, match='ConceptGuardApplyPreset: preset "No owls" was made for SDXL models, and this'
    ):
        ConceptGuardApplyPreset.execute(model, clip, text)
    ticked = ConceptGuardApplyPreset.execute(model, clip, text, other_models=True).args[0]
    assert len(edits_of(ticked)) == 1
    for bases in ([], ["SD1.x"], ["SDXL", "SD1.x"]):
        ConceptGuardApplyPreset.execute(model, clip, json.dumps({**document, "base_models": bases}))
