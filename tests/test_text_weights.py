"""Closed-form edits of transformers: of what all of the text comes in by, in the host's own classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sd
import dits
import pytest
import torch
from dits import FAMILIES
from torch import Tensor

from conceptguard.demo.load import load
from conceptguard.editing.edits.spec import Concept, Phrase
from conceptguard.editing.engine.weights import projections, with_lora
from conceptguard.editing.training.changes import LoRA
from conceptguard.editing.weights.closed_form import METHODS
from conceptguard.editing.weights.edit import erasure
from conceptguard.editing.weights.rows import erased, said
from conceptguard.nodes.concept import ConceptGuardConcept
from conceptguard.nodes.edit_weights import ConceptGuardEditWeights

# What reads the text, its norm, and what reads the pooled text.
READS = {
    "Flux.1": ("txt_in", "", "vector_in.in_layer"),
    "Flux.2": ("txt_in", "", ""),
    "Chroma": ("txt_in", "", ""),
    "Qwen-Image": ("txt_in", "txt_norm", ""),
    "Lumina 2": ("cap_embedder.1", "cap_embedder.0", ""),
    "Z-Image": ("cap_embedder.1", "cap_embedder.0", ""),
    "SD3": ("context_embedder", "", "y_embedder.mlp.0"),
}
every = pytest.mark.parametrize("name", READS)


def concept() -> Concept:
    plain = dits.concept(phrases=2)
    phrases = tuple(replace(each, pooled=dits.pooled(i)) for i, each in enumerate(plain.phrases))
    return replace(plain, phrases=phrases, pooled=dits.pooled(8))


CAT = Phrase("cat", dits.tokens(40, 6), (1, 2), pooled=dits.pooled(9))


def changed(model: Any, one: Concept, method: str = "UCE") -> tuple[Any, LoRA]:
    assert one.empty is not None
    lora = erasure(one, one.empty, [CAT], method, projections(model, one, "keys and values", "Test"), 1)
    return with_lora(model, lora, 1.0), lora


def held(model: Any) -> dict[str, Tensor]:
    comfy.model_management.load_models_gpu([model])
    return {path: w.double().clone() for path, w in model.model.diffusion_model.named_parameters()}


def minimum(W: Tensor, C: Tensor, G: Tensor, P: Tensor) -> Tensor:
    """argmin_X .5 |X - W|^2 + |X C - W G|^2 + |X P - W P|^2, by least squares."""
    A = torch.cat([0.5**0.5 * torch.eye(W.shape[1], dtype=torch.double), C, P])
    b = torch.cat([0.5**0.5 * W.T, G @ W.T, P @ W.T])
    return torch.linalg.lstsq(A, b, driver="gelsd").solution.T


def given(name: str, model: Any, path: str, encoding: Tensor) -> Tensor:
    """What a module is given first while a prompt is drawn: [rows, d]."""
    seen: list[Tensor] = []
    hook = model.model.diffusion_model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().clone())
    )
    try:
        dits.sample(name, model, dits.cond(encoding, dits.pooled(8)))
    finally:
        hook.remove()
    return seen[0].double().flatten(0, -2)


@every
def test_the_hosts_weights_are_the_minimum_and_no_others_change(name: str) -> None:
    """Of rows that the model's own modules norm; the pooled text is read as what the concept is compared with."""
    model, one = dits.build(name), concept()
    before, after = held(model), held(changed(model, one)[0])
    reads, norm, pooled = READS[name]
    network = model.model.diffusion_model
    through = network.get_submodule(norm) if norm else lambda x: x
    assert one.empty is not None
    C, G, P = (through(x.float()).double() for x in (*erased(one.phrases, one.empty), said(CAT)))
    wanted = {f"{reads}.weight": minimum(before[f"{reads}.weight"], C, G, P)}
    if pooled:
        c, g, p = (
            torch.cat([each.pooled for each in one.phrases]).double(),
            dits.pooled(8).double(),
            dits.pooled(9).double(),
        )
        wanted[f"{pooled}.weight"] = minimum(before[f"{pooled}.weight"], c, g.expand(2, -1), p)
    for path, w in before.items():
        if path in wanted:
            assert not torch.allclose(after[path], w)
            torch.testing.assert_close(after[path], wanted[path], rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(after[path], w), path


@every
def test_a_prompt_is_what_its_weights_are_given(name: str) -> None:
    """The rows that a formula is solved for are those that the module reads while the model draws."""
    model, one, encoding = dits.build(name), concept(), dits.tokens(50, 8)
    reads = READS[name][0]
    rows = projections(model, one, "values", "Test").read(encoding[0].double())
    seen = given(name, model, reads, encoding)
    if FAMILIES[name].least:  # filled up with zeros in front
        seen = seen[-len(rows) :]
    torch.testing.assert_close(seen[: len(rows)], rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Flux.1", "Z-Image"])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_lora_draws_the_same(name: str, method: str) -> None:
    model = dits.build(name)
    knife = dits.cond(concept().phrases[0].tokens)
    edited, lora = changed(model, concept(), method)
    loaded, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0.0)
    a, b, plain = (dits.sample(name, each, knife) for each in (edited, loaded, model))
    assert torch.isfinite(a).all() and not torch.equal(a, plain)
    torch.testing.assert_close(a, b)


def test_what_is_drawn_instead_is_read_in_its_place() -> None:
    """The pooled text as well."""
    model, one = dits.build("Flux.1"), concept()
    shown = replace(one, instead=dits.tokens(60, 7), instead_text="a spoon", pooled_instead=dits.pooled(11))
    before, after = (
        held(model)["vector_in.in_layer.weight"],
        held(changed(model, shown)[0])["vector_in.in_layer.weight"],
    )
    c = torch.cat([each.pooled for each in one.phrases if each.pooled is not None]).double()
    wanted = minimum(before, c, dits.pooled(11).double().expand(2, -1), dits.pooled(9).double())
    torch.testing.assert_close(after, wanted, rtol=1e-3, atol=1e-4)


def test_a_text_without_a_pooled_one_leaves_what_reads_that() -> None:
    model, one = dits.build("Flux.1"), dits.concept()
    before, after = held(model), held(changed(model, one)[0])
    assert torch.equal(before["vector_in.in_layer.weight"], after["vector_in.in_layer.weight"])
    assert not torch.equal(before["txt_in.weight"], after["txt_in.weight"])


@pytest.mark.parametrize("name", ["HiDream", "Wan"])
def test_a_model_that_reads_its_text_otherwise_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Test: .* has no keys and values of its own for the text; use another edit"):
        projections(dits.build(name), dits.concept(), "values", "Test")


@pytest.mark.parametrize(
    ("architecture", "changes"), [("flux", {"txt_in", "vector_in.in_layer"}), ("lumina", {"cap_embedder.1"})]
)
def test_the_node_on_the_demos_transformers(architecture: str, changes: set[str]) -> None:
    """Of whichever projections it is asked for: there is one way in."""
    model, clip, _ = load(architecture=architecture)
    one = ConceptGuardConcept.execute(clip, "a bomb").args[0]
    patches = []
    for which in ("values", "keys and values"):
        edited, lora = ConceptGuardEditWeights.execute(model, clip, one, projections=which).args
        assert set(edited.patches) == {f"diffusion_model.{path}.weight" for path in changes} and not model.patches
        patches.append(lora)
    assert all(torch.equal(patches[0][name], patches[1][name]) for name in patches[0])


@pytest.mark.server
@pytest.mark.parametrize("architecture", ["flux", "lumina"])
def test_the_node_edits_a_transformer_in_a_live_server(host: Any, architecture: str) -> None:
    demo, clip = {"class_type": "ConceptGuardLoadDemo", "inputs": {"architecture": architecture}}, ["1", 1]
    prompt = {
        "1": demo,
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": "a beer mug"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": ""}},
        "4": {"class_type": "ConceptGuardConcept", "inputs": {"clip": clip, "text": "beer mug"}},
        "5": {
            "class_type": "ConceptGuardEditWeights",
            "inputs": {"model": ["1", 0], "clip": clip, "concept": ["4", 0]},
        },
        "6": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["1", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "weights"}},
    }
    known = host.get("/object_info")
    for node in (prompt["4"], prompt["5"]):
        asked = known[node["class_type"]]["input"]["required"]
        node["inputs"] = {name: spec[-1].get("default") for name, spec in asked.items()} | node["inputs"]
    how = {"steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "seed": 3}
    how |= {"positive": ["2", 0], "negative": ["3", 0], "latent_image": ["6", 0]}
    pictures = []
    for model in (["1", 0], ["5", 0]):
        prompt["7"] = {"class_type": "KSampler", "inputs": how | {"model": model}}
        (picture,) = host.images(host.run(prompt))["9"]
        pictures.append(picture)
    assert pictures[0] != pictures[1]
