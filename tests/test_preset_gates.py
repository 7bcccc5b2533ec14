"""Gates in presets: the same as the gate nodes make, and written from what a MODEL carries."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
import torch
from documents import DOCUMENT, WORDS, changed, keys, make
from torch import Tensor

from conceptguard.editing.edits.spec import Gate, InFlight
from conceptguard.editing.gates.discriminator import Discriminator, Head
from conceptguard.editing.gates.features import Vision
from conceptguard.editing.presets.apply import combined
from conceptguard.editing.presets.document import read
from conceptguard.editing.presets.words import described
from conceptguard.nodes import files
from conceptguard.nodes.concept import ConceptGuardConcept
from conceptguard.nodes.cre import ConceptGuardCRE
from conceptguard.nodes.discriminator import ConceptGuardLoadDiscriminator, ConceptGuardTrainPromptDiscriminator
from conceptguard.nodes.gates import ConceptGuardImageGate, ConceptGuardInFlightGate, ConceptGuardPromptGate
from conceptguard.nodes.preset import ConceptGuardApplyPreset, ConceptGuardPresetGate, ConceptGuardSavePreset

KNIFE = files.DEMO_GATES / "kitchen-knife.safetensors"  # a discriminator that comes with the pack
JUDGE = {"file": KNIFE.name, "sha256": files.contents(KNIFE, files.fingerprint(KNIFE))}
PICTURES = torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(1))
PROMPT = "a photo of blades on a table"


class Vae:
    """Decodes latents to their first three channels."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].movedim(1, -1).sigmoid()


@pytest.fixture(scope="module")
def knife() -> Any:
    return make(ConceptGuardLoadDiscriminator, "demo: kitchen knife")


def gated(gate: dict[str, Any] | None) -> str:
    edit = {"method": "CRE", "concept": WORDS, "floor": 0.0, "gate": gate}
    return json.dumps({**DOCUMENT, "edits": [edit]})


def by_hand(model: Any, clip: Any, gate: Gate | None) -> Any:
    concept = make(ConceptGuardConcept, clip, "a knife\nblades", "knife")
    return make(ConceptGuardCRE, model, concept, gate=gate, floor=0.0)


def with_nodes(kind: str, clip: Any, knife: Any) -> Gate:
    """What DOCUMENTS says, with nodes."""
    if kind == "image":
        return make(ConceptGuardImageGate, knife, PICTURES, 0.0, True)
    if kind == "any":
        return make(ConceptGuardImageGate, knife, PICTURES, 1.0, decides="any")
    if kind == "prompt":
        concept = make(ConceptGuardConcept, clip, "a knife\nblades", "knife")
        return make(ConceptGuardPromptGate, clip, PROMPT, 0.0, concept=concept, soft=True)
    vae = Vae() if kind == "in-flight" else None
    return make(ConceptGuardInFlightGate, knife, 0.4, 0.0 if kind == "preview" else 1.0, vae, restart=kind == "preview")


DOCUMENTS: dict[str, dict[str, Any]] = {
    "image": {"kind": "image", "discriminator": JUDGE, "threshold": 0.0, "soft": True},
    "any": {"kind": "image", "discriminator": JUDGE, "threshold": 1.0, "decides": "any"},
    "prompt": {"kind": "prompt", "threshold": 0.0, "soft": True},
    "in-flight": {"kind": "in-flight", "discriminator": JUDGE, "at_percent": 0.4, "threshold": 1.0, "restart": False},
    "preview": {
        "kind": "in-flight",
        "discriminator": JUDGE,
        "at_percent": 0.4,
        "threshold": 0.0,
        "decode": "preview",
    },
}


def look(**inputs: Any) -> Gate:
    return make(ConceptGuardPresetGate, **inputs)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_preset_gates_as_the_nodes_do(model: Any, clip: Any, knife: Any, kind: str) -> None:
    seen = look(vae=Vae(), image=PICTURES, text=PROMPT)
    applied = make(ConceptGuardApplyPreset, model, clip, gated(DOCUMENTS[kind]), gate=seen)
    hand = by_hand(model, clip, with_nodes(kind, clip, knife))
    assert keys(applied) == keys(hand) != keys(by_hand(model, clip, None))
    assert torch.equal(tiny.sample(applied, batch=3, steps=4), tiny.sample(hand, batch=3, steps=4))


LACKS = {"in-flight": "a VAE", "image": "a reference picture", "prompt": "the prompt"}


@pytest.mark.parametrize(("kind", "lack"), LACKS.items())
def test_a_gate_that_cannot_look_says_what_it_needs(model: Any, clip: Any, kind: str, lack: str) -> None:
    message = f"ConceptGuardApplyPreset: preset: edit 1: its gate needs {lack}; give it to a Preset Gate node"
    with pytest.raises(ValueError, match=message):
        ConceptGuardApplyPreset.execute(model, clip, gated(DOCUMENTS[kind]))


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_saving_keeps_the_gate(model: Any, clip: Any, knife: Any, kind: str) -> None:
    hand = by_hand(model, clip, with_nodes(kind, clip, knife))
    text = make(ConceptGuardSavePreset, hand, clip, "Gated")
    preset = read(text)
    assert preset.edits[0].gate is not None and len(preset.files) == (kind != "prompt")
    applied = make(ConceptGuardApplyPreset, model, clip, text, gate=look(vae=Vae(), image=PICTURES, text=PROMPT))
    assert keys(applied) == keys(hand)
    again = make(ConceptGuardSavePreset, applied, clip, "Gated")
    assert again == text


def test_a_discriminator_of_prompts_travels_along(model: Any, clip: Any) -> None:
    prompts = [f"{word} {i}" for word in ("knife", "cat") for i in range(6)]
    found = make(ConceptGuardTrainPromptDiscriminator, clip, "knives", "\n".join(prompts[:6]), "\n".join(prompts[6:]))
    hand = by_hand(model, clip, make(ConceptGuardPromptGate, clip, "knife 7", 0.1, found))
    text = make(ConceptGuardSavePreset, hand, clip, "Prompts")
    assert "only if the prompt asks for it (knives-1.safetensors, from 0.1)" in described(read(text))[0]
    assert keys(make(ConceptGuardApplyPreset, model, clip, text, gate=look(text="knife 7"))) == keys(hand)


class Eye:
    """A CLIP_VISION that sees the mean colours."""

    image_size = 8

    def encode_image(self, image: Tensor, crop: bool = True) -> dict[str, Any]:
        return {"image_embeds": image.mean((1, 2)) + 1, "last_hidden_state": None}


def test_a_discriminator_with_an_encoder_asks_for_it(model: Any, clip: Any) -> None:
    one = torch.ones(3)
    judge = Discriminator("red", Vision(Eye()), Head(0 * one, one, one, -5 * one[:1]))
    hand = by_hand(model, clip, make(ConceptGuardImageGate, judge, PICTURES, soft=True, threshold=0.0))
    text = make(ConceptGuardSavePreset, hand, clip, "Red")
    seen = look(image=PICTURES, clip_vision=Eye())
    assert keys(make(ConceptGuardApplyPreset, model, clip, text, gate=seen)) == keys(hand)
    with pytest.raises(ValueError, match="edit 1: discriminator .* connect the one .* to `clip_vision`"):
        ConceptGuardApplyPreset.execute(model, clip, text, gate=look(image=PICTURES))


def test_a_gate_without_a_rule_stays_behind_and_says_so(model: Any, clip: Any) -> None:
    class Other:
        name = "somebody's classifier"

        def scores(self, images: Tensor) -> list[float]:
            return [1.0] * len(images)

    for gate, note in (
        (make(ConceptGuardImageGate, Other(), PICTURES), "somebody's classifier, which has no file of ours"),
        (make(ConceptGuardPromptGate, clip, "x", concept=make(ConceptGuardConcept, clip, "a cat")), "another concept"),
        (Gate((0.5,)), "no node with a rule made it"),
    ):
        output = ConceptGuardSavePreset.execute(by_hand(model, clip, gate), clip, "Open")
        assert read(output.args[0]).edits[0].gate is None
        assert any("The gate of edit 1 stays behind" in line and note in line for line in output.ui["text"])


def test_gates_are_told_in_plain_words() -> None:
    told = {kind: described(read(gated(gate)))[0] for kind, gate in DOCUMENTS.items()}
    assert told["preview"].endswith(
        ", only in pictures that show it at 40 % of the timesteps (kitchen-knife.safetensors, from 0); it then begins "
        "again."
    )
    assert told["any"].endswith(", only if any reference picture shows it (kitchen-knife.safetensors, from 1).")
    assert told["prompt"].endswith(
        ", only if the prompt asks for it (its likeness to the concept, from 0, the surer the stronger)."
    )


# --- two gates -------------------------------------------------------------------------------------------------------


def test_the_whole_presets_gate_multiplies(model: Any, clip: Any) -> None:
    flight = Gate(inflight=InFlight("told", lambda latents, _: [1.0] * len(latents), 0.3))
    assert combined(Gate(), flight) is flight and combined(flight, Gate()) is flight
    assert combined(Gate((0.5,)), Gate((1.0, 0.0))) == Gate((0.5, 0.0))
    assert combined(flight, Gate((1.0, 0.0))) == Gate((1.0, 0.0), flight.inflight)
    with pytest.raises(ValueError, match="it has an in-flight gate of its own"):
        combined(flight, flight)
    closed = look(gate=Gate((0.0,)))
    applied = make(ConceptGuardApplyPreset, model, clip, gated(DOCUMENTS["preview"]), gate=closed)
    assert torch.equal(tiny.sample(applied), tiny.sample(model))


def test_a_whole_presets_gate_is_saved_with_edits_that_have_none(model: Any, clip: Any, knife: Any) -> None:
    whole = look(gate=with_nodes("image", clip, knife))
    applied = make(ConceptGuardApplyPreset, model, clip, gated(None), gate=whole)
    assert keys(applied) == keys(by_hand(model, clip, with_nodes("image", clip, knife)))
    saved = read(make(ConceptGuardSavePreset, applied, clip, "Whole")).edits[0].gate
    assert saved is not None and saved.kind == "image" and saved.soft


def test_a_preset_gate_is_for_presets_alone(model: Any) -> None:
    """Elsewhere what it carries would be dropped without a word."""
    assert ConceptGuardPresetGate.GET_SCHEMA().outputs[0].get_io_type() == "CONCEPT_GUARD_PRESET_GATE"
    accepted = {each.id: each.get_io_type() for each in ConceptGuardApplyPreset.GET_SCHEMA().inputs}["gate"]
    assert accepted == "CONCEPT_GUARD_GATE,CONCEPT_GUARD_PRESET_GATE"
    with pytest.raises(ValueError, match="ConceptGuardCRE: gate is a PresetGate; connect the GATE output of a"):
        ConceptGuardCRE.execute(model, tiny.concept(), gate=look(image=PICTURES))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "complaint"),
    [
        ({"kind": "image"}, "discriminator: Field required"),
        ({"kind": "in-flight"}, "discriminator: Field required"),
        ({"kind": "oracle"}, "there is no kind 'oracle' here"),
        ({**DOCUMENTS["preview"], "at_percent": 1}, "at_percent"),
        ({**DOCUMENTS["preview"], "threshold": float("nan")}, "threshold"),
        ({**DOCUMENTS["preview"], "decode": "elsewhere"}, "decode"),
        ({**DOCUMENTS["preview"], "vae": "x"}, "vae: Extra inputs"),
        ({**DOCUMENTS["prompt"], "soft": "yes"}, "soft"),
        ({**DOCUMENTS["image"], "discriminator": {**JUDGE, "file": "../x.safetensors"}}, "bare name"),
    ],
)
def test_bad_gates_are_refused(gate: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^preset: .*{complaint}"):
        read(gated(gate))


def test_a_gate_that_decides_too_late_is_refused() -> None:
    late = {**DOCUMENTS["in-flight"], "at_percent": 0.9}
    with pytest.raises(ValueError, match="the gate decides at 0.9, but the edit ends at 0.8"):
        read(json.dumps(changed("edits", 1, "gate", value=late)))


def test_an_edit_without_a_concept_needs_a_discriminator() -> None:
    edit = {"method": "KPOP", "prompt": JUDGE, "gate": {"kind": "prompt"}}
    with pytest.raises(ValueError, match="a prompt gate needs a discriminator here"):
        read(json.dumps({**DOCUMENT, "edits": [edit]}))


def test_an_unknown_discriminator_is_refused_before_anything_runs(model: Any, clip: Any) -> None:
    for judge, complaint in (
        ({**JUDGE, "file": "gone.safetensors"}, '"gone.safetensors" is not in the models folder'),
        ({**JUDGE, "sha256": "0" * 64}, '"kitchen-knife.safetensors" in the models folder .* has other contents'),
    ):
        text = gated({**DOCUMENTS["preview"], "discriminator": judge})
        assert ConceptGuardApplyPreset.validate_inputs(gated(DOCUMENTS["preview"])) is True
        assert "ConceptGuardApplyPreset: preset: " in str(ConceptGuardApplyPreset.validate_inputs(text))
        with pytest.raises(ValueError, match=complaint):
            ConceptGuardApplyPreset.execute(model, clip, text)
