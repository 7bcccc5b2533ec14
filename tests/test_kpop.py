"""KPOP: its two updates against a slow copy of the paper's equations, and the training through the host's models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import tiny
import torch
from comfy.sample import prepare_noise
from torch import Tensor, nn
from toy import Layer, Line, respond

from conceptguard.editing.edits.spec import Direction, EditSpec, PromptTokens
from conceptguard.editing.engine.host import add_edit
from conceptguard.editing.methods import cre, eiup
from conceptguard.editing.training.changes import Changes
from conceptguard.editing.training.harness import Predictor, train_with, weights_key
from conceptguard.editing.training.kpop import KPOP, KPOPOptions, LearnedPrompt, prompt_start
from conceptguard.editing.training.loop import Text
from conceptguard.editing.training.mode import gradients

pytestmark = pytest.mark.usefixtures("as_a_node")

CUT = KPOPOptions(lr=1e-2, prompt_lr=1e-2, path_steps=5, guidance=2.0)


# --- equations 5 to 7, on a network of one layer ---------------------------------------------------------------------


def toy(options: KPOPOptions) -> tuple[KPOP, Layer, list[tuple[Tensor, float, Tensor]]]:
    layer, seen = Layer(), []

    def predict(z: Tensor, sigma: Tensor, text: Text, patch: Any = None) -> list[Tensor]:
        c = text.c
        if patch is not None:
            _, c, _ = patch(None, c, c, {"block": ("middle", 0)})
            seen.append((z.clone(), float(sigma[0]), text.c.clone()))
        return [respond(layer(c), z)]

    concepts = [Text(torch.full((1, 2, 3), 0.5 + i)) for i in range(2)]
    neutral, empty = [Text(torch.full((1, 2, 3), -1.0 - i)) for i in range(2)], Text(torch.zeros(1, 2, 3))
    prompt = LearnedPrompt(torch.full((1, 2, 3), 0.3))
    changes = Changes({"layer": layer}, 0, 0, torch.device("cpu"))
    training = KPOP(predict, Line(), concepts, neutral, empty, changes, prompt, (4, 2, 2), options)
    return training, layer, seen


class ByHandAdam:
    """Kingma and Ba's algorithm 1."""

    def __init__(self, x: Tensor, lr: float) -> None:
        self.x, self.lr, self.m, self.v, self.t = x, lr, torch.zeros_like(x), torch.zeros_like(x), 0

    def down(self, g: Tensor) -> None:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g * g
        step = (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)
        self.x = self.x - self.lr * step


@pytest.mark.parametrize("lam", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("overshoot", [0.0, 1.0])
@gradients()
def test_the_alternating_updates_follow_equations_5_to_7(lam: float, overshoot: float) -> None:
    options = KPOPOptions(**{**CUT.__dict__, "lam": lam, "overshoot": overshoot, "batch": 2, "seed": 4})
    training, layer, seen = toy(options)
    theta = layer.weight.double()
    weights = ByHandAdam(theta, options.lr)
    p = ByHandAdam(torch.full((2, 3), 0.3, dtype=torch.double), options.prompt_lr)
    for i in range(7):
        seen.clear()
        loss = training.step(i)
        z, c = (x.double() for x in seen[0][::2])

        def out(w: Tensor, c: Tensor, p: Tensor | None = None, z: Tensor = z) -> Tensor:
            return respond((c if p is None else torch.cat([c, p.expand(len(c), -1, -1)], 1)) @ w.T, z)

        e_e, e_n = out(theta, c), out(theta, -0.5 - c)  # each concept's own neutral text
        target = e_n - overshoot * (e_e - e_n)
        x = p.x.clone().requires_grad_()
        (out(weights.x, c, x) - e_e).square().mean().backward()  # eq. 5
        p.down(x.grad)  # eq. 6
        w = weights.x.clone().requires_grad_()
        removal = (out(w, c) - target).square().mean() + lam * (out(w, c, p.x) - e_e).square().mean()  # eq. 7
        removal.backward()
        weights.down(w.grad)
        assert loss == pytest.approx(removal.item(), rel=1e-4)
        torch.testing.assert_close(training.prompt.k[0].double(), p.x, rtol=1e-3, atol=1e-4)
        delta = training.changes.tensors["diffusion_model.layer.diff"]
        torch.testing.assert_close(delta.double(), weights.x - theta, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", ["chain", "fresh"])
@gradients()
def test_z_t_is_ddim_with_guidance_towards_the_concept(path: str) -> None:
    """With theta' frozen, so that the whole path can be walked again."""
    options = KPOPOptions(**{**CUT.__dict__, "lr": 0.0, "prompt_lr": 0.0, "path": path, "seed": 9})
    training, layer, seen = toy(options)
    for i in range(5):
        training.step(i)
    visits = seen[::2]  # with the prompt: once in eq. 5, once in eq. 7
    if path == "chain":
        assert [s for _, s, _ in visits] == sorted((s for _, s, _ in visits), reverse=True)
        for (z, s, c), (after, s_after, _) in zip(visits, visits[1:], strict=False):
            e_c, e_0 = (
                respond(layer.weight.expand(1, 4, 3) @ c[0, 0] * torch.ones(1, 2, 1), z),
                respond(torch.zeros(1, 2, 4), z),
            )
            e = e_0 + options.guidance * (e_c - e_0)
            torch.testing.assert_close(after, z + (s_after - s) * e, rtol=1e-4, atol=1e-4)
    assert len({s for _, s, _ in visits}) == 5
    assert {float(c[0, 0, 0]) for _, _, c in visits} <= {0.5, 1.5}


@gradients()
def test_each_level_of_a_path_is_from_its_own_part_of_the_timesteps() -> None:
    training, _, _ = toy(CUT)
    levels = training.path.levels(torch.Generator().manual_seed(3))
    assert levels[-1] == 0
    assert all(10 * (1 - (j + 1) / 5) <= s <= 10 * (1 - j / 5) for j, s in enumerate(levels[:-1]))


@gradients()
def test_the_original_weights_stay() -> None:
    training, layer, _ = toy(CUT)
    before = layer.weight.clone()
    for i in range(3):
        training.step(i)
    assert torch.equal(layer.weight, before)
    with training.changes.off():
        assert torch.equal(layer(torch.ones(1, 3)), torch.ones(1, 3) @ before.T)
    assert not torch.equal(layer(torch.ones(1, 3)), torch.ones(1, 3) @ before.T)


@pytest.mark.parametrize("path", ["chain", "fresh"])
@gradients()
def test_going_on_from_a_checkpoint_is_the_same_as_never_stopping(path: str) -> None:
    options = KPOPOptions(**{**CUT.__dict__, "path": path})
    whole, first, second = (toy(options)[0] for _ in range(3))
    losses = [whole.step(i) for i in range(8)]
    for i in range(3):
        first.step(i)
    second.restore(first.state())
    assert losses[3:] == [second.step(i) for i in range(3, 8)]
    assert all(torch.equal(a, b) for a, b in zip(whole.state().values(), second.state().values(), strict=True))


# --- through the host's models ----------------------------------------------------------------------------------------


def prompt_of(seed: int) -> Any:
    return [tiny.tokens(seed), {"pooled_output": torch.zeros(1, 1280)}]


def inside(model: Any, body: Any, seeds: Sequence[int] = (11, 12, 13, 2), **how: Any) -> Any:
    """What `body` makes of a Predictor of the prompts of these seeds, and of a batch of one latent."""
    out: list[Any] = []
    prompts = [prompt_of(seed) for seed in seeds]
    train_with(model, prompts, torch.zeros(1, 4, 8, 8), lambda predict: out.append(body(predict)), **how)
    return out[0]


def training_of(
    predict: Predictor,
    prompt: LearnedPrompt | None = None,
    weights: str = "cross-attention",
    rank: int = 0,
    **options: Any,
) -> KPOP:
    made = KPOPOptions(**{**CUT.__dict__, **options})
    first, second, neutral, empty = predict.texts
    prompt = prompt or LearnedPrompt(prompt_start("noise", "concat", 3, first.c, 0))
    changes = predict.changes(weights, rank, made.seed)
    empty = replace(empty, positive=False)
    return KPOP(predict, predict.sampling, [first, second], [neutral] * 2, empty, changes, prompt, (4, 8, 8), made)


def after(steps: int, model: Any, how: dict[str, Any] | None = None, **options: Any) -> KPOP:
    """A training after so many steps."""

    def body(predict: Predictor) -> KPOP:
        training = training_of(predict, **options)
        for i in range(steps):
            assert math.isfinite(training.step(i))
        return training

    return inside(model, body, **(how or {}))


@gradients()
def z_and_sigma(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 5, torch.full((batch,), 5.0)


@pytest.mark.parametrize("make", [tiny.sd1, tiny.sdxl])
def test_it_predicts_what_the_host_does(make: Any) -> None:
    model = make()
    z, sigma = z_and_sigma()
    e, extra = inside(model, lambda p: (p(z, sigma, p.texts[0].rows(2))[0].detach(), p.entry(p.texts[0].rows(2))))
    conds = {name: cond.cond for name, cond in extra["model_conds"].items()}
    denoised = model.model.apply_model(z, sigma, c_crossattn=conds.pop("c_crossattn"), **conds)
    torch.testing.assert_close(z - sigma[:, None, None, None] * e, denoised, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [tiny.sd1, tiny.sdxl])
@pytest.mark.parametrize(
    ("mechanism", "blocks"), [("concat", "middle"), ("concat", "middle,output"), ("concat", "all"), ("additive", "all")]
)
def test_training_and_edit_put_the_prompt_in_alike(make: Any, mechanism: str, blocks: str) -> None:
    model, start = make(), prompt_start("noise", mechanism, 3, tiny.tokens(20), 0) * 3
    seen: list[Tensor] = []
    prompt = LearnedPrompt(start, mechanism, blocks, "two")
    if mechanism == "concat":
        prompt.v.data.neg_()
    learned = prompt.result("p")
    if mechanism == "concat":
        spec = EditSpec("prompt", learned, blocks=learned.blocks)
    else:
        spec = EditSpec("direction", Direction("p", learned.k[0]), blocks=learned.blocks)
    tiny.sample(add_edit(model, spec), steps=1, cfg=1.0, callback=lambda i, x0, x, n: seen.append(x0))

    def body(predict: Predictor) -> tuple[Tensor, ...]:
        noise, c = torch.zeros(1, 4, 8, 8), predict.texts[0]
        sigma = comfy.samplers.calculate_sigmas(predict.sampling, "normal", 1)[:1]
        z = predict.sampling.noise_scaling(sigma, prepare_noise(noise, 5).clone(), noise, True)
        (e,), (plain,) = predict(z, sigma, c, patch=prompt.patch), predict(z, sigma, c)
        return e.detach(), plain.detach(), (z - sigma * e).detach()

    e, plain, x0 = inside(model, body, seeds=(1,))
    torch.testing.assert_close(x0, seen[0], rtol=2e-3, atol=2e-3)
    assert (e - plain).abs().max() > 1e-2


KINDS = [("cross-attention", 0), ("cross-attention", 2), ("others", 2), ("all", 0)]


@pytest.mark.parametrize(("weights", "rank"), KINDS)
def test_the_hosts_lora_loader_gives_the_sanitised_network(weights: str, rank: int) -> None:
    model = tiny.sd1()
    z, sigma = z_and_sigma()
    before = {name: w.clone() for name, w in model.model.state_dict().items()}

    def body(predict: Predictor) -> tuple[Any, ...]:
        training = training_of(predict, weights=weights, rank=rank)
        for i in range(2):
            training.step(i)
        c = predict.texts[0].rows(2)
        (e,) = predict(z, sigma, c)
        with training.changes.off():
            (original,) = predict(z, sigma, c)
        return e.detach(), original.detach(), training.changes.lora()

    e, original, lora = inside(model, body)
    assert all(torch.equal(before[name], w) for name, w in model.model.state_dict().items())
    assert all(not getattr(m, "weight_function", None) for m in model.model.diffusion_model.modules())
    assert (e - original).abs().max() > 1e-2
    assert all((".attn2." in name) == (weights == "cross-attention") for name in lora) or weights == "all"
    loaded, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert len(loaded.patches) == len([n for n in lora if n.endswith((".diff", ".diff_b", "up.weight"))])
    again = inside(loaded, lambda predict: predict(z, sigma, predict.texts[0].rows(2))[0].detach())
    torch.testing.assert_close(again, e, rtol=1e-2, atol=2e-3)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(before[name], w) for name, w in model.model.state_dict().items())


def test_a_low_rank_change_is_the_hosts_lora() -> None:
    """Of a linear layer and of a convolution, as the host's own loader reads the file."""
    layers = {"line": nn.Linear(6, 4), "conv": nn.Conv2d(3, 5, 3)}
    for layer in layers.values():
        layer.weight_function = []  # type: ignore[assignment]
    with gradients():
        changes = Changes(layers, 2, 7, torch.device("cpu"))
        for p in changes.tensors.values():
            p.data.normal_(generator=torch.Generator().manual_seed(1))
    lora = changes.lora()
    assert lora["diffusion_model.conv.lora_down.weight"].shape == (2, 3, 3, 3)
    for path, layer in layers.items():
        (change,) = layer.weight_function
        up, down = (lora[f"diffusion_model.{path}.lora_{side}.weight"].float() for side in ("up", "down"))
        by_hand = layer.weight + (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
        torch.testing.assert_close(change(layer.weight), by_hand, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["middle", "all"])
def test_checkpointing_changes_memory_and_no_number(blocks: str) -> None:
    def state(checkpointing: bool) -> dict[str, Tensor]:
        with gradients():
            prompt = LearnedPrompt(prompt_start("noise", "concat", 3, tiny.tokens(11), 0), "concat", blocks)
        how = {"checkpointing": checkpointing}
        return after(2, tiny.sdxl(), how, prompt=prompt, weights="all").state()

    one, two = state(False), state(True)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_bf16_learns_much_the_same() -> None:
    outputs = []
    for dtype in ("fp32", "bf16"):
        training = after(3, tiny.sd1(), {"dtype": dtype}, lr=1e-3)
        assert all(p.dtype == torch.float32 for p in training.changes.tensors.values())
        outputs.append(training.state()["weights"])
    assert 0.8 < torch.cosine_similarity(outputs[0], outputs[1], 0) < 1


def test_the_same_seed_gives_the_same_file_and_another_seed_another() -> None:
    results = [after(2, tiny.sd1(), seed=seed).state() for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))
    assert not torch.equal(results[0]["weights"], results[2]["weights"])


def test_a_model_that_the_host_loaded_while_executing_can_be_trained_on() -> None:
    model = tiny.sd1()
    assert next(model.model.diffusion_model.parameters()).is_inference()
    training = after(1, model, {"checkpointing": True})
    assert not training.prompt.k.is_inference() and training.prompt.k.grad is not None


def test_a_lora_on_the_model_is_part_of_what_is_trained() -> None:
    model = tiny.sd1()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    changed = model.clone()
    changed.add_patches({key: (torch.ones_like(model.model.state_dict()[key]),)})
    z, sigma = z_and_sigma()
    outputs = [
        inside(each, lambda predict: predict(z, sigma, predict.texts[0].rows(2))[0].detach())
        for each in (model, changed, model)
    ]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])
    assert weights_key(model, "fp32") == weights_key(model.clone(), "fp32") != weights_key(changed, "fp32")


@pytest.mark.parametrize("edit", ["projection", "direction", "prompt", "erasure"])
def test_edits_of_the_model_follow_the_weights_that_are_trained(edit: str) -> None:
    """What the engine made of an edit's tokens with other weights would be of another network: after two steps the
    prediction is that of the sanitised, edited model."""
    model, concept = tiny.sd1(), tiny.concept("knife", 30)
    source = {
        "direction": Direction("d", torch.randn(77, tiny.WIDTH, generator=torch.Generator().manual_seed(3))),
        "prompt": PromptTokens("p", tiny.tokens(40)[:, :3], tiny.tokens(41)[:, :3], "concat", "all"),
    }
    options = {"projection": cre.DEFAULTS, "erasure": eiup.DEFAULTS}.get(edit)
    spec = EditSpec(edit, source.get(edit, concept), options=options)
    assert concept.phrases[0].tokens.is_inference()
    z, sigma = z_and_sigma()

    def body(predict: Predictor) -> tuple[Any, ...]:
        training = training_of(predict)
        for i in range(2):
            training.step(i)
        c = predict.texts[0].rows(2)
        own, other = predict(z, sigma, c), predict(z, sigma, replace(c, positive=False))
        return own[0].detach(), other[0].detach(), training.changes.lora()

    e, unedited, lora = inside(add_edit(model, spec), body)
    loaded, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)

    def predicted(model: Any) -> Tensor:
        return inside(model, lambda predict: predict(z, sigma, predict.texts[0].rows(2))[0].detach())

    torch.testing.assert_close(predicted(add_edit(loaded, spec)), e, rtol=1e-2, atol=5e-3)
    torch.testing.assert_close(predicted(loaded), unedited, rtol=1e-2, atol=5e-3)
    assert (e - unedited).abs().max() > 5e-2


def test_an_edits_window_is_asked_about_each_rows_own_level() -> None:
    """A batch of several noise levels, of which the edit acts on one."""
    model = add_edit(
        tiny.sd1(), EditSpec("projection", tiny.concept("knife", 30), end_percent=0.5, options=cre.DEFAULTS)
    )
    z, _ = z_and_sigma()
    sigma = torch.tensor([8.0, 0.3])

    def body(predict: Predictor) -> tuple[Tensor, ...]:
        c = predict.texts[0].rows(2)
        own = predict(z, sigma, c)[0], predict(z, sigma, replace(c, positive=False))[0]
        alone = [predict(z[i : i + 1], sigma[i : i + 1], predict.texts[0])[0] for i in range(2)]
        return *(e.detach() for e in own), torch.cat(alone).detach()

    e, unedited, alone = inside(model, body)
    torch.testing.assert_close(e, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(e[0], unedited[0], atol=1e-2) and torch.allclose(e[1], unedited[1], atol=1e-4)


def test_a_model_whose_weights_are_streamed_is_cloned_as_one_that_keeps_them() -> None:
    """Newer hosts: `clone(disable_dynamic=True)`, as their own trainer asks for."""
    asked: list[bool] = []
    model = tiny.sd1()

    class Streamed(type(model)):  # type: ignore[misc]
        def clone(self, disable_dynamic: bool = False) -> Any:
            asked.append(disable_dynamic)
            if self.model_options.get("foreign"):
                raise RuntimeError("Cannot create non-dynamic delegate.")
            return type(model).clone(model)

    streamed = model.clone()
    streamed.__class__ = Streamed
    assert after(1, streamed) and asked == [True]
    streamed.model_options["foreign"] = True
    with pytest.raises(ValueError, match="model: Cannot create.*load it with Load Checkpoint"):
        after(1, streamed)
