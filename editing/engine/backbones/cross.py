"""Diffusion transformers that read the text in a cross-attention of their own: a row of FAMILIES each.

Weights alone tell a concept's keys and values there, so all edits act as in a UNet. The blocks are reached by the
host's `optimized_attention_override`, around whatever another pack has put there; their cross-attentions are told from
the others by their keys, as many as the text has tokens, and are counted. PixArt's never ask for an override: there
the projections around them are watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...edits.beside import IDS
from ...edits.blocks import BlockKey
from ...edits.digest import Shared, digest
from ...methods.attention import split_heads
from ...methods.tokens import TokenSet
from ..backbone import Backbone, register_backbone
from ..binding import KV
from ..run import CALL, Call, Run
from ..streams import ModelCall
from .joint import OVERRIDE, Around, admit_beside, attribute, counted, through


@dataclass
class CrossAttention(Shared):
    """One block's, from the text as the model is called with it."""

    heads: int
    to_k: Callable[[Tensor], Tensor]
    to_v: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """One class of the host's. name: for people, and for presets; of: its name; kind: of a block's cross-attention.

    width: of the text that it is called with; dim: of a token of the picture; heads: of an attention; patch: of height
    and width; to_k, to_v: of a network, one of its attentions and a text; overridden: whether the attentions ask for
    an override; adapted: of a network, a text, its T5 tokens [1, n] and their weights [1, n, 1] to the text that it is
    called with, where that is not the encoding.
    """

    name: str
    of: str
    kind: str
    width: Callable[[Any], int]
    dim: Callable[[Any], int]
    heads: Callable[[Any], int]
    patch: Callable[[Any], int]
    to_k: Callable[[Any, Any, Tensor], Tensor]
    to_v: Callable[[Any, Any, Tensor], Tensor]
    overridden: bool = True
    adapted: Callable[[Any, Tensor, Tensor, Tensor], Tensor] | None = None


def captioned(network: Any, attn: Any, tokens: Tensor) -> tuple[Tensor, ...]:
    """PixArt's keys and values, [R, T, C] each, of tokens [R, T, W]."""
    return attn.kv_linear(network.y_embedder(tokens[:, None], False)[:, 0]).chunk(2, -1)


def k_of_cosmos(network: Any, attn: Any, tokens: Tensor) -> Tensor:
    """tokens: [b, T, W]; returns the keys, heads side by side, [b, T, C]."""
    return attn.k_norm(attn.k_proj(tokens).unflatten(-1, (attn.n_heads, -1))).flatten(-2)


COSMOS = Family(
    "Cosmos-Predict2",
    "MiniTrainDIT",
    "Attention",
    attribute("blocks.0.cross_attn.context_dim"),
    attribute("model_channels"),
    attribute("num_heads"),
    attribute("patch_spatial"),
    k_of_cosmos,
    lambda network, attn, tokens: attn.v_proj(tokens),
)
FAMILIES = (
    Family(
        "Wan",
        "WanModel",
        "WanT2VCrossAttention",
        attribute("text_embedding.0.in_features"),
        attribute("dim"),
        attribute("num_heads"),
        attribute("patch_size.2"),
        lambda network, attn, tokens: attn.norm_k(attn.k(network.text_embedding(tokens))),
        lambda network, attn, tokens: attn.v(network.text_embedding(tokens)),
    ),
    COSMOS,
    replace(
        COSMOS,
        name="Anima",
        of="Anima",
        width=attribute("llm_adapter.blocks.0.cross_attn.context_dim"),
        adapted=lambda network, text, ids, weights: network.preprocess_text_embeds(text, ids, t5xxl_weights=weights),
    ),
    Family(
        "PixArt",
        "PixArtMS",
        "MultiHeadCrossAttention",
        attribute("y_embedder.y_proj.fc1.in_features"),
        attribute("hidden_size"),
        attribute("num_heads"),
        attribute("patch_size"),
        lambda network, attn, tokens: captioned(network, attn, tokens)[0],
        lambda network, attn, tokens: captioned(network, attn, tokens)[1],
        overridden=False,
    ),
)


@dataclass
class Place(Shared):
    """text: tokens of the model call; width: of the picture; calls, count: attentions that have been called, and
    cross-attentions among them; within: the block whose cross-attention another pack's forward computes, -1 before the
    first, None where the host's own do."""

    text: int
    width: int
    calls: int = 0
    count: int = 0
    within: int | None = None


@register_backbone
class Cross(Backbone):
    supports = ", ".join(f"{family.name}{' (text to video)' * (family.of == 'WanModel')}" for family in FAMILIES)
    sides = ("block",)
    kind: Family
    network: Any

    @classmethod
    def of(cls, network: torch.nn.Module, name: str) -> Cross | None:
        model: Any = network
        kind = next((each for each in FAMILIES if each.of == type(network).__name__), None)
        if kind is None or type(model.blocks[0].cross_attn).__name__ != kind.kind:
            return None
        blocks: dict[BlockKey, Any] = {
            ("block", i, 0): CrossAttention(
                kind.heads(model),
                partial(kind.to_k, model, block.cross_attn),
                partial(kind.to_v, model, block.cross_attn),
            )
            for i, block in enumerate(model.blocks)
        }
        width = kind.width(model)
        found = cls(
            name, width, blocks, f"{kind.name} {digest((width, kind.dim(model), list(blocks)))[:12]}", kind.name
        )
        found.kind, found.network = kind, network
        return found

    def keys_values(self, key: BlockKey, tokens: TokenSet, dtype: torch.dtype) -> KV:
        if self.kind.adapted is None:
            return super().keys_values(key, tokens, dtype)
        if tokens.adapted is None:
            tokens.adapted = torch.cat([self.adapted(said, tokens.k.to(dtype)) for said in tokens.beside])
        attn = self.blocks[key]
        K, V = (split_heads(to(tokens.adapted), attn.heads) for to in (attn.to_k, attn.to_v))
        return KV.of(tokens, K, V)

    def adapted(self, prompts: Sequence[Mapping[str, Tensor]], like: Tensor) -> Tensor:
        """The mean of some prompts as the network is called with them: [1, L, W], on the device and in the dtype of
        `like`."""
        assert self.kind.adapted is not None
        texts = []
        for said in prompts:
            text, weights = said["tokens"].to(like), said[IDS[1]].to(like)[None, :, None]
            texts.append(self.kind.adapted(self.network, text, said[IDS[0]].to(like.device)[None], weights))
        return torch.cat(texts).mean(0, keepdim=True)

    def values(self, key: BlockKey, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
        """rows: [n, W] of text encodings; returns [n, C], or None where the network adapts the text first."""
        return None if self.kind.adapted is not None else super().values(key, rows, dtype)

    def hooks(self, run: Run) -> CrossHooks:
        return CrossHooks(run, self)

    def prepare(self, run: Run, call: Call, made: ModelCall, executor: Callable[..., Tensor]) -> ModelCall:
        """The text as edits of the text make it, for all blocks alike: `admit` has seen to that."""
        call.place = Place(made.context.shape[1], -(-made.x.shape[-1] // self.kind.patch(self.network)))
        if call.plan.texts:
            text, options = made.context, made.more["transformer_options"]
            made.more["c_crossattn"], _ = run.text(next(iter(self.blocks)), text, text, options)
            call.read.update(dict.fromkeys(self.blocks))
        if not self.kind.overridden:
            return Projected(made.x, made.t, made.more, made.given, CrossHooks(run, self), self.network.blocks)
        made = made.with_options(counted(made.more["transformer_options"], call.place))
        if not any("forward" in vars(block.cross_attn) for block in self.network.blocks):
            return made
        call.place.within = -1
        return Entered(made.x, made.t, made.more, made.given, call.place, self.network.blocks)

    def admit(self, spec: Any) -> None:
        super().admit(spec)
        if self.kind.adapted is not None:
            admit_beside(spec, IDS[0], self.name)
        if spec.method == "direction" and self.chosen(spec.blocks, spec.node) != set(self.blocks):
            raise spec.error(
                f'blocks is "{spec.blocks}", but {self.name} reads its text once, before the first block; set it to all'
            )


@dataclass
class CrossHooks:
    """One override for all attentions. q, A: [B, N, C]; k, v: [B, T, C], the heads side by side in C."""

    run: Run
    backbone: Cross

    def install(self, options: dict[str, Any], call: Call) -> dict[str, Any]:
        call.previous = {OVERRIDE: options[OVERRIDE]} if options.get(OVERRIDE) else {}
        if not self.backbone.kind.overridden:
            return options
        return {**Around(self.backbone, call.who).wrapped(options), OVERRIDE: self.attention}

    def attention(self, plain: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **more: Any) -> Tensor:
        """q: [B, N, C]; k, v: [B, L, C]; or [B, H, N, d] and [B, H, L, d]; returns [B, N, C]."""
        extra = more["transformer_options"]
        call: Call = extra[CALL]
        A = through(call.previous.get(OVERRIDE), plain, q, k, v, heads, *args, **more)
        if more.get("skip_reshape"):
            q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        if not self.reads(call.place, q, k):
            return A
        key = tuple(self.backbone.blocks)[call.place.count % len(self.backbone.blocks)]
        call.place.count += 1
        return self.attended(key, A, q, k, v, extra)

    def reads(self, place: Place, q: Tensor, k: Tensor) -> bool:
        """Whether an attention reads the text: where it has as many tokens as the picture, every second one does. Of
        another pack's, the first of its block: what it reads then is a text of its own, as a negative one's."""
        place.calls += 1
        if place.within is not None:
            return k.shape[1] == place.text and place.count == place.within
        return k.shape[1] == place.text and (q.shape[1] != k.shape[1] or place.calls % 2 == 0)

    def attended(self, key: BlockKey, A: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        call: Call = extra[CALL]
        if not call.reaches(key):
            return A
        width = call.place.width
        shape = (len(q), 1, q.shape[1] // width, width)  # of a video, its pictures below each other
        return self.run.attended(key, A, q, k, v, {**extra, "activations_shape": shape})


@dataclass
class Entered(ModelCall):
    """A model call in which the blocks say when their cross-attentions are called."""

    place: Any = None
    blocks: Iterable[Any] = ()

    def through(self, executor: Callable[..., Tensor]) -> Tensor:
        with ExitStack() as stack:
            for i, block in enumerate(self.blocks):
                stack.callback(block.cross_attn.register_forward_pre_hook(partial(self.entered, i)).remove)
            return super().through(executor)

    def entered(self, i: int, *_: Any) -> None:
        self.place.count = self.place.within = i


@dataclass
class Projected(ModelCall):
    """A model call whose cross-attentions are edited between their projections."""

    edits: CrossHooks | None = None
    blocks: Iterable[Any] = ()

    def through(self, executor: Callable[..., Tensor]) -> Tensor:
        with ExitStack() as stack:
            for i, block in enumerate(self.blocks):
                for hook in self.hooked(("block", i, 0), block.cross_attn):
                    stack.callback(hook.remove)
            return super().through(executor)

    def hooked(self, key: BlockKey, attn: Any) -> Iterator[Any]:
        """Hooks that see a block's q and its keys and values, and change what goes into its output's projection."""
        assert self.edits is not None
        edits, seen, extra = self.edits, {}, self.more["transformer_options"]

        def projected(module: Any, _: Any, out: Tensor) -> None:
            seen[module] = out

        def output(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            (A,) = inputs
            q, kv = seen.pop(attn.q_linear), seen.pop(attn.kv_linear)
            k, v = kv.reshape(len(A), -1, 2, A.shape[-1]).unbind(2)
            return (edits.attended(key, A, q, k, v, extra),)

        yield attn.q_linear.register_forward_hook(projected)
        yield attn.kv_linear.register_forward_hook(projected)
        yield attn.proj.register_forward_pre_hook(output)
