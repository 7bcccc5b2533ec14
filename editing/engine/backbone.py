"""What the engine knows of a kind of model: one class a kind in backbones/, in one table. Pure torch.

A backbone says where its attentions read the text and how to reach them while the host calls the model; which edits
act there, on which rows and how strongly, is the run's part (run.py), the same for every kind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..edits.blocks import BlockKey, know_sides, select_blocks
from ..edits.spec import Concept, Direction, EditSpec, PromptTokens
from ..methods.attention import split_heads
from ..methods.tokens import TokenSet
from .binding import KV
from .streams import ModelCall


class TextAttention(Protocol):
    """One attention that reads the text, as the host's own CrossAttention has it."""

    heads: int
    to_k: Callable[[Tensor], Tensor]  # [M, T, W] to [M, T, H * d]
    to_v: Callable[[Tensor], Tensor]


class Hooks(Protocol):
    """A backbone's functions in one sampling run: made once, because torch.compile takes a new one for new code."""

    def install(self, options: dict[str, Any], call: Any) -> dict[str, Any]:
        """A copy of a model call's transformer_options with the functions behind all that is there already.

        At each attention of `call.keys` they hand A [B, N, H * d], what the picture's queries q find in the text's keys
        and values k, v, to `Run.attended`, and go on with what that returns; where `call.plan.texts` is not empty, they
        hand the text that keys and values are made of to `Run.text`.
        """
        ...


class Backbone:
    """One model. blocks: its attentions that read the text, by key; fingerprint: the same for models that differ in
    their weights alone; family: for people, and for presets' `base_models`."""

    supports = ""  # for people: the models that this kind is for
    adds_noise = False  # whether a latent at noise level sigma is the clean one plus sigma times noise
    values_apart = False  # whether its attentions make values of a text of their own (hooks hand both to Run.text)
    pooled = 0  # how many of the numbers `y` that it is called with are the pooled text; they stand in front
    sides: tuple[str, ...] = ()  # of its blocks' keys, in their order
    streamed = False  # whether a prompt's keys and values are those of one model call (streams.py)

    def __init__(
        self, name: str, width: int, blocks: Mapping[BlockKey, TextAttention], fingerprint: str = "", family: str = ""
    ) -> None:
        self.name, self.width, self.blocks = name, width, blocks
        self.fingerprint, self.family = fingerprint, family

    @classmethod
    def of(cls, network: torch.nn.Module, name: str) -> Backbone | None:
        """The model as this kind, if it is one. name: for people."""
        raise NotImplementedError

    def hooks(self, run: Any) -> Hooks:
        """The functions of a run (run.Run)."""
        raise NotImplementedError

    def prepare(self, run: Any, call: Any, made: ModelCall, executor: Callable[..., Tensor]) -> ModelCall:
        """A model call as its edits need it, about to be made; executor: makes others before. call: run.Call, installed
        in its options."""
        return made

    def foreign(self) -> str:
        """Who put forwards of their own into its blocks, for people; empty if nobody did, or it cannot tell."""
        return ""

    # -- the text ------------------------------------------------------------------------------------------------------

    def keys_values(self, key: BlockKey, tokens: TokenSet, dtype: torch.dtype) -> KV:
        """A token set in one attention."""
        attn = self.blocks[key]
        k = tokens.k.to(dtype)
        K = split_heads(attn.to_k(k), attn.heads)
        V = split_heads(attn.to_v(k if tokens.v is tokens.k else tokens.v.to(dtype)), attn.heads)
        return KV.of(tokens, K, V)

    def values(self, key: BlockKey, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Rows of text encodings [n, W] as one attention's values, [n, H * d]; None where they cannot be told alone."""
        return self.blocks[key].to_v(rows.to(dtype)[None])[0]

    def text_weights(self, names: Sequence[str]) -> tuple[list[Any], Any, Any]:
        """The modules whose weights a closed-form edit changes: those that read the text, of these names in each of its
        attentions or the one before them all; what norms the text for them; and the one that reads the pooled text.
        None where there is no such thing."""
        return [getattr(attn, name, None) for attn in self.blocks.values() for name in names], None, None

    # -- what suits it -------------------------------------------------------------------------------------------------

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(".".join(map(str, key)) for key in self.blocks)

    def admit(self, spec: EditSpec) -> None:
        """Raise, naming the node and the mend, if `spec` cannot edit this model."""
        self.admit_source(spec.source, spec.node)
        spec.how.admit(spec, self)
        self.chosen(spec.blocks, spec.node)

    def admit_source(self, source: Concept | PromptTokens | Direction, node: str) -> None:
        """Raise if it was made with another text encoder than the model's."""
        if source.width == self.width:
            return
        kind = source.socket
        if learned_on := getattr(source, "backbone", ""):
            raise ValueError(
                f'{node}: {kind} "{source.name}" was learned for {learned_on.split()[0]}, text width '
                f"{source.width}; {self.name} has text width {self.width}. Choose one that was learned on "
                "this kind of model"
            )
        raise ValueError(
            f'{node}: {kind} "{source.name}" was made with a text encoder of width {source.width}, but '
            f"{self.name} reads one of width {self.width}; make the {kind} with the CLIP that belongs to this model"
        )

    def chosen(self, blocks: str, node: str) -> Collection[BlockKey]:
        """The attentions that a `blocks` input names."""
        try:
            return select_blocks(blocks, self.blocks)
        except ValueError as error:
            raise ValueError(f"{node}: {error}") from None


BACKBONES: list[type[Backbone]] = []


def register_backbone(kind: type[Backbone]) -> type[Backbone]:
    """Add a kind of model; the first that knows a model has it."""
    know_sides(*kind.sides)
    BACKBONES.append(kind)
    return kind


def backbone_of(network: torch.nn.Module, model_name: str, node: str) -> Backbone:
    """The model as the engine sees it; `node` is who asks, and is named if the model cannot be edited."""
    network = getattr(network, "_orig_mod", network)  # compiled
    name = f"{model_name} ({type(network).__name__})"
    for kind in BACKBONES:
        if (found := kind.of(network, name)) is not None:
            return found
    raise ValueError(
        f"{node}: cannot edit {name}: ConceptGuard edits the attention of "
        f"{', '.join(kind.supports for kind in BACKBONES)} models; connect one of these"
    )
