"""A kind of model that nobody has heard of, defined here alone: text and picture share one attention, as in a diffusion
transformer, and CRE reaches it through the same engine.

For the picture's queries the output splits, O = m A + (1 - m) A_I, m the text's share of the softmax; edits change A.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.supported_models
import pytest
import reference
import tiny
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from conceptguard.editing.edits import blocks
from conceptguard.editing.edits.spec import EditSpec, Gate
from conceptguard.editing.engine.backbone import BACKBONES, Backbone, register_backbone
from conceptguard.editing.engine.host import add_edit
from conceptguard.editing.engine.run import CALL, Call, Run
from conceptguard.editing.methods.attention import logits, split_heads

HEADS, DIM, DEPTH, PATCHES = 4, 32, 3, tiny.SIZE**2

# --- the model -------------------------------------------------------------------------------------------------------


class Joint(nn.Module):
    """One attention over the text's tokens and the picture's, in that order."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_out = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.image_k, self.image_v = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.to_k, self.to_v = (nn.Linear(tiny.WIDTH, DIM, bias=False) for _ in "kv")

    def forward(self, x: Tensor, text: Tensor, options: dict[str, Any]) -> Tensor:
        k = torch.cat([self.to_k(text), self.image_k(x)], 1)
        v = torch.cat([self.to_v(text), self.image_v(x)], 1)
        o = optimized_attention(self.to_q(x), k, v, self.heads, transformer_options=options)
        return x + self.to_out(o)


class Transformer(nn.Module):
    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.into, self.out = nn.Linear(4, DIM), nn.Linear(DIM, 4)
        self.layers = nn.ModuleList(Joint() for _ in range(DEPTH))

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: Any = None, **_: Any
    ) -> Tensor:
        h = self.into(x.flatten(2).mT) * (1 + 0.001 * timesteps[:, None, None])
        for i, layer in enumerate(self.layers):
            h = layer(h, context, {**transformer_options, "toy_layer": i})
        return self.out(h).mT.reshape(x.shape)


def build(seed: int = 0) -> ModelPatcher:
    class Config(comfy.supported_models.SD15):
        unet_config = {}
        unet_extra_config = {}

    config = Config({})
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(config, device="cpu", unet_model=Transformer)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.diffusion_model.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


# --- the whole backbone ----------------------------------------------------------------------------------------------


class ToyBackbone(Backbone):
    supports = "toy transformer"
    sides = ("layer",)

    @classmethod
    def of(cls, network: nn.Module, name: str) -> Backbone | None:
        if not isinstance(network, Transformer):
            return None
        layers = {("layer", i, 0): layer for i, layer in enumerate(network.layers)}
        return cls(name, tiny.WIDTH, layers, "toy 1", "toy")  # type: ignore[arg-type]

    def hooks(self, run: Run) -> Any:
        return ToyHooks(run)


@dataclass
class ToyHooks:
    run: Run

    def install(self, options: dict[str, Any], call: Call) -> dict[str, Any]:
        before = options.get("optimized_attention_override")
        return {**options, "optimized_attention_override": self.attention, "toy_before": before}

    def attention(self, plain: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **more: Any) -> Tensor:
        """q: [B, N, C]; k, v: [B, L + N, C]."""
        extra = more["transformer_options"]
        before = extra["toy_before"]
        O = plain(q, k, v, heads, **more) if before is None else before(plain, q, k, v, heads, **more)
        L, key = k.shape[1] - q.shape[1], ("layer", extra["toy_layer"], 0)
        if not extra[CALL].reaches(key):
            return O
        Q, K, V = (split_heads(x, heads) for x in (q, k, v))
        weights = logits(Q, K)  # [B, H, N, L + N]
        m = (weights[..., :L].logsumexp(-1) - weights.logsumexp(-1)).exp().transpose(1, 2)[..., None]  # [B, N, H, 1]
        A = (weights[..., :L].softmax(-1) @ V[:, :L].transpose(1, 2)).transpose(1, 2).flatten(2)
        edited = self.run.attended(key, A, q, k[:, :L], v[:, :L], extra)
        return O if edited is A else O + (m * split_heads(edited - A, heads)).flatten(2)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_backbone(ToyBackbone)
    yield
    BACKBONES.remove(ToyBackbone)
    blocks.SIDES.remove("layer")


@pytest.fixture(scope="module")
def toy() -> ModelPatcher:
    return build()


# ---------------------------------------------------------------------------------------------------------------------

CONCEPT = tiny.concept("knife", 100, phrases=2)


def cre(model: ModelPatcher, **changes: Any) -> ModelPatcher:
    return add_edit(model, EditSpec("projection", CONCEPT, options=tiny.CRE, node="Test", **changes))


class Seen:
    """The inputs and outputs of each layer's attention, by layer, of the last call."""

    def __init__(self, model: ModelPatcher) -> None:
        self.layers, self.calls = model.model.diffusion_model.layers, {}
        for i, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(
                lambda _, args, i=i: self.calls.setdefault(i, {}).update(x=args[0], t=args[1])
            )
            layer.to_out.register_forward_pre_hook(lambda _, args, i=i: self.calls[i].update(out=args[0]))


def expected_output(layer: Any, x: Tensor, text: Tensor, s: float) -> Tensor:
    """One row by the formulas at the top, slowly. x: [N, C]; text: [L, W]."""
    q, k_P, v_P = (f(each).double() for f, each in ((layer.to_q, x), (layer.to_k, text), (layer.to_v, text)))
    k_I, v_I = layer.image_k(x).double(), layer.image_v(x).double()
    A = reference.attention(q, k_P, v_P, HEADS)
    A_I = reference.attention(q, k_I, v_I, HEADS)
    found = [
        reference.attention(q, layer.to_k(p), layer.to_v(p), HEADS)
        for p in (each.tokens[0] for each in CONCEPT.phrases)
    ]
    A0 = reference.attention(q, layer.to_k(CONCEPT.baseline[0]), layer.to_v(CONCEPT.baseline[0]), HEADS)
    edited = reference.cre(A, found, [s] * len(found), 1, clip=True, joint=True, A0=A0)
    out = []
    for h in range(HEADS):
        part = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
        z_P = (q[:, part] @ k_P[:, part].T / (DIM // HEADS) ** 0.5).exp().sum(-1, keepdim=True)
        z_I = (q[:, part] @ k_I[:, part].T / (DIM // HEADS) ** 0.5).exp().sum(-1, keepdim=True)
        out.append((z_P * edited[:, part] + z_I * A_I[:, part]) / (z_P + z_I))
    return torch.cat(out, -1)


@pytest.mark.parametrize(("s", "batch"), [(1.0, 1), (0.5, 3)])
def test_cre_takes_the_concept_from_what_the_picture_finds_in_the_text(s: float, batch: int) -> None:
    model = build()
    seen = Seen(model)
    tiny.sample(cre(model, strength=s), batch=batch, steps=1)
    text = {0: tiny.tokens(2)[0], 1: tiny.tokens(1)[0]}  # the negative's rows come first, and stay
    for i, call in seen.calls.items():
        for row in range(2 * batch):
            conditional = row // batch == 1
            expected = expected_output(seen.layers[i], call["x"][row], text[row // batch], s if conditional else 0.0)
            torch.testing.assert_close(call["out"][row].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "off", [{"strength": 0.0}, {"gate": Gate((0.0,))}, {"start_percent": 0.5, "end_percent": 0.5}], ids=str
)
def test_off_is_bit_identical(toy: ModelPatcher, off: dict[str, Any]) -> None:
    assert torch.equal(tiny.sample(cre(toy, **off), batch=2), tiny.sample(toy, batch=2))


def test_its_blocks_are_chosen_by_their_names(toy: ModelPatcher) -> None:
    everywhere, one = (tiny.sample(cre(toy, blocks=text)) for text in ("all", "layer.1"))
    assert torch.equal(tiny.sample(cre(toy, blocks="layer.0-2")), everywhere) and not torch.equal(one, everywhere)
    with pytest.raises(ValueError, match=r'Test: blocks "middle": this model has .*; it has layer.0, layer.1, layer.2'):
        cre(toy, blocks="middle")


def test_another_packs_attention_is_kept(toy: ModelPatcher) -> None:
    calls = []

    def theirs(plain: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["transformer_options"]["toy_layer"])
        return plain(*args, **kwargs)

    both = cre(toy)
    both.model_options["transformer_options"]["optimized_attention_override"] = theirs
    assert torch.equal(tiny.sample(both), tiny.sample(cre(toy)))
    assert set(calls) == {0, 1, 2}


def test_a_model_of_no_known_kind_is_refused_by_name(toy: ModelPatcher) -> None:
    BACKBONES.remove(ToyBackbone)
    try:
        with pytest.raises(ValueError, match=r"Test: cannot edit BaseModel \(Transformer\): .*SD1.x, SD2.x and SDXL"):
            cre(toy)
    finally:
        BACKBONES.append(ToyBackbone)
