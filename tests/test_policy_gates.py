"""Gates under a policy: of prompts, of the picture that a run begins with, in flight; each opens, and closes, or looks
again where a run could hide from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sample
import pytest
import tiny
import torch
from governed import CRE, EIUP, governed, prompt, sample, write
from test_preset_gates import JUDGE

from conceptguard.editing.gates.discriminator import Discriminator
from conceptguard.editing.policy.encoders import Encoders
from conceptguard.editing.policy.file import PolicyFile, Refused
from conceptguard.nodes.preset_routes import SHIPPED

pytestmark = pytest.mark.usefixtures("as_a_node")
ASKED = {"kind": "prompt", "threshold": 0.999}  # the very words: random encoders find all alike
IMAGE = {"kind": "image", "discriminator": JUDGE}
FLIGHT = {"kind": "in-flight", "discriminator": JUDGE, "at_percent": 0.3, "decode": "preview"}
LATENT = torch.ones(1, 4, tiny.SIZE, tiny.SIZE)

Seeing = Callable[..., list[int]]


@pytest.fixture
def seeing(monkeypatch: pytest.MonkeyPatch) -> Seeing:
    """Makes the discriminator say these confidences, look after look, and the last one ever after; returns how often
    it was asked."""

    def say(*confidences: float) -> list[int]:
        asked: list[int] = []

        def scores(_: Any, images: torch.Tensor) -> list[float]:
            asked.append(1)
            return [confidences[min(len(asked), len(confidences)) - 1]] * len(images)

        monkeypatch.setattr(Discriminator, "scores", scores)
        return asked

    return say


def img2img(model: Any, clip: Any, text: str = "a teapot") -> Any:
    mine, noise = (prompt(clip, text), prompt(clip, "")), comfy.sample.prepare_noise(LATENT, 5)
    return comfy.sample.sample(model, noise, 4, 4.0, "euler", "normal", *mine, LATENT, disable_pbar=True)


def gated(gate: dict[str, Any], **edit: Any) -> dict[str, Any]:
    return {**CRE, "gate": gate, **edit}


def verdicts(enforcement: Any) -> list[str]:
    return [entry["verdict"] for entry in enforcement.record.entries()]


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg, verdict", [(0.0, "edited"), (0.5, "edited"), (4.0, "closed")])
def test_a_prompt_gate_asks_all_prompts_that_the_picture_may_follow(
    model: Any, clip: Any, tmp_path: Path, cfg: float, verdict: str
) -> None:
    with governed(tmp_path, gated(ASKED)) as enforcement:
        sample(model, clip, "a teapot", "blades", cfg=cfg)
    assert verdicts(enforcement) == [verdict]


def test_a_prompt_gate_hears_each_of_several_prompts(model: Any, clip: Any, tmp_path: Path) -> None:
    """Of regions, or of a list: beside the others the words would be less like the concept."""
    with governed(tmp_path, gated(ASKED)) as enforcement:
        tiny.sample(model, [*prompt(clip, "a teapot"), *prompt(clip, "blades")], prompt(clip, ""))
        tiny.sample(model, [*prompt(clip, "a teapot"), *prompt(clip, "a cup")], prompt(clip, ""))
    assert verdicts(enforcement) == ["edited", "closed"]


def test_a_text_is_made_tokens_of_once_for_all_gates_of_a_run(
    model: Any, clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is most of what closed gates cost."""
    edits = [gated(ASKED, concept={"name": word, "phrases": [word]}) for word in ("axe", "bow", "gun")]
    with governed(tmp_path, *edits) as enforcement:
        mine, asked, tokenize = (
            (prompt(clip, "a cat"), prompt(clip, "")),
            [],
            type(clip.tokenizer).tokenize_with_weights,
        )
        monkeypatch.setattr(
            type(clip.tokenizer),
            "tokenize_with_weights",
            lambda self, text, ids=False, **how: (asked.append((text, ids)), tokenize(self, text, ids, **how))[1],
        )
        tiny.sample(model, *mine)
        assert verdicts(enforcement) == ["closed"] and len(asked) == len(set(asked)) > 0


def test_a_rules_gate_is_for_all_of_its_edits(model: Any, clip: Any, tmp_path: Path, seeing: Seeing) -> None:
    seeing(0.9, 0.1)
    with governed(tmp_path, rule={"gate": FLIGHT}) as enforcement:
        sample(model, clip, steps=4)
        sample(model, clip, steps=4)
    opened, closed = enforcement.record.entries()
    assert opened["edits"][0]["steps"]["acted"] == 4 and opened["gates"][0]["opens"] == [1.0]
    assert closed["edits"][0]["steps"]["acted"] == 0 and closed["gates"][0]["opens"] == [0.0]
    assert closed["verdict"] == "edited" and "flagged no image" in closed["edits"][0]["said"]


def test_a_rules_gate_and_an_edits_own_must_both_be_open(model: Any, clip: Any, tmp_path: Path, seeing: Seeing) -> None:
    seeing(0.9)
    plain = sample(model, clip, "a teapot", steps=4)
    with governed(tmp_path, gated(ASKED), rule={"gate": FLIGHT}) as enforcement:
        assert torch.equal(sample(model, clip, "a teapot", steps=4), plain)
        assert not torch.equal(sample(model, clip, "blades", steps=4), plain)
    assert verdicts(enforcement) == ["closed", "edited"]


class Texts:
    """Encoders that made a prompt of two encoders' tokens, as nodes for SDXL and Flux put them together."""

    def __init__(self) -> None:
        self.encoders = Encoders()

    def tokens(self, text: str, **how: Any) -> dict[str, list[Any]]:
        made = {"l": [[(1, 1.0)]], "g": [[(2, 1.0)]]}
        self.encoders.tokenized(made, text, **how)
        return made


def test_what_each_of_several_encoders_reads_counts() -> None:
    texts = Texts()
    one = texts.tokens("a flower")
    assert texts.encoders.said(one).text == "a flower"
    one["l"] = texts.tokens("a knife")["l"]
    assert texts.encoders.said(one).texts == ("a knife", "a flower")
    one["l"] = []  # as nodes for SD3 leave an encoder out
    assert texts.encoders.said(one).text == "a flower"
    one["l"] = [[(3, 1.0)]]  # from nowhere
    assert texts.encoders.said(one).text is None


def test_a_template_or_pictures_beside_a_text_are_not_its_words_alone() -> None:
    texts = Texts()
    assert texts.encoders.said(texts.tokens("a flower", llama_template="knives: {}")).text is None
    seen = texts.encoders.said(texts.tokens("a flower", images=[torch.zeros(1, 8, 8, 3)]))
    assert seen.text is None and seen.pictures
    nothing = texts.encoders.said(texts.tokens("a flower", images=[], llama_template=None))
    assert nothing.text == "a flower" and not nothing.pictures


# --- pictures that a run begins with ---------------------------------------------------------------------------------


def test_an_image_gate_looks_at_the_picture_that_a_run_begins_with(
    model: Any, clip: Any, tmp_path: Path, seeing: Seeing
) -> None:
    plain = img2img(model, clip, "")
    asked = seeing(0.1, 0.9)
    with governed(tmp_path, gated(IMAGE)) as enforcement:
        assert torch.equal(img2img(model, clip, ""), plain)
        img2img(model, clip, "")
    assert verdicts(enforcement) == ["closed", "edited"] and len(asked) == 2


def test_an_image_gate_does_not_close_where_a_prompt_asks_for_more(
    model: Any, clip: Any, tmp_path: Path, seeing: Seeing
) -> None:
    """A harmless picture under a prompt for knives, or no picture at all."""
    seeing(0.1)
    with governed(tmp_path, gated(IMAGE)) as enforcement:
        img2img(model, clip, "a knife")
        sample(model, clip, "a knife")
    assert verdicts(enforcement) == ["edited", "edited"]


@pytest.mark.parametrize("choice, verdict", [("edit", "edited"), ("refuse", "refused"), ("pass", "passed")])
def test_pictures_that_its_gate_flags_are_treated_as_it_says_and_others_as_none(
    model: Any, clip: Any, tmp_path: Path, seeing: Seeing, choice: str, verdict: str
) -> None:
    seeing(0.1, 0.9)
    with governed(tmp_path, gated(ASKED), pictures=choice, pictures_gate=IMAGE) as enforcement:
        img2img(model, clip)  # not flagged: the prompt gate decides, and the prompt is a teapot
        if verdict == "refused":
            with pytest.raises(Refused, match="begins with a picture"):
                img2img(model, clip)
        else:
            img2img(model, clip)
    assert verdicts(enforcement) == ["closed", verdict]


def test_a_picture_that_cannot_be_shown_to_the_gate_counts(
    model: Any, clip: Any, tmp_path: Path, seeing: Seeing
) -> None:
    seeing(0.1)
    with governed(tmp_path, pictures="refuse", pictures_gate=IMAGE), pytest.raises(Refused, match="led by one"):
        positive = prompt(clip, "a knife")
        positive[0][1]["reference_latents"] = [LATENT]
        tiny.sample(model, positive, prompt(clip, ""))


def test_a_gate_that_cannot_be_asked_refuses(model: Any, clip: Any, tmp_path: Path) -> None:
    lost = {**IMAGE, "discriminator": {"file": "gone.safetensors", "sha256": "0" * 64}}
    with governed(tmp_path, pictures_gate=lost), pytest.raises(Refused, match="pictures_gate: .*gone.safetensors"):
        img2img(model, clip)


# --- in flight -------------------------------------------------------------------------------------------------------


def test_an_in_flight_gate_looks_again_at_the_finished_picture(
    model: Any, clip: Any, tmp_path: Path, seeing: Seeing
) -> None:
    """What it did not see at its percent, it sees at the end, and the picture is made again with the edit."""
    with governed(tmp_path):
        edited = sample(model, clip, steps=4)
    asked = seeing(0.1, 0.9)
    with governed(tmp_path, gated({**FLIGHT, "restart": False})) as enforcement:
        assert torch.equal(sample(model, clip, steps=4), edited)
    *_, entry = enforcement.record.entries()
    assert entry["verdict"] == "edited" and entry["edits"][0]["steps"]["acted"] == 4
    assert "in the finished picture" in entry["again"] and "still sees" in entry["left"] and len(asked) == 3


@pytest.mark.parametrize("restart", [False, True])
def test_what_a_gate_still_sees_is_in_the_record(
    model: Any, clip: Any, tmp_path: Path, seeing: Seeing, restart: bool
) -> None:
    """It flagged the image on the way, and sees in the finished picture what the edit left."""
    seeing(0.9)
    with governed(tmp_path, gated({**FLIGHT, "restart": restart}), tell=["user"]) as enforcement:
        sample(model, clip, steps=4)
    (entry,) = enforcement.record.entries()
    assert entry["verdict"] == "edited" and "again" not in entry and "still sees" in entry["left"]
    assert "still sees" in enforcement.said[-1]


def test_what_an_edit_adds_is_not_left(model: Any, clip: Any, tmp_path: Path, seeing: Seeing) -> None:
    seeing(0.9)
    with governed(tmp_path, {**EIUP, "weights": [1, 0.5], "gate": FLIGHT}) as enforcement:
        sample(model, clip, steps=4)
    (entry,) = enforcement.record.entries()
    assert entry["verdict"] == "edited" and "left" not in entry
    assert not any("finished pictures" in edit["said"] for edit in entry["edits"])


def test_a_gate_that_restarts_has_looked_at_the_end_by_itself(
    model: Any, clip: Any, tmp_path: Path, seeing: Seeing
) -> None:
    with governed(tmp_path):
        edited = sample(model, clip, steps=4)
    seeing(0.1, 0.9)
    with governed(tmp_path, gated(FLIGHT)) as enforcement:
        assert torch.equal(sample(model, clip, steps=4), edited)
    *_, entry = enforcement.record.entries()
    assert entry["verdict"] == "edited" and "again" not in entry and entry["gates"][0]["step"] == 4


def test_an_in_flight_gate_that_sees_nothing_leaves_every_bit(
    model: Any, clip: Any, tmp_path: Path, seeing: Seeing
) -> None:
    plain = sample(model, clip, steps=4)
    asked = seeing(0.1)
    with governed(tmp_path, gated(FLIGHT)) as enforcement:
        assert torch.equal(sample(model, clip, steps=4), plain)
    (entry,) = enforcement.record.entries()
    assert "again" not in entry and len(asked) == 2  # in time, and at the finished picture


def test_it_opens_for_the_images_that_show_it_alone(
    model: Any, clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sample(model, clip, steps=4, batch=2)
    looks: list[int] = []

    def scores(_: Any, images: torch.Tensor) -> list[float]:
        looks.append(1)
        return [0.1, 0.9 if len(looks) == 2 else 0.1]

    monkeypatch.setattr(Discriminator, "scores", scores)
    with governed(tmp_path, gated(FLIGHT)):
        first, second = sample(model, clip, steps=4, batch=2)
    assert torch.equal(first, plain[0]) and not torch.equal(second, plain[1])


def test_a_gate_that_needs_a_vae_is_damage(tmp_path: Path) -> None:
    write(tmp_path, gated({**FLIGHT, "decode": "vae"}))
    with pytest.raises(Refused, match='the preset "mine.json": its in-flight gate decodes with a VAE'):
        PolicyFile(tmp_path / "policy.json", SHIPPED).now()
    write(tmp_path, rule={"gate": {**FLIGHT, "decode": "vae"}})
    with pytest.raises(Refused, match="rule 1: its in-flight gate decodes with a VAE"):
        PolicyFile(tmp_path / "policy.json", SHIPPED).now()
    assert json.loads((tmp_path / "policy.json").read_text())["on"]
