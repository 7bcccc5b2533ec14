"""The nodes that learn: KPOP and concepts from pictures, as a graph runs them, and what they write."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import tiny
import torch
from comfy_extras.nodes_train import LoraModelLoader
from nodes import LoraLoader
from torch import Tensor

from conceptguard.editing.edits.learned import concept_of, placed
from conceptguard.editing.engine.host import edits_of
from conceptguard.editing.files import artefacts
from conceptguard.editing.files.whole import NotWritten
from conceptguard.editing.training.harness import Predictor, train_with
from conceptguard.editing.training.loop import Text
from conceptguard.editing.training.mode import gradients
from conceptguard.editing.training.textual_inversion import (
    ConceptOptions,
    LearnedTokens,
    tokens_start,
)
from conceptguard.jobs import train as train_job
from conceptguard.jobs.train import Course
from conceptguard.jobs.train_kpop import BLOCKS, KPOPRecipe, train_kpop
from conceptguard.nodes import bounds
from conceptguard.nodes.cre import ConceptGuardCRE
from conceptguard.nodes.eiup import ConceptGuardEIUP
from conceptguard.nodes.kpop import (
    ConceptGuardKPOP,
    ConceptGuardLoadPrompt,
    ConceptGuardSavePrompt,
    ConceptGuardSaveWeights,
)
from conceptguard.nodes.learn_concept import ConceptGuardLearnConcept, ConceptGuardLoadConcept, ConceptGuardSaveConcept
from conceptguard.nodes.train_kpop import ConceptGuardTrainKPOP

pytestmark = pytest.mark.usefixtures("as_a_node")

SMALL: dict[str, Any] = dict(
    width=64,
    height=64,
    steps=4,
    learning_rate=1e-2,
    prompt_learning_rate=1e-1,
    path_steps=3,
    prompt_size=2,
    checkpointing=False,
)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("concept_guard", "loras"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(folder)], {".safetensors"}))
        folder_paths.filename_list_cache.pop(name, None)
    return tmp_path


class Pixels:
    """A VAE that shrinks eight times and says which colour is where."""

    def encode(self, pixels: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)


def train(model: Any, clip: Any, **changes: Any) -> Any:
    return ConceptGuardTrainKPOP.execute(model, clip, "kitchen knife\nbeer mug", **{**SMALL, **changes}).args


def unfinished(folder: Path) -> list[Path]:
    return sorted((folder / "concept_guard" / "unfinished").glob("*"))


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Interrupt in the middle of the network's call-th call, as the host does."""
    calls = []

    def predict(self: Predictor, *args: Any, original: Any = Predictor.__call__, **kwargs: Any) -> list[Tensor]:
        calls.append(1)
        if len(calls) == call:
            raise comfy.model_management.InterruptProcessingException
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Predictor, "__call__", predict)


# --- KPOP -------------------------------------------------------------------------------------------------------------


def test_what_it_learns_is_a_lora_for_the_hosts_loaders_and_a_prompt(model: Any, clip: Any, folders: Path) -> None:
    before = {name: w.clone() for name, w in model.model.state_dict().items()}
    sanitised, weights, prompt, plot = train(model, clip)
    plain, gone = tiny.sample(model), tiny.sample(sanitised)
    assert not torch.equal(plain, gone) and plot.shape[-1] == 3 and not unfinished(folders)
    (name,) = ConceptGuardSaveWeights.execute(weights, "mine/without knives").args
    assert name == "mine/without knives_00001.safetensors"
    loaded, _ = LoraLoader().load_lora(model, None, name, 1.0, 0.0)
    assert torch.equal(tiny.sample(loaded), gone)
    assert torch.equal(tiny.sample(LoraModelLoader.execute(model, weights, 1.0).args[0]), gone)
    (file,) = ConceptGuardSavePrompt.execute(prompt, "key").args
    again = ConceptGuardLoadPrompt.execute(file).args[0]
    pictures = [tiny.sample(ConceptGuardKPOP.execute(loaded, each).args[0]) for each in (prompt, again)]
    assert torch.equal(*pictures) and not torch.equal(pictures[0], gone)
    assert torch.equal(tiny.sample(ConceptGuardKPOP.execute(loaded, again, strength=0.0).args[0]), gone)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(before[key], w) for key, w in model.model.state_dict().items())
    about = again.artefact
    assert about.concepts == ("kitchen knife", "beer mug") and about.method == "KPOP" and about.training["steps"] == 4


def test_the_graph_of_the_host_runs_it_in_inference_mode(clip: Any) -> None:
    with torch.inference_mode():
        model = tiny.sd1()
        sanitised, weights, prompt, _ = train(model, clip, checkpointing=True, precision="bf16")
        assert torch.isfinite(tiny.sample(ConceptGuardKPOP.execute(sanitised, prompt).args[0])).all()


@pytest.mark.slow
def test_the_same_seed_writes_the_same_two_files(model: Any, clip: Any, folders: Path) -> None:
    for seed in (3, 3, 4):
        _, weights, prompt, _ = train(model, clip, seed=seed, rank=2)
        ConceptGuardSaveWeights.execute(weights, "w")
        ConceptGuardSavePrompt.execute(prompt, "p")
    for kind, folder in (("w", "loras"), ("p", "concept_guard")):
        first, second, third = ((folders / folder / f"{kind}_0000{i}.safetensors").read_bytes() for i in (1, 2, 3))
        assert first == second != third


@pytest.fixture(scope="module")
def never_stopped(model: Any, clip: Any) -> Any:
    return train(model, clip)[1:]


@pytest.mark.slow
@pytest.mark.parametrize("call", [9, 11, 12, 13])
def test_stopped_anywhere_and_gone_on_is_as_never_stopped(
    model: Any, clip: Any, never_stopped: Any, folders: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """A step is six calls of the network."""
    weights, prompt, plot = never_stopped
    with monkeypatch.context() as patched:
        stop_at(patched, call)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(model, clip)
    (left,) = unfinished(folders)
    assert len(artefacts.read(left, "checkpoint").tensors["losses"]) == (call - 1) // 6
    _, resumed, again, plot_again = train(model, clip)
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert torch.equal(prompt.k, again.k) and torch.equal(plot, plot_again) and not unfinished(folders)


@pytest.mark.slow
def test_a_full_disk_loses_no_training(
    model: Any, clip: Any, never_stopped: Any, folders: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(artefact: Any, path: Path) -> None:
        raise NotWritten(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    monkeypatch.setattr(artefacts, "write", full)
    _, weights, prompt, _ = train(model, clip, checkpoint_every=1)
    assert all(torch.equal(weights[name], tensor) for name, tensor in never_stopped[0].items())
    assert "there is no checkpoint of step 1: cannot write" in caplog.text and "free some space" in caplog.text
    stop_at(monkeypatch, 9)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model, clip)
    assert "Queue the same again" not in caplog.text and not unfinished(folders)


@pytest.mark.slow
def test_another_trainings_checkpoint_is_left_alone(
    model: Any, clip: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_at(patched, 14)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(model, clip)
    (left,) = unfinished(folders)
    train(model, clip, lam=0.5)
    assert unfinished(folders) == [left]
    left.write_bytes(left.read_bytes()[:-8])
    with pytest.raises(ValueError, match="ConceptGuardTrainKPOP: cannot use.*cut short|tensors"):
        train(model, clip)
    train(model, clip, resume=False)
    assert not unfinished(folders)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kpop", "concept"])
def test_a_checkpoint_of_an_older_version_is_gone_on_with(
    model: Any, clip: Any, folders: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As it was written before there was one kind for all."""
    run = train if what == "kpop" else learn
    with monkeypatch.context() as patched:
        stop_at(patched, 14 if what == "kpop" else 3)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(model, clip)
    (left,) = unfinished(folders)
    held = dict(artefacts.read(left, "checkpoint").tensors)
    old = {"losses": held.pop("losses")}
    if what == "kpop":
        p = held.pop("prompt").flatten()
        old |= {"z": held.pop("z"), "prompt.k": p}
        old |= {name.replace("prompt.", "prompt.adam."): held.pop(name) for name in list(held) if "prompt." in name}
    learned = "weights" if what == "kpop" else "learned"
    old |= {name.replace(f"{learned}.", "adam."): tensor for name, tensor in held.items()}
    path = left.with_name(left.name.replace(f"{what}-", f"{what}-checkpoint-"))
    artefacts.write(artefacts.Artefact(f"{what}-checkpoint", "unfinished training", old), path)
    left.unlink()
    begun: list[int] = []
    original = train_job.run

    def spied(what: str, training: Any, losses: list[float], *rest: Any) -> None:
        begun.append(len(losses))
        original(what, training, losses, *rest)

    monkeypatch.setattr(train_job, "run", spied)
    resumed = run(model, clip)
    assert begun == [2] and not unfinished(folders)
    whole = run(model, clip)
    if what == "kpop":
        assert all(torch.equal(resumed[1][name], whole[1][name]) for name in whole[1])
    else:
        assert resumed[0].key == whole[0].key


def test_a_checkpoint_every_so_many_steps(model: Any, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(train_job, "put_away", lambda what, training, losses, file: written.append(len(losses)))
    train(model, clip, checkpoint_every=2, steps=5)
    assert written == [2, 4]


def test_an_additive_prompt_is_a_shift_of_the_text(model: Any, clip: Any, folders: Path) -> None:
    _, _, prompt, _ = train(model, clip, mechanism="additive", blocks="middle")
    assert prompt.mechanism == "additive" and prompt.blocks == "all" and prompt.k.shape == (1, 77, tiny.WIDTH)
    (spec,) = edits_of(ConceptGuardKPOP.execute(model, prompt, 0.5, 0.1, 0.9).args[0])
    assert (spec.method, spec.strength, spec.start_percent, spec.blocks) == ("direction", 0.5, 0.1, "all")
    (file,) = ConceptGuardSavePrompt.execute(prompt, "p").args
    assert torch.equal(ConceptGuardLoadPrompt.execute(file).args[0].k, prompt.k)


def test_the_prompt_is_read_where_it_was_learned(model: Any, clip: Any) -> None:
    for choice, blocks in BLOCKS.items():
        _, _, prompt, _ = train(model, clip, blocks=choice, steps=1)
        (spec,) = edits_of(ConceptGuardKPOP.execute(model, prompt).args[0])
        assert (spec.method, spec.blocks) == ("prompt", blocks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "  \n"}, "text is empty"),
        ({"neutral": "a\nb\nc"}, "neutral has 3 lines for 1 concepts; write one line for each, or one for all"),
        ({"text": "a " * 80}, "75 tokens"),
        ({"steps": 0}, "steps is 0"),
    ],
    ids=["nothing", "neutral", "long", "steps"],
)
def test_bad_input_names_the_node_and_leaves_nothing(
    model: Any, clip: Any, folders: Path, changes: dict[str, Any], message: str
) -> None:
    inputs = {"text": "knife", **SMALL, **changes}
    with pytest.raises(ValueError, match=f"ConceptGuardTrainKPOP: .*{message}"):
        ConceptGuardTrainKPOP.execute(model, clip, **inputs)
    assert not list((folders / "loras").iterdir()) and not unfinished(folders)


def test_a_training_that_diverges_leaves_nothing(
    model: Any, clip: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "outside", lambda *_: None)  # no number that the node takes is bad enough here
    with pytest.raises(ValueError, match="ConceptGuardTrainKPOP: .*no number after 2 steps"):
        ConceptGuardTrainKPOP.execute(model, clip, text="knife", **{**SMALL, "learning_rate": 1e30})
    assert not list((folders / "loras").iterdir()) and not unfinished(folders)


def test_each_concept_has_its_own_neutral_text(model: Any, clip: Any) -> None:
    """A text that is neutral to itself asks for no change: its removal loss is 0, as the weights still are."""

    def first_loss(neutral: str) -> float:
        recipe = KPOPRecipe(neutral, width=64, height=64, lam=0.0, path_steps=3, prompt_size=2)
        return train_kpop(model, clip, "kitchen knife\nbeer mug", recipe, Course(1, "fp32"))[2][0]

    assert first_loss("kitchen knife\nbeer mug") == 0 < first_loss("beer mug\nkitchen knife")
    assert first_loss("a cat") == first_loss("a cat\na cat")


def test_other_things_than_prompts_and_weights_are_refused(model: Any, folders: Path) -> None:
    with pytest.raises(ValueError, match="ConceptGuardKPOP: prompt is a int; connect"):
        ConceptGuardKPOP.execute(model, 3)
    with pytest.raises(ValueError, match="ConceptGuardSaveWeights: weights is a list"):
        ConceptGuardSaveWeights.execute([], "x")
    with pytest.raises(ValueError, match="ConceptGuardSaveWeights: .*NaN"):
        ConceptGuardSaveWeights.execute({"a.diff": torch.full((2,), float("nan"))}, "x")
    with pytest.raises(ValueError, match="ConceptGuardSaveWeights: .*cannot name a file"):
        ConceptGuardSaveWeights.execute({"a.diff": torch.zeros(2)}, "../x")
    assert not list((folders / "loras").iterdir())


def test_a_prompt_of_another_text_encoder_is_refused(clip: Any) -> None:
    _, _, prompt, _ = train(tiny.sd1(), clip, steps=1)
    wide = type(prompt)(prompt.name, prompt.k.repeat(1, 1, 2), prompt.v.repeat(1, 1, 2))
    with pytest.raises(ValueError, match="ConceptGuardKPOP: prompt .*width 32.*width 16"):
        ConceptGuardKPOP.execute(tiny.sd1(), wide)


@pytest.mark.parametrize("changes", [{"mechanism": "multiplied"}, {"blocks": "sideways"}])
def test_a_prompt_file_that_no_edit_can_use(folders: Path, changes: dict[str, str]) -> None:
    fields: dict[str, Any] = {"mechanism": "concat", "blocks": "middle", **changes}
    tensors = {"k": torch.zeros(2, 16), "v": torch.zeros(2, 16)}
    found = artefacts.Artefact("prompt", "p", tensors, text_width=16, tokens=2, **fields)
    artefacts.write(found, folders / "concept_guard" / "p.safetensors")
    with pytest.raises(ValueError, match="ConceptGuardLoadPrompt: .*(multiplied|sideways)"):
        ConceptGuardLoadPrompt.execute("p.safetensors")


# --- a concept from pictures ------------------------------------------------------------------------------------------


@gradients()
def test_the_loss_is_that_of_denoising_and_only_the_tokens_learn() -> None:
    """Against the formula, on a network of one layer, with Adam's first step by hand."""
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    seen: list[Any] = []

    def predict(z: Tensor, sigma: Tensor, text: Text, patch: Any = None) -> list[Tensor]:
        seen.append((z, sigma, text.c.detach().clone()))
        return [torch.tanh((text.c @ w).mean(1))[:, :, None, None] + 0.1 * z]

    class Sampling:
        def percent_to_sigma(self, percent: float) -> float:
            return 10 * (1 - percent)

        def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
            return latent + sigma[:, None, None, None] * noise

    latents, caption = torch.arange(8.0).reshape(2, 4, 1, 1), Text(torch.full((1, 6, 3), 0.2))
    start, options = torch.full((2, 3), 0.5), ConceptOptions(tokens=2, lr=0.1, batch=3)
    training = LearnedTokens(predict, Sampling(), latents, [caption, caption], [1, 2], start, options)
    loss = training.step(0)
    ((z, sigma, c),) = seen
    assert sorted(sigma.tolist(), reverse=True) == sigma.tolist()
    which = [int((row[1] != 0.5).all()) for row in c]  # the second picture's tokens start one later
    eps = (z - latents[which]) / sigma[:, None, None, None]
    e = start.double().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.double)
    for row, noisy, noise in zip(which, z.double(), eps.double(), strict=True):
        context = caption.c[0].double().clone()
        context = torch.cat([context[: 1 + row], e, context[3 + row :]])
        predicted = torch.tanh((context @ w.double()).mean(0))[:, None, None] + 0.1 * noisy
        total = total + (noise - predicted).square().mean() / 3
    assert loss == pytest.approx(total.item(), rel=1e-4)
    total.backward()
    torch.testing.assert_close(training.e.double(), start.double() - 0.1 * e.grad.sign(), rtol=1e-3, atol=1e-3)


def learn(model: Any, clip: Any, **changes: Any) -> Any:
    images = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    small: dict[str, Any] = {"name": "glyph", "tokens": 2, "steps": 5, "checkpointing": False}
    inputs = {"images": images, **small, **changes}
    return ConceptGuardLearnConcept.execute(model, clip, Pixels(), **inputs).args


def tiny_encoding(clip: Any, text: str) -> Tensor:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]


def test_a_learned_concept_is_erased_as_any_other(model: Any, clip: Any, folders: Path) -> None:
    concept, plot = learn(model, clip, captions="a cat\na bus\na dog")
    assert concept.name == "glyph" and concept.phrases[0].own == (75, 76) and plot.shape[-1] == 3
    captions = [tiny_encoding(clip, each) for each in ("a cat", "a bus", "a dog")]
    torch.testing.assert_close(concept.baseline, torch.cat(captions).mean(0, keepdim=True))  # neutral: what they say
    assert torch.equal(concept.phrases[0].tokens[:, :75], concept.baseline[:, :75])
    assert torch.equal(concept.empty, tiny_encoding(clip, ""))
    plain = tiny.sample(model)
    cre = ConceptGuardCRE.execute(model, concept, floor=0.0)
    edited = [cre.args[0], ConceptGuardEIUP.execute(model, concept, -2.0).args[0]]
    assert all(not torch.equal(tiny.sample(each), plain) for each in edited)
    (file,) = ConceptGuardSaveConcept.execute(concept, "mine").args
    again = ConceptGuardLoadConcept.execute(file).args[0]
    assert again.key == concept.key and again.artefact.training["captions"] == ["a cat", "a bus", "a dog"]


@pytest.mark.slow
def test_learning_makes_the_pictures_likelier(model: Any, clip: Any) -> None:
    """The loss on the same draws, before and after."""

    def loss_of(steps: int) -> float:
        concept, _ = learn(model, clip, steps=steps, learning_rate=0.05)
        losses: list[float] = []

        def measure(predict: Predictor) -> None:
            (text,), options = predict.texts, ConceptOptions(tokens=2, lr=0.0, batch=8, seed=99)
            start = text.c[0, 75:]
            fixed = LearnedTokens(predict, predict.sampling, predict.latents, [text] * 3, [75] * 3, start, options)
            losses.extend(fixed.step(i) for i in range(3))

        pictures = Pixels().encode(torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0)))
        train_with(model, [[concept.phrases[0].tokens, {}]], pictures, measure)
        return sum(losses)

    assert loss_of(40) < loss_of(1)


def test_stopped_learning_goes_on(model: Any, clip: Any, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, plot = learn(model, clip)
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            learn(model, clip)
    assert len(unfinished(folders)) == 1
    resumed, plot_again = learn(model, clip)
    assert resumed.key == whole.key and torch.equal(plot, plot_again) and not unfinished(folders)


def test_it_starts_from_words_or_from_nothing() -> None:
    empty = tiny.tokens(7)
    words = tiny.tokens(8)[0, 1:3]
    options = ConceptOptions(tokens=3)
    assert torch.equal(tokens_start(options, empty, words), words[[0, 1, 0]])
    close = tokens_start(options, empty)
    assert 0 < (close - empty[0, 1:4]).abs().max() < empty.std()


def test_tokens_go_where_the_caption_leaves_room() -> None:
    c = torch.zeros(2, 5, 1)
    assert placed(c, torch.ones(2, 1), [1, 3])[..., 0].tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(9, 64, 64, 3)}, "images holds 9 pictures"),
        ({"images": torch.zeros(1, 8, 64, 3)}, "too small"),
        ({"captions": "a\nb"}, "2 lines for 3 pictures"),
        ({"captions": "a " * 74}, "no room for 2 tokens"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(model: Any, clip: Any, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"ConceptGuardLearnConcept: .*{message}"):
        learn(model, clip, **changes)


def test_only_learned_concepts_are_saved() -> None:
    with pytest.raises(ValueError, match="ConceptGuardSaveConcept: concept was not learned"):
        ConceptGuardSaveConcept.execute(tiny.concept(), "x")


def test_a_concept_file_with_too_many_tokens() -> None:
    tensors = {"learned": torch.zeros(76, 16), "empty": torch.zeros(77, 16)}
    with pytest.raises(ValueError, match="too many"):
        concept_of(artefacts.Artefact("concept", "c", tensors))
