"""Directions: how they are learned, kept, and used on a MODEL, on a CONDITIONING and for each image of a batch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import tiny
import torch
from torch import Tensor

from conceptguard.editing.edits.spec import Concept, Direction, Draw, Gate, Phrase, draw
from conceptguard.editing.engine.host import add_edit, edits_of, fingerprint_of
from conceptguard.editing.files.artefacts import Artefact, read, write
from conceptguard.editing.methods.safe_region import direction_of, drawn
from conceptguard.editing.pictures.chart import curve
from conceptguard.editing.training.direction import LearnedDirection, psi, random_like
from conceptguard.editing.training.harness import Predictor
from conceptguard.editing.training.mode import gradients
from conceptguard.nodes import bounds, files, progress
from conceptguard.nodes.cre import ConceptGuardCRE
from conceptguard.nodes.direction import (
    ConceptGuardFairDirection,
    ConceptGuardLoadDirection,
    ConceptGuardOffsetConditioning,
    ConceptGuardSafeDirection,
    ConceptGuardSaveDirection,
)
from conceptguard.nodes.train_direction import ConceptGuardTrainDirection

pytestmark = pytest.mark.usefixtures("as_a_node")

FOLDER = Path(files.folder_paths.get_folder_paths(files.FOLDER)[0])


class Clip:
    """Encodes a prompt to tokens that its length chooses; `long` ones are twice as long."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> Any:
        return tiny.cond(len(text), 154 if "long" in text else 77)


def concept(phrases: int = 2) -> Concept:
    return tiny.concept("kitchen knife", 100, phrases)


def train(model: Any = None, prompts: str = "a\nbbb", batch: int = 1, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        goal="away",
        steps=3,
        learning_rate=0.06,
        guidance=7.5,
        seed=4,
        sampling_steps=4,
        cfg=2.0,
        start_percent=0.1,
        end_percent=1.0,
        precision="auto",
        checkpointing=False,
    )
    latent = {"samples": torch.zeros(batch, 4, tiny.SIZE, tiny.SIZE)}
    what = changes.pop("concept", None) or concept()
    return ConceptGuardTrainDirection.execute(
        model or tiny.sd1(), Clip(), what, prompts, latent, **{**settings, **changes}
    ).args


def vector(name: str = "d", seed: int = 0, scale: float = 1.0) -> Direction:
    g = torch.Generator().manual_seed(seed)
    return Direction(name, scale * torch.randn(77, 1, generator=g) @ torch.randn(1, tiny.WIDTH, generator=g))


def make(node: Any, *args: Any, **kwargs: Any) -> Any:
    return node.execute(*args, **kwargs).args[0]


# --- learning --------------------------------------------------------------------------------------------------------


def test_the_target_is_the_authors() -> None:
    e_o, e_null = torch.randn(2, 3, 4)
    torch.testing.assert_close(psi(e_o, e_null, 7.5), e_null - 6.5 * (e_o - e_null))
    torch.testing.assert_close(psi(e_o, e_null, 7.5, "towards"), e_null + 7.5 * (e_o - e_null))


@gradients()
def slowly(goal: str, batch: int, updates: int) -> Tensor:
    """The recipe of methods 3.1 to 3.3, an image at a time, with backward() through the bare UNet."""
    model, what, s, cfg, S = tiny.sd1(), concept(), 7.5, 2.0, 4
    sampling, unet = model.model.model_sampling, model.model.diffusion_model
    import comfy.samplers

    sigmas = [float(x) for x in comfy.samplers.calculate_sigmas(sampling, "normal", S)]
    first = float(sampling.percent_to_sigma(0.1))
    prompts = [tiny.tokens(len(text)) for text in ("a", "bbb")]

    def eps(z: Tensor, sigma: float, c: Tensor) -> Tensor:
        x = z / (sigma**2 + 1) ** 0.5
        return unet(x, sampling.timestep(torch.tensor([sigma])).float(), context=c)

    a = torch.randn(1, tiny.WIDTH, generator=torch.Generator().manual_seed(4)).requires_grad_()
    b = torch.zeros(77, 1, requires_grad=True)
    adam, done, chain = torch.optim.Adam([b, a], lr=0.06), 0, 0
    while True:
        noise = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(4 * 1_000_003 + chain))
        z = [noise[k : k + 1] * sigmas[0] for k in range(batch)]
        for i in range(S):
            losses = []
            advanced = []
            for k in range(batch):
                row = chain * batch + k
                c, o = prompts[row % 2], what.phrases[row % 2].tokens
                with torch.no_grad():
                    e_o, e_0 = eps(z[k], sigmas[i], o), eps(z[k], sigmas[i], what.empty)
                moved = sigmas[i] <= first
                e = eps(z[k], sigmas[i], c + b @ a if moved else c)
                target = e_0 - (s - 1) * (e_o - e_0) if goal == "away" else e_0 + s * (e_o - e_0)
                losses.append(10 * ((e - target) ** 2).mean())
                advanced.append(z[k] + (sigmas[i + 1] - sigmas[i]) * (e_0 + cfg * (e - e_0)).detach())
            if moved:
                adam.zero_grad()
                (sum(losses) / batch).backward()  # type: ignore[union-attr]
                adam.step()
                done += 1
                if done == updates:
                    return (b @ a).detach()
            z = advanced
        chain += 1


@pytest.mark.parametrize(("goal", "batch"), [("away", 1), ("towards", 2)])
def test_it_learns_what_a_slow_reading_of_the_recipe_does(goal: str, batch: int) -> None:
    d = train(goal=goal, batch=batch, steps=5)[0].d
    # Adam makes as much of a gradient near 0 as of any other, rounding included.
    torch.testing.assert_close(d, slowly(goal, batch, 5), rtol=2e-3, atol=2e-3)


def test_the_loss_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one picture of noise at one level: what is new at each step would hide it."""
    noise = 10 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(LearnedDirection, "first", lambda self, chain, sigma: noise)
    direction, model, plot = train(
        prompts="a",
        steps=30,
        learning_rate=0.02,
        guidance=1.0,
        goal="towards",
        concept=concept(1),
        sampling_steps=1,
        start_percent=0.0,
    )
    losses = direction.artefact.tensors["losses"]
    assert len(losses) == 30 and losses[-1] < 0.9 * losses[0]
    assert plot.shape == (1, 360, 640, 3) and 0 <= plot.min() < plot.max() <= 1
    (edit,) = edits_of(model)
    assert edit.source is direction and (edit.start_percent, edit.strength) == (0.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_resumed_training_gives_the_same_bits(at: int, tmp_path: Path) -> None:
    """Chains of 4 steps, of which 3 teach: a break within the first and the second, and after it."""
    whole = train(steps=9, batch=2)[0]
    part = write(train(steps=at, batch=2)[0].artefact, tmp_path / "x.safetensors")
    back = direction_of(read(part, "direction"))
    resumed = train(steps=9, batch=2, resume=back)[0]
    for name, tensor in whole.artefact.tensors.items():
        assert torch.equal(resumed.artefact.tensors[name], tensor), name
    one, two = (write(d.artefact, tmp_path / f"{i}.safetensors") for i, d in enumerate((whole, resumed)))
    assert one.read_bytes() == two.read_bytes(), "the same file, too"
    assert train(steps=9, batch=2, resume=whole)[0].key == whole.key


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.01},
        {"prompts": "a"},
        {"seed": 5},
        {"batch": 2},
        {"goal": "towards"},
        {"concept": concept(1)},
    ],
)
def test_what_is_resumed_must_be_the_same_training(change: dict[str, Any]) -> None:
    begun = train(steps=1)[0]
    with pytest.raises(ValueError, match='Direction: resume: "kitchen knife" was learned with .*; set it back'):
        train(steps=2, resume=begun, **change)
    bare = Artefact("direction", "x", {"b": torch.zeros(77, 1), "a": torch.zeros(1, 16)}, text_width=16, tokens=77)
    with pytest.raises(ValueError, match='resume: "x" does not hold what training goes on from'):
        train(resume=direction_of(bare))


def test_an_interrupted_training_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(progress.Shown):
        def __call__(self, done: int, *rest: Any) -> None:
            if done == 4:
                comfy.model_management.interrupt_current_processing()
            super().__call__(done, *rest)

    whole = train(steps=7)[0]
    with monkeypatch.context() as patch, pytest.raises(comfy.model_management.InterruptProcessingException):
        patch.setattr("conceptguard.nodes.training.Shown", Impatient)
        train(steps=7)
    (left,) = (FOLDER / "unfinished").iterdir()
    assert len(read(left, "checkpoint").tensors["losses"]) == 4
    assert "unfinished/" not in " ".join(files.choices("direction"))
    begun = train(steps=4)[0]  # what there is so far
    assert begun.artefact.training["steps"] == 4 and begun.d.any() and not left.exists()
    assert train(steps=7, resume=begun)[0].key == whole.key


@pytest.mark.slow
def test_a_stopped_training_ends_as_one_that_was_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stopped in the middle of a step; the same queued again goes on, and its file is the same to the byte."""
    whole = train(steps=7, batch=2)[0]
    calls = []

    def predict(self: Any, *args: Any, original: Any = Predictor.__call__, **kwargs: Any) -> list[Tensor]:
        calls.append(1)
        if len(calls) == 12:
            raise comfy.model_management.InterruptProcessingException
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(comfy.model_management.InterruptProcessingException):
        patch.setattr(Predictor, "__call__", predict)
        train(steps=7, batch=2)
    assert len(list((FOLDER / "unfinished").iterdir())) == 1
    resumed = train(steps=7, batch=2)[0]
    one, two = (write(d.artefact, tmp_path / f"{i}.safetensors") for i, d in enumerate((whole, resumed)))
    assert one.read_bytes() == two.read_bytes() and not list((FOLDER / "unfinished").iterdir())


def test_the_model_stays_as_it_was() -> None:
    model = tiny.sd1()
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    asked = {name: p.requires_grad for name, p in model.model.diffusion_model.named_parameters()}  # newer hosts: none
    picture, options = tiny.sample(model), json.dumps(model.model_options, default=str)
    train(model, checkpointing=True)
    after = model.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert json.dumps(model.model_options, default=str) == options and not edits_of(model)
    for module in model.model.diffusion_model.modules():
        assert "forward" not in vars(module) and not getattr(module, "weight_function", None)
    for name, p in model.model.diffusion_model.named_parameters():
        assert p.requires_grad == asked[name] and p.grad is None
    assert torch.equal(tiny.sample(model), picture)


def test_a_model_that_the_host_loaded_for_inference() -> None:
    """As in the server: nodes run inside inference mode, and autograd refuses tensors that are made there."""
    with torch.inference_mode(False):
        expected = train(steps=2)[0]
    with torch.inference_mode():
        model = tiny.sd1()
        assert next(model.model.diffusion_model.parameters()).is_inference()
        direction = train(model, steps=2)[0]
        picture = tiny.sample(model)
    assert torch.equal(direction.d, expected.d) and not direction.d.is_inference()
    with torch.inference_mode():
        assert torch.equal(tiny.sample(model), picture)


@pytest.mark.parametrize("shape", ["checkpointing", "sdxl", "bf16", "long prompt", "edited"])
def test_training_in_other_circumstances(shape: str) -> None:
    if shape == "checkpointing":
        edited = make(ConceptGuardCRE, tiny.sd1(), tiny.concept("x", 7), 0.5, blocks="middle,output.1")
        assert torch.equal(train(edited, checkpointing=True)[0].d, train(edited)[0].d)
    elif shape == "sdxl":
        model = tiny.sdxl()
        direction, edited, _ = train(model, checkpointing=True)
        pooled = tiny.cond(1)
        assert not torch.equal(tiny.sample(edited, pooled), tiny.sample(model, pooled))
    elif shape == "bf16":
        d = train(precision="bf16", steps=2)[0].d
        assert d.dtype == torch.float32 and 0 < (d - train(steps=2)[0].d).norm() < 0.5 * d.norm()
    elif shape == "long prompt":
        d = train(prompts="a\nlong one", batch=2)[0].d
        assert d.shape == (77, tiny.WIDTH) and d.any()
    else:
        model = make(ConceptGuardSafeDirection, tiny.sd1(), vector())
        assert not torch.equal(train(model)[0].d, train()[0].d), "it learns from the model as it is edited"


def test_fp16_models_are_trained_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.sd1(torch.float16)
    assert train(model, steps=2)[0].d.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; give a number from 1 to 100000"),
        ({"goal": "sideways"}, "goal is 'sideways'; choose one of away, towards"),
        ({"learning_rate": 0.0}, "learning_rate is 0; give a number from 0.0001 to 10"),
        ({"guidance": float("nan")}, "guidance is nan; give a number from 0 to 50"),
        ({"start_percent": 0.9, "end_percent": 0.1}, "start_percent 0.9 lies after end_percent 0.1"),
        ({"start_percent": 0.3, "end_percent": 0.3}, "no denoising step lies between"),
        ({"concept": "knife"}, "concept is a str; connect the output of a Concept node"),
        ({"resume": vector()}, "resume is no learned direction; connect what"),
        ({"concept": Concept("x", (Phrase("x", tiny.tokens(1), (1,)),))}, 'concept "x" comes without the empty prompt'),
        ({"concept": Concept("x", (Phrase("x", torch.zeros(1, 77, 8), (1,)),))}, "concept and clip are of different"),
        ({"model": tiny.auraflow()}, r"cannot edit AuraFlow \(MMDiT\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x),
)
def test_bad_inputs_name_node_input_and_mend(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^ConceptGuardTrainDirection: {message}"):
        train(**changes)
    for file in (FOLDER / "unfinished").glob("*"):
        file.unlink()


def test_a_training_that_diverges_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "outside", lambda *_: None)  # no number that the node takes is bad enough here
    with pytest.raises(ValueError, match="TrainDirection: the loss or its gradient is no number after .* steps; lower"):
        train(learning_rate=1e30, steps=9)
    for file in (FOLDER / "unfinished").glob("*"):
        file.unlink()


def test_a_flat_loss_is_a_plot_too() -> None:
    for values in ([], [1.0], [0.0, 0.0], [3.0, 1.0, 2.0]):
        assert curve(values, "x").shape == (1, 360, 640, 3)


# --- files -----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_again() -> None:
    direction = train(steps=1)[0]
    names = [make(ConceptGuardSaveDirection, direction, "mine/knife") for _ in range(2)]
    try:
        assert names == ["mine/knife_00001.safetensors", "mine/knife_00002.safetensors"]
        assert set(names) <= set(files.choices("direction")) and not set(names) & set(files.choices("eiup-weight"))
        back = make(ConceptGuardLoadDirection, names[0])
        assert back.key == direction.key and back.name == "kitchen knife"
        about = back.artefact
        assert about.concepts == ("kitchen knife 0", "kitchen knife 1") and about.method == "safe region"
        assert about.backbone == fingerprint_of(tiny.sd1(), "x") != fingerprint_of(tiny.sdxl(), "x")
        assert about.training["prompts"] == ["a", "bbb"] and about.training["steps"] == 1
        assert ConceptGuardLoadDirection.fingerprint_inputs(file=names[0]) is not None
    finally:
        for name in names:
            (FOLDER / name).unlink()
    assert ConceptGuardLoadDirection.fingerprint_inputs(file=names[0]) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../etc/passwd", "(cannot name a file here|leads out of the models folder; choose a file inside it)"),
        ("/etc/passwd", "(cannot name a file|leads out of the models folder)"),
        ("", '(cannot name a file|"" is not in the models folder)'),
        ("gone", '"gone" is not in the models folder concept_guard/; put it there'),
    ],
)
def test_names_that_are_no_file(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^ConceptGuardLoadDirection: .*{message}"):
        ConceptGuardLoadDirection.execute(name)
    if name != "gone":
        with pytest.raises(ValueError, match=f"^ConceptGuardSaveDirection: .*{message}"):
            ConceptGuardSaveDirection.execute(train(steps=1)[0], name)


def test_a_file_that_is_none_is_offered_so_that_the_error_can_say_why() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "broken.safetensors"
    path.write_bytes(b"PK\x03\x04 not one")
    try:
        assert "broken.safetensors" in files.choices("direction")
        with pytest.raises(ValueError, match='ConceptGuardLoadDirection: cannot use "broken.safetensors": .*; choose'):
            ConceptGuardLoadDirection.execute("broken.safetensors")
    finally:
        path.unlink()


def test_what_was_not_learned_cannot_be_saved() -> None:
    with pytest.raises(ValueError, match="ConceptGuardSaveDirection: direction was not learned"):
        ConceptGuardSaveDirection.execute(vector())


# --- on a MODEL and on a CONDITIONING --------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg", "length", "batch"), [(4.0, 77, 1), (1.0, 154, 3), (4.0, 231, 2)])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_on_the_model_or_on_the_conditioning_is_the_same(family: str, cfg: float, length: int, batch: int) -> None:
    model, d = getattr(tiny, family)(), vector()
    prompt = tiny.cond(1, length)
    edited = make(ConceptGuardSafeDirection, model, d, 0.5, 0.0)
    moved = make(ConceptGuardOffsetConditioning, prompt, d, 0.5)
    by_hand = prompt[0][0] + 0.5 * d.d.repeat(length // 77, 1)
    torch.testing.assert_close(moved[0][0], by_hand)
    one, two = tiny.sample(edited, prompt, cfg=cfg, batch=batch), tiny.sample(model, moved, cfg=cfg, batch=batch)
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    assert not torch.equal(one, tiny.sample(model, prompt, cfg=cfg, batch=batch))


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}, {"gate": Gate((0.0,))}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_is_bit_identical(off: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny.sd1(dtype)
    for node, given in ((ConceptGuardSafeDirection, (vector(),)), (ConceptGuardFairDirection, (vector(), vector("e")))):
        assert torch.equal(tiny.sample(make(node, model, *given, **off), batch=2), tiny.sample(model, batch=2))
    prompt = tiny.cond(1)
    assert make(ConceptGuardOffsetConditioning, prompt, vector(), 0.0) == prompt


def test_the_pooled_output_is_replaced_on_request() -> None:
    prompt, safe = tiny.cond(1, control="kept"), [[tiny.tokens(3), {"pooled_output": torch.ones(1, 1280)}]]
    moved = make(ConceptGuardOffsetConditioning, prompt, vector(), 1.0, safe)
    assert moved[0][1]["pooled_output"] is safe[0][1]["pooled_output"] and moved[0][1]["control"] == "kept"
    kept = make(ConceptGuardOffsetConditioning, prompt, vector(), 1.0)
    assert kept[0][1]["pooled_output"] is prompt[0][1]["pooled_output"]
    with pytest.raises(ValueError, match="ConceptGuardOffsetConditioning: pooled_from has no pooled output"):
        ConceptGuardOffsetConditioning.execute(prompt, vector(), 1.0, [[tiny.tokens(3), {}]])


def test_what_does_not_fit_is_told() -> None:
    learned = direction_of(
        Artefact(
            "direction",
            "weapons",
            {"b": torch.ones(77, 1), "a": torch.ones(1, 768)},
            backbone="SD1.x abc",
            text_width=768,
            tokens=77,
        )
    )
    message = r'"weapons" was learned for SD1.x, text width 768; BaseModel \(UNetModel\) has text width 16. Choose one'
    with pytest.raises(ValueError, match=f"ConceptGuardSafeDirection: direction {message}"):
        ConceptGuardSafeDirection.execute(tiny.sd1(), learned)
    with pytest.raises(ValueError, match='OffsetConditioning: direction "weapons" was learned for text of width 768'):
        ConceptGuardOffsetConditioning.execute(tiny.cond(1), learned, 1.0)
    with pytest.raises(ValueError, match="SafeDirection: direction is a str; connect the output of a Load Direction"):
        ConceptGuardSafeDirection.execute(tiny.sd1(), "x")
    with pytest.raises(ValueError, match="FairDirection: direction_3 is a NoneType|direction_3 is a float"):
        ConceptGuardFairDirection.execute(tiny.sd1(), vector(), vector("e"), direction_3=0.5)


def test_another_model_of_the_same_width_is_only_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    learned = train(steps=1)[0]
    ConceptGuardSafeDirection.execute(tiny.sd1(seed=9), learned)
    assert "another kind of model" not in caplog.text
    ConceptGuardSafeDirection.execute(tiny.sdxl(), learned)
    assert '"kitchen knife" was learned on another kind of model' in caplog.text


def test_the_control_is_as_strong_at_every_token() -> None:
    d = train(steps=2)[0]
    control = random_like(d, 1)
    torch.testing.assert_close(control.d.norm(dim=-1), d.d.norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(control.d.flatten(), d.d.flatten(), 0).abs() < 0.5


# --- for each image --------------------------------------------------------------------------------------------------


def test_draws_are_uniform_and_an_images_own() -> None:
    for of in (2, 3, 5):
        counts = Counter(draw(str(seed), i, of) for seed in range(50) for i in range(40))
        assert set(counts) == set(range(of))
        assert max(abs(n - 2000 / of) for n in counts.values()) < 4 * (2000 / of) ** 0.5
    gate = Draw(seed="7", of=3, index=1)
    assert gate.per_image(8)[:3] == gate.per_image(3) and gate.per_image(2, (5, 6)) == gate.per_image(8)[5:7]
    assert sum(sum(Draw(seed="7", of=3, index=i).per_image(8)) for i in range(3)) == 8


def test_two_attributes_draw_on_their_own() -> None:
    model = make(ConceptGuardFairDirection, tiny.sd1(), vector("man", 1), vector("woman", 2), seed=3)
    model = make(ConceptGuardFairDirection, model, vector("light", 3), vector("dark", 4), seed=3)
    gates = {edit.source.name: edit.gate.per_image(400) for edit in edits_of(model)}
    pairs = Counter((a, b) for a, b in zip(gates["man"], gates["light"], strict=True))
    assert len(pairs) == 4 and min(pairs.values()) > 60
    assert all(m + w == 1 for m, w in zip(gates["man"], gates["woman"], strict=True))


def test_directions_that_no_image_drew_are_no_complaint() -> None:
    """Fewer images than directions: what nobody drew was not left out."""
    directions = [vector(str(i), i, 0.1) for i in range(4)]
    for seed in range(3):
        model = tiny.sd1()
        for spec in drawn(directions, seed, Gate(), {"node": "Fair"}):
            model = add_edit(model, spec)
        assert not torch.equal(tiny.sample(model), tiny.sample(tiny.sd1()))


def test_each_image_gets_the_direction_that_it_drew() -> None:
    model, batch = tiny.sd1(), 4
    named = [vector("man", 1), vector("woman", 2), vector("other", 3)]
    fair = make(ConceptGuardFairDirection, model, *named[:2], direction_3=named[2], seed=1, strength=0.7)
    gates = [edit.gate.per_image(batch) for edit in edits_of(fair)]
    alone = [tiny.sample(make(ConceptGuardSafeDirection, model, d, 0.7), batch=batch) for d in named]
    picture = tiny.sample(fair, batch=batch)
    assert len({tuple(gate) for gate in gates}) > 1
    for i in range(batch):
        (drew,) = (k for k, gate in enumerate(gates) if gate[i])
        torch.testing.assert_close(picture[i], alone[drew][i], rtol=1e-3, atol=1e-3)


def test_a_gate_decides_as_well() -> None:
    model = make(ConceptGuardFairDirection, tiny.sd1(), vector("a"), vector("b"), gate=Gate((1.0, 0.0, 0.5)))
    per_image = [edit.gate.per_image(3) for edit in edits_of(model)]
    assert [a + b for a, b in zip(*per_image, strict=True)] == [1.0, 0.0, 0.5]
