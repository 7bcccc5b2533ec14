"""What is found and decided while the demo's trained transformers draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sample
import folder_paths
import pytest
import torch
from torch import Tensor

from conceptguard.benchmarks.gates import shipped
from conceptguard.benchmarks.sampling import Demo
from conceptguard.demo.load import load_witness
from conceptguard.demo.witness import testify as told_by
from conceptguard.editing.edits.concept import concept_from_conditioning, concept_from_text
from conceptguard.nodes.causal_period import ConceptGuardCausalPeriod
from conceptguard.nodes.cre import ConceptGuardCRE
from conceptguard.nodes.gates import ConceptGuardInFlightGate

pytestmark = pytest.mark.slow
NAME, INSTEAD, STEPS, CFG = "kitchen knife", "a hammer", 8, 4.0


@pytest.fixture(scope="module")
def flux() -> Demo:
    return Demo.ready("flux")


def latents(n: int = 2) -> dict[str, Tensor]:
    return {"samples": torch.zeros(n, 4, 16, 16)}


def drawn(demo: Demo, model: Any, positive: Any, n: int = 2, seed: int = 3) -> Tensor:
    """Pictures [n, h, w, 3]."""
    empty = latents(n)["samples"]
    noise = comfy.sample.prepare_noise(empty, seed)
    given = demo.encode(positive) if isinstance(positive, str) else positive
    made = comfy.sample.sample(model, noise, STEPS, CFG, "euler", "normal", given, demo.encode(""), empty, seed=seed)
    with torch.no_grad():
        return demo.vae.decode(made)


def shows(pictures: Tensor, name: str = NAME) -> list[bool]:
    return [each.found(name) for each in told_by(load_witness(), pictures.movedim(-1, 1))]


def erased(demo: Demo, concept: Any, **inputs: Any) -> Any:
    return ConceptGuardCRE.execute(demo.model, concept, 1.0, 0.0, 1.0, "all", **inputs).args[0]


def test_a_causal_period_is_found_and_the_edit_needs_no_more(
    flux: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    concept = concept_from_text(flux.clip, NAME, instead=INSTEAD)
    found = ConceptGuardCausalPeriod.execute(
        flux.model,
        concept,
        shipped(NAME),
        flux.encode(f"a {NAME}"),
        flux.encode(""),
        flux.vae,
        latents(),
        3,
        STEPS,
        CFG,
        "euler",
        "normal",
        delta=0.02,  # a prompt that is read anew in each step leaves no trace at all: any step left out raises that
    )
    period, start, end, _ = found.args
    assert 0 <= start < end <= 1 and (start, end) != (0.0, 1.0)
    within = drawn(flux, erased(flux, concept, range=period), f"a {NAME}")
    assert any(shows(drawn(flux, flux.model, f"a {NAME}"))) and not any(shows(within))


def test_a_gate_in_flight_opens_for_what_it_sees_take_shape(flux: Demo) -> None:
    concept = concept_from_text(flux.clip, NAME, instead=INSTEAD)
    (gate,) = ConceptGuardInFlightGate.execute(shipped(NAME), 0.5, vae=flux.vae).args
    edited = erased(flux, concept, gate=gate)
    assert not any(shows(drawn(flux, edited, f"a {NAME}")))
    assert torch.equal(drawn(flux, edited, "a cat"), drawn(flux, flux.model, "a cat"))


def test_a_concept_that_arrives_in_a_picture(flux: Demo) -> None:
    """Its tokens are a picture's, and so are the prompt's: no word says it."""
    example = drawn(flux, flux.model, f"a {NAME}", 1)[0].movedim(-1, 0)
    prompt = flux.encode_with("a drawing of <image>", example)
    others = [drawn(flux, flux.model, text, 1)[0].movedim(-1, 0) for text in ("a cat", "a car", "a dog", "a shoe")]
    neutral = [flux.encode_with("<image>", other)[0] for other in others]
    said = flux.encode_with("<image>", example)
    concept = concept_from_conditioning(said, NAME, neutral=neutral, instead=flux.encode(INSTEAD))
    unedited, edited = (drawn(flux, model, prompt, 4) for model in (flux.model, erased(flux, concept, floor=0.0)))
    assert sum(shows(unedited)) > sum(shows(edited)) == 0
