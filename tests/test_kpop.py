"""KPOP: its two updates against a slow copy of the paper's equations, and the training through the host's models."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import tiny
import torch
from comfy.sample import prepare_noise
from torch import Tensor, nn

from conceptguard.editing.edits.spec import Direction, EditSpec
from conceptguard.editing.engine.host import add_edit
from conceptguard.editing.training.kpop import KPOP, KPOPOptions, LearnedPrompt, prompt_start
from conceptguard.editing.training.learning import Text
from conceptguard.editing.training.lora import Deltas, chosen
from conceptguard.editing.training.mode import gradients
from conceptguard.editing.training.network import Network

CUT = KPOPOptions(lr=1e-2, prompt_lr=1e-2, path_steps=5, guidance=2.0)


# --- equations 5 to 7, on a network of one layer ---------------------------------------------------------------------


class Layer(nn.Module):
    """A module whose weight the host would change through its weight_function."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator), requires_grad=False)
        self.bias = None
        self.weight_function: list[Any] = []

    def forward(self, c: Tensor) -> Tensor:
        w = self.weight
        for change in self.weight_function:
            w = change(w)
        return c @ w.T


class Line:
    """A schedule in which nothing is hidden."""

    def percent_to_sigma(self, percent: float) -> float:
        return 10 * (1 - percent)

    def calculate_denoised(self, sigma: Tensor, output: Tensor, z: Tensor) -> Tensor:
        return z - sigma[:, None, None, None] * output

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        return latent + sigma[:, None, None, None] * noise


def respond(features: Tensor, z: Tensor) -> Tensor:
    """Some output [B, 4, 2, 2] that depends on both. features: [B, T, 4]."""
    return torch.tanh(features.mean(1)[:, :, None, None] * (1 + 0.1 * z)) + 0.05 * z


def toy(options: KPOPOptions) -> tuple[KPOP, Layer, list[tuple[Tensor, float, Tensor]]]:
    layer, seen = Layer(), []

    def predict(z: Tensor, sigma: Tensor, text: Text, patch: Any = None) -> Tensor:
        c = text.c
        if patch is not None:
            _, c, _ = patch(None, c, c, {"block": ("middle", 0)})
            seen.append((z.clone(), float(sigma[0]), text.c.clone()))
        return respond(layer(c), z)

    concepts = [Text(torch.full((1, 2, 3), 0.5 + i)) for i in range(2)]
    neutral, empty = [Text(torch.full((1, 2, 3), -1.0 - i)) for i in range(2)], Text(torch.zeros(1, 2, 3))
    prompt = LearnedPrompt(torch.full((1, 2, 3), 0.3))
    training = KPOP(predict, Line(), concepts, neutral, empty, Deltas({"layer": layer}), prompt, (4, 2, 2), options)
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
        delta = training.deltas.tensors["diffusion_model.layer.diff"]
        torch.testing.assert_close(delta.double(), weights.x - theta, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", ["chain", "fresh"])
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


def test_each_level_of_a_path_is_from_its_own_part_of_the_timesteps() -> None:
    training, _, _ = toy(CUT)
    levels = training.path.levels(torch.Generator().manual_seed(3))
    assert levels[-1] == 0
    assert all(10 * (1 - (j + 1) / 5) <= s <= 10 * (1 - j / 5) for j, s in enumerate(levels[:-1]))


def test_the_original_weights_stay() -> None:
    training, layer, _ = toy(CUT)
    before = layer.weight.clone()
    for i in range(3):
        training.step(i)
    assert torch.equal(layer.weight, before)
    with training.deltas.off():
        assert torch.equal(layer(torch.ones(1, 3)), torch.ones(1, 3) @ before.T)
    assert not torch.equal(layer(torch.ones(1, 3)), torch.ones(1, 3) @ before.T)


@pytest.mark.parametrize("path", ["chain", "fresh"])
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


def network(model: Any, **options: Any) -> Network:
    return Network(model, **options)


def text(net: Network, seed: int) -> Text:
    return net.text([[tiny.tokens(seed), {"pooled_output": torch.zeros(1, 1280)}]], tiny.SIZE, tiny.SIZE)


def training_of(
    net: Network, prompt: LearnedPrompt | None = None, weights: str = "cross-attention", rank: int = 0, **options: Any
) -> KPOP:
    made = KPOPOptions(**{**CUT.__dict__, **options})
    deltas = Deltas(chosen(net.unet, weights), rank, made.seed)
    prompt = prompt or LearnedPrompt(prompt_start("noise", "concat", 3, text(net, 11).c, 0))
    concepts = [text(net, 11), text(net, 12)]
    neutral = [text(net, 13)] * len(concepts)
    return KPOP(net, net.sampling, concepts, neutral, text(net, 2), deltas, prompt, net.shape(8, 8), made)


def z_and_sigma(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 5, torch.full((batch,), 5.0)


@pytest.mark.parametrize("make", [tiny.sd1, tiny.sdxl])
def test_the_copy_predicts_what_the_host_does(make: Any) -> None:
    model = make()
    z, sigma = z_and_sigma()
    with gradients():
        net = network(model)
        c = text(net, 1).rows(2)
        e = net(z, sigma, c).detach()
    denoised = model.model.apply_model(z, sigma, c_crossattn=c.c, **c.extra)
    torch.testing.assert_close(net.sampling.calculate_denoised(sigma, e, z), denoised, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [tiny.sd1, tiny.sdxl])
@pytest.mark.parametrize(
    ("mechanism", "blocks"), [("concat", "middle"), ("concat", "middle,output"), ("concat", "all"), ("additive", "all")]
)
def test_training_and_edit_put_the_prompt_in_alike(make: Any, mechanism: str, blocks: str) -> None:
    model, start = make(), prompt_start("noise", mechanism, 3, tiny.tokens(20), 0) * 3
    seen: list[Tensor] = []
    with gradients():
        net = network(model)
        prompt = LearnedPrompt(start, mechanism, blocks, "two")
        if mechanism == "concat":
            prompt.v.data.neg_()
        learned = prompt.result("p")
        if mechanism == "concat":
            spec = EditSpec("prompt", learned, blocks=learned.blocks)
        else:
            spec = EditSpec("direction", Direction("p", learned.k[0]), blocks=learned.blocks)
        edited = add_edit(model, spec)
        tiny.sample(edited, steps=1, cfg=1.0, callback=lambda i, x0, x, n: seen.append(x0))
        noise = torch.zeros(1, 4, 8, 8)
        sigma = comfy.samplers.calculate_sigmas(net.sampling, "normal", 1)[:1]
        z = net.sampling.noise_scaling(sigma, prepare_noise(noise, 5), noise, True)
        c = text(net, 1)
        e = net(z, sigma, c, prompt.patch).detach()
        plain = net(z, sigma, c).detach()
    x0 = net.sampling.calculate_denoised(sigma, e, z)
    torch.testing.assert_close(x0, seen[0], rtol=2e-3, atol=2e-3)
    assert (e - plain).abs().max() > 1e-2


KINDS = [("cross-attention", 0), ("cross-attention", 2), ("others", 2), ("all", 0)]


@pytest.mark.parametrize(("weights", "rank"), KINDS)
def test_the_hosts_lora_loader_gives_the_sanitised_network(weights: str, rank: int) -> None:
    model = tiny.sd1()
    z, sigma = z_and_sigma()
    before = {name: w.clone() for name, w in model.model.state_dict().items()}
    with gradients():
        net = network(model)
        training = training_of(net, weights=weights, rank=rank)
        for i in range(2):
            training.step(i)
        c = text(net, 11).rows(2)
        e = net(z, sigma, c).detach()
        lora = training.deltas.lora()
        with training.deltas.off():
            original = net(z, sigma, c).detach()
    assert all(torch.equal(before[name], w) for name, w in model.model.state_dict().items())
    assert (e - original).abs().max() > 1e-2
    assert all((".attn2." in name) == (weights == "cross-attention") for name in lora) or weights == "all"
    loaded, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert len(loaded.patches) == len([n for n in lora if n.endswith((".diff", ".diff_b", "up.weight"))])
    with gradients():
        again = Network(loaded)(z, sigma, c).detach()
    torch.testing.assert_close(again, e, rtol=1e-2, atol=2e-3)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(before[name], w) for name, w in model.model.state_dict().items())


@pytest.mark.parametrize("blocks", ["middle", "all"])
def test_checkpointing_changes_memory_and_no_number(blocks: str) -> None:
    states = []
    for checkpointing in (False, True):
        with gradients():
            net = network(tiny.sdxl(), checkpointing=checkpointing)
            prompt = LearnedPrompt(prompt_start("noise", "concat", 3, text(net, 11).c, 0), "concat", blocks)
            training = training_of(net, prompt, weights="all")
            for i in range(2):
                training.step(i)
            states.append(training.state())
    for a, b in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_bf16_learns_much_the_same() -> None:
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        with gradients():
            net = network(tiny.sd1(), dtype=dtype)
            training = training_of(net, lr=1e-3)
            assert all(torch.isfinite(torch.tensor(training.step(i))) for i in range(3))
            assert next(net.unet.parameters()).dtype == dtype
            assert all(p.dtype == torch.float32 for p in training.deltas.tensors.values())
            outputs.append(training.state()["weights"])
    assert torch.cosine_similarity(outputs[0], outputs[1], 0) > 0.8


def test_the_same_seed_gives_the_same_file_and_another_seed_another() -> None:
    results = []
    for seed in (0, 0, 1):
        with gradients():
            training = training_of(network(tiny.sd1()), seed=seed)
            for i in range(2):
                training.step(i)
            results.append(training.state())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))
    assert not torch.equal(results[0]["weights"], results[2]["weights"])


@torch.inference_mode()
def test_a_model_that_the_host_loaded_while_executing_can_be_trained_on() -> None:
    model = tiny.sd1()
    c, empty = tiny.tokens(11), tiny.tokens(2)
    assert next(model.model.diffusion_model.parameters()).is_inference()
    with gradients():
        net = network(model, checkpointing=True)
        made = net.text([[c, {}]], 8, 8), net.text([[empty, {}]], 8, 8)
        deltas = Deltas(chosen(net.unet, "cross-attention"))
        prompt = LearnedPrompt(prompt_start("concept", "concat", 3, made[0].c, 0))
        training = KPOP(net, net.sampling, made[:1], made[1:2], made[1], deltas, prompt, net.shape(8, 8), CUT)
        assert training.step(0) > 0


def test_a_lora_on_the_model_is_part_of_what_is_trained() -> None:
    model = tiny.sd1()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    changed = model.clone()
    changed.add_patches({key: (torch.ones_like(model.model.state_dict()[key]),)})
    z, sigma = z_and_sigma()
    with gradients():
        outputs = [net(z, sigma, text(net, 1).rows(2)) for net in (network(model), network(changed), network(model))]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot train on Flux.*connect an SD1.x"), gradients():
        network(tiny.flux())
