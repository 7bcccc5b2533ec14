"""Diffusion transformers whose text and picture share one attention: a row of FAMILIES each.

For the picture's queries, and per head, such an attention is a mean of what they find in the text and in the picture,

    O_I = m A_t + (1 - m) A_i,      m = Z_text / (Z_text + Z_picture),  Z = sum_j exp(q k_j / sqrt d),

and the edits change A_t as they change the cross-attention's output of a UNet. They change m as well, for what remains
in a concept's place weighs less than the concept, or more: where c_e of the concept e is taken away, and r is drawn
instead of it, or what it is compared with,

    O_I <- m' A_t' + (1 - m') A_i,      log Z_text' = log Z_text + sum_e min(c_e, 1) (log Z_r - log Z_e)

so that a prompt which is the concept itself draws what the prompt r does; of the concepts that a position finds at its
floor as it is, however much the prompt's words lower that: what stands beside the concept keeps its weight. The text's
own queries are left alone, and so are reference pictures (Kontext, Qwen-Image-Edit): a concept in them is not text, and
the run's account says so.
A concept's keys and values are those of its stream (streams.py), in one of two forms:

    beside    the concept in the prompt's place, in a model call of its own, with a copy of the picture that goes its
              way with it: as many calls again as there are prompts
    appended  behind the prompt, in the host's own call, which is as much longer as these texts are: each text reads
              itself and the picture, the prompt and the picture read nothing of it, and all stand where they would
              alone. The picture that a concept reads is then the run's own, drawn with the prompt and edited. Prompts
              that no edit is for, the negative ones, have a call of their own without them, where that is worth it

They agree in the first block, whose text has read nothing yet. Where a prompt says the concept it is read anew before
that (methods/reread.py). All of it happens in the host's `optimized_attention_override`, around whatever another pack
has put there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...edits.beside import LLAMA
from ...edits.blocks import BlockKey
from ...edits.digest import Shared, digest
from ...edits.spec import EditSpec
from ...methods.attention import found_and_weight, logits
from ..backbone import Backbone, register_backbone
from ..plan import PIECE, Text
from ..rows import Rows, Served
from ..rows import said as named
from ..run import CALL, Call, Run
from ..streams import ModelCall, Prompts, Streams, prompts_of

OVERRIDE = "optimized_attention_override"  # in transformer_options: one slot for all packs
CACHED = (
    "the edit was not applied: a cache took the prompt's call of the model for the concept's, which is one of its own "
    "here, and would draw the one for the other. Take the cache out, or use the host's EasyCache or LazyCache"
)
NETWORK = "diffusion_model"  # the host's name for wrappers of a network's forward
OF_UNETS = "input_block_patch"  # patches that no transformer calls, the engine's own Witness among them
HIDDEN = torch.finfo(torch.float16).min / 2  # what a mask adds to a logit where it hides a token, whatever its dtype
WORTH = 0.05  # the share of a call's tokens above which two calls are made of it, to be without them


def attribute(path: str) -> Callable[[Any], Any]:
    """The attribute of a network at a path like "params.num_heads", or "layers.0.dim"."""

    def found(network: Any) -> Any:
        for name in path.split("."):
            network = network[int(name)] if name.isdigit() else getattr(network, name)
        return network

    return found


def counted(options: dict[str, Any], place: Any) -> dict[str, Any]:
    """transformer_options of a model call in which whole blocks that a pack replaces say which ones they are: it may
    leave some out, or call the host's own again, and attentions are told by how many were called. place: with their
    `count`."""
    replaced = options.get("patches_replace", {})
    blocks = replaced.get("dit", {})

    def known(i: int, replacement: Callable[..., Any]) -> Callable[..., Any]:
        def block(given: Any, others: dict[str, Any]) -> Any:
            original = others["original_block"]

            def again(*args: Any) -> Any:
                place.count = i
                return original(*args)

            out = replacement(given, {**others, "original_block": again})
            place.count = i + 1
            return out

        return block

    counting = {key: known(key[1], blocks[key]) for key in blocks if key[0] == "double_block"}
    return {**options, "patches_replace": {**replaced, "dit": {**blocks, **counting}}} if counting else options


@dataclass(frozen=True)
class Segment:
    """A concept's text behind the prompt's: at which tokens; front: how many of them are before its own."""

    name: str
    at: slice
    front: int


@dataclass
class Place(Shared):
    """What one model call's attentions consist of. text, image: tokens; height, width: the picture's, of several layers
    below each other; said: the prompt's text as the model is called with it; segments: texts behind it;
    rows: which of the batch have any use for them; placed: how often positions were asked for; calls, count: attentions
    that have been called, and joint ones among them."""

    text: int
    height: int
    width: int
    said: Text
    segments: list[Segment] = field(default_factory=list)
    rows: slice | Tensor | None = None
    placed: int = 0
    calls: int = 0
    count: int = 0

    @property
    def image(self) -> int:
        return self.height * self.width

    @property
    def behind(self) -> int:
        """Where the texts end."""
        return self.segments[-1].at.stop if self.segments else self.text


def from_the_first(ids: Tensor, place: Place) -> Tensor:
    """Every text begins where the prompt does. ids: [B, L, axes]."""
    placed = ids.clone()
    for each in place.segments:
        placed[:, each.at] = ids[:, : each.at.stop - each.at.start]
    return placed


def to_the_picture(ids: Tensor, place: Place) -> Tensor:
    """The picture begins behind the prompt, and there every text ends: in Lumina they count on along an axis.

    ids: [B, L, axes], of text and picture, or, as newer hosts ask, of all text first and then of the picture.
    """
    start, place.placed = place.behind if place.placed == 0 else 0, place.placed + 1
    placed = ids.clone()
    if start:
        placed = from_the_first(ids, place)
        for each in place.segments:
            placed[:, each.at, 0] += place.text - (each.at.stop - each.at.start)
    placed[:, start : start + place.image, 0] -= place.behind - place.text  # nothing is there where text is alone
    return placed


@dataclass(frozen=True)
class Family:
    """One class of the host's. name: for people, and for presets; of: its name; blocks: the side of the keys and the
    attribute of its lists of blocks, in the order of their attentions.

    width: of the text that it is called with; multiple: its tokens are filled up to one behind it, with a token of the
    model's; least: what the host fills it up to, with zeros in front; text_first: before the picture's; indexed:
    whether the host says in transformer_options which block is at work, or they are counted.
    appended: whether concepts' texts go behind the prompt's; positions: the module that makes them of ids, and ids of
    tokens as `placed` has them; aside: how many attentions, the first of a call, are over one token's layers each;
    refiners: how many, the next, are over the text alone. references: whether pictures to go by stand behind the
    picture; pooled: as a Backbone's.
    reads, normed, reads_pooled: the module that all of the text comes in by, what norms it before that, and what reads
    the pooled text; empty if there is none.
    second: the argument that brings the prompt's states in all layers of another encoder, [B, layers, L, W]; the last's
    stand behind the text, and behind them, in each block, those of a layer of its own.
    """

    name: str
    of: str
    blocks: tuple[tuple[str, str], ...]
    width: Callable[[Any], int]
    heads: Callable[[Any], int]
    multiple: Callable[[Any], int] = lambda network: 1
    text_first: bool = True
    least: Callable[[Any], int] = lambda network: 0
    indexed: bool = False
    appended: bool = True
    patch: str = "patch_size"
    positions: str = "pe_embedder"
    placed: Callable[[Tensor, Place], Tensor] = from_the_first
    aside: int = 0
    refiners: Callable[[Any], int] = lambda network: 0
    references: bool = True
    pooled: Callable[[Any], int] = lambda network: 0
    reads: str = ""
    normed: str = ""
    reads_pooled: str = ""
    second: str = ""


def flux_2_least(network: Any) -> int:
    return 512 if network.params.global_modulation else 0


FLUX = (("double", "double_blocks"), ("single", "single_blocks"))
FAMILIES = (
    Family(
        "Flux",
        "Flux",
        FLUX,
        attribute("params.context_in_dim"),
        attribute("num_heads"),
        least=flux_2_least,
        indexed=True,
        pooled=lambda network: network.params.vec_in_dim or 0,
        reads="txt_in",
        normed="txt_norm",
        reads_pooled="vector_in.in_layer",
    ),
    Family(
        "Chroma",
        "Chroma",
        FLUX,
        attribute("params.context_in_dim"),
        attribute("num_heads"),
        indexed=True,
        reads="txt_in",
    ),
    Family(
        "Qwen-Image",
        "QwenImageTransformer2DModel",
        (("double", "transformer_blocks"),),
        attribute("txt_in.in_features"),
        attribute("transformer_blocks.0.attn.heads"),
        indexed=True,
        reads="txt_in",
        normed="txt_norm",
    ),
    Family(
        "Lumina 2 and Z-Image",
        "NextDiT",
        (("layer", "layers"),),
        attribute("cap_embedder.1.in_features"),
        attribute("n_heads"),
        multiple=lambda network: network.pad_tokens_multiple or 1,
        positions="rope_embedder",
        placed=to_the_picture,
        refiners=lambda network: len(network.context_refiner),
        references=False,
        reads="cap_embedder.1",
        normed="cap_embedder.0",
    ),
    Family(
        "SD3",
        "OpenAISignatureMMDITWrapper",
        (("joint", "joint_blocks"),),
        attribute("context_embedder.in_features"),
        attribute("joint_blocks.0.x_block.attn.num_heads"),
        positions="",
        pooled=lambda network: network.y_embedder.mlp[0].in_features,
        reads="context_embedder",
        reads_pooled="y_embedder.mlp.0",
    ),
    Family(
        "HiDream",
        "HiDreamImageTransformer2DModel",
        (("double", "double_stream_blocks"), ("single", "single_stream_blocks")),
        lambda network: network.caption_projection[-1].linear.in_features,
        attribute("num_attention_heads"),
        text_first=False,
        appended=False,
        pooled=lambda network: network.p_embedder.pooled_embedder.linear_1.in_features,
        second="encoder_hidden_states_llama3",
    ),
    Family(
        "Krea 2",
        "SingleStreamDiT",
        (("single", "blocks"),),
        lambda network: network.txtlayers * network.txtdim,
        attribute("heads"),
        indexed=True,
        patch="patch",
        aside=2,
        refiners=lambda network: len(network.txtfusion.refiner_blocks),
    ),
)


@dataclass
class Attention(Shared):
    """Of one block. What a text becomes there, only a model call can tell: it has no to_k and to_v."""

    heads: int


@register_backbone
class Joint(Backbone):
    supports = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    sides = tuple(dict.fromkeys(side for family in FAMILIES for side, _ in family.blocks))
    streamed = True
    looked = False  # whether an attention over text and picture was ever called: a cache may leave out model calls
    kind: Family
    network: Any

    @classmethod
    def of(cls, network: torch.nn.Module, name: str) -> Joint | None:
        kind = next((each for each in FAMILIES if each.of == type(network).__name__), None)
        if kind is None:
            return None
        attention: Any = Attention(kind.heads(network))
        width = kind.width(network)
        keys = [(side, i, 0) for side, blocks in kind.blocks for i in range(len(getattr(network, blocks)))]
        label = f"{kind.name} {digest((width, attention.heads, keys))[:12]}"
        found = cls(name, width, dict.fromkeys(keys, attention), label, kind.name)
        found.kind, found.network, found.pooled = kind, network, kind.pooled(network)
        return found

    def hooks(self, run: Run) -> JointHooks:
        return JointHooks(run, self)

    def admit(self, spec: EditSpec) -> None:
        super().admit(spec)
        if spec.method == "prompt":
            raise spec.error(
                f'"{spec.source.name}" are tokens that were learned for a cross-attention, and {self.name} has none: '
                "its text changes from block to block. Use CRE or EIUP with a concept"
            )
        if spec.method == "direction" and self.chosen(spec.blocks, spec.node) != set(self.blocks):
            raise spec.error(
                f'blocks is "{spec.blocks}", but {self.name} reads its text once, before the first block; set it to all'
            )
        if self.kind.second:
            admit_beside(spec, LLAMA, self.name)

    def text_weights(self, names: Sequence[str]) -> tuple[list[Any], Any, Any]:
        modules = dict(self.network.named_modules()) | {"": None}
        return [modules.get(self.kind.reads)], modules.get(self.kind.normed), modules.get(self.kind.reads_pooled)

    def tokens(self, text: Tensor) -> int:
        """How many stand for a text [.., T, W] in an attention."""
        multiple = self.kind.multiple(self.network)
        return -(-max(text.shape[-2], self.kind.least(self.network)) // multiple) * multiple

    def place(self, made: ModelCall) -> Place:
        patch = getattr(self.network, self.kind.patch)
        height, width = (-(-side // patch) for side in made.x.shape[-2:])
        layers = made.x.shape[2:-2].numel()  # of Qwen-Image's latents in newer hosts, which have a further axis
        more = 2 * made.more[self.kind.second].shape[2] if self.kind.second else 0
        return Place(self.tokens(made.context) + more, layers * height, width, Text(made.context))

    def prepare(self, run: Run, call: Call, made: ModelCall, executor: Callable[..., Tensor]) -> ModelCall:
        made = self.with_streams(run, call, made, executor)
        return made.with_options(counted(made.more["transformer_options"], call.place))

    def with_streams(self, run: Run, call: Call, made: ModelCall, executor: Callable[..., Tensor]) -> ModelCall:
        """The text as edits of the text make it, and the concepts' streams."""
        if made.more.get("c_crossattn") is None:
            raise ValueError(f"{call.who}: {self.name} is called without a text; connect a prompt")
        if made.more.get("ref_latents") and not self.kind.references and call.plan.specs:
            raise call.plan.specs[0].error(
                f"{self.name} reads reference pictures, with texts of their own, in front of the prompt, where an edit "
                "would take one for the other; take them out of the conditioning"
            )
        run.account.references |= bool(made.more.get("ref_latents"))
        if self.kind.second and made.more.get("image_cond") is not None:
            raise ValueError(
                f"{call.who}: {self.name} is given a picture beside the one that it draws, and edits do not know which "
                "tokens are which; draw from text alone"
            )
        call.place = self.place(made)
        if call.watch is not None:
            shown = torch.tensor(call.served.conditional(len(made.x)), device=made.x.device)
            call.seen = self.streams(call, list(prompts_of(call.watch.sets(made.x.device))), made, shown, executor)
        rows = call.plan.rows(call.served, len(made.x)) if call.plan.specs else None
        if rows is None:
            return made
        if call.plan.texts:
            made.more["c_crossattn"] = changed = self.changed(run, call, made)
            call.place.said = Text(changed)
        if not call.plan.prompts:
            return made
        if call.plan.readings and not self.kind.second:  # what stands beside such a text says it still
            call.place.said = call.plan.reread(made.context, seen_in(made), rows)
            made.more["c_crossattn"] = call.place.said.tokens
        call.place.said = call.plan.told(call.place.said)
        if self.appends(made):
            idle = self.idle(run, call, made, rows)
            return Parted.in_two(self, run, call, made, idle) if idle else self.appended(call, made, rows)
        index = numbers(rows, made)
        call.streams = self.streams(call, call.plan.prompts, made, index, executor)
        return Beside(made.x, made.t, made.more, made.given, call)

    def appends(self, made: ModelCall) -> bool:
        """Whether the concepts' texts can go behind the prompt's: masks and other packs' blocks know its length."""
        replaced = made.more["transformer_options"].get("patches_replace", {}).get("dit")
        return self.kind.appended and made.more.get("attention_mask") is None and not replaced

    def idle(self, run: Run, call: Call, made: ModelCall, rows: Rows) -> set[int]:
        """The parts of the batch that no edit is for, where the texts would weigh enough there for a call without them.

        Weights that are brought to the device in each call are not brought twice; and other packs' patches within the
        blocks, such as the host's NAG, may hold the prompts against each other.
        """
        idle = set(range(len(call.served.parts))) - rows.parts
        patches = made.more["transformer_options"].get("patches", {})
        patched = any(there for name, there in patches.items() if name != OF_UNETS)
        if patched or call.watch is not None or call.served.tiles > 1 or getattr(run.model, "model_lowvram", False):
            return set()
        more = sum(len(names) * self.tokens(tokens) for names, tokens, _ in call.plan.prompts)
        saved = len(idle) / len(call.served.parts) * more / (call.place.text + call.place.image + more)
        return idle if saved >= WORTH else set()

    def appended(self, call: Call, made: ModelCall, rows: Rows) -> Appended:
        """The call with the plan's texts behind the prompt's. rows: the edited ones."""
        place, texts = call.place, [self.filled(made.context)]
        for names, tokens, _ in call.plan.prompts:
            front = max(0, self.kind.least(self.network) - tokens.shape[1])
            for name, row in zip(names, tokens, strict=True):
                text = self.filled(F.pad(row[None], (0, 0, front, 0)).to(made.context))
                start = place.behind
                place.segments.append(Segment(name, slice(start, start + text.shape[1]), front))
                texts.append(text.expand(len(made.x), -1, -1))
        place.rows, call.streams = rows.index, Streams()
        longer = made.reading(torch.cat(texts, 1))
        return Appended(longer.x, longer.t, longer.more, longer.given, self, place, made.context.shape[1], call.plan)

    def filled(self, text: Tensor) -> Tensor:
        """With room behind it for the model's own token. text: [B, T, W]."""
        return F.pad(text, (0, 0, 0, self.tokens(text) - text.shape[1]))

    def changed(self, run: Run, call: Call, made: ModelCall) -> Tensor:
        """The text that the model reads instead; what fills it up in front stays."""
        context, front = made.context, 0
        if self.kind.least(self.network):
            front = int((context != 0).any(-1).any(0).int().argmax())
        text = context[:, front:]
        changed, _ = run.text(next(iter(self.blocks)), text, text, made.more["transformer_options"])
        call.read.update(dict.fromkeys(self.blocks))
        return torch.cat([context[:, :front], changed], 1) if front else changed

    def streams(
        self, call: Call, prompts: Sequence[Prompts], made: ModelCall, index: Tensor, executor: Callable[..., Tensor]
    ) -> Streams:
        """What every block makes of these prompts, in copies of the rows. index: [R]."""
        streams = Streams()
        for names, tokens, said in prompts:
            front = max(0, self.kind.least(self.network) - tokens.shape[1])
            context = F.pad(tokens, (0, 0, front, 0)).repeat_interleave(len(index), 0)
            beside = made.rows(index, len(names)).reading(context)
            if self.kind.second:
                states = said[LLAMA].to(beside.more[self.kind.second])
                beside.more[self.kind.second] = states.repeat_interleave(len(index), 0)
            recorder = Recorder(self, self.place(beside), call, names, streams, front)
            options = made.more["transformer_options"]
            part = call.served.layout(len(made.x)).part
            mine = [call.served.parts[part[i]] for i in index.tolist()[:: call.served.images]]
            own = {OVERRIDE: recorder.attention, CALL: None, "cond_or_uncond": mine * len(names), "uuids": names}
            beside.with_options(counted({**options, **own}, recorder.place)).through(executor)
        if not streams.found and not self.looked:
            raise ValueError(f"{call.who}: {self.unreached}")
        return streams

    @property
    def unreached(self) -> str:
        return (
            f"{self.name} has attention of its own (of GGUF, Nunchaku or another loader, or of a node that runs the "
            "blocks itself, as TeaCache), which no edit reaches; load the model with the host's own loader, and take "
            f"such a node out. ConceptGuard edits {self.supports} there"
        )

    def key(self, place: Place, extra: dict[str, Any]) -> BlockKey | None:
        """The block whose joint attention is called; None for one that is not known."""
        key: BlockKey
        if self.kind.indexed:
            key = (extra.get("block_type", ""), extra.get("block_index", 0), 0)
        else:
            key = tuple(self.blocks)[place.count % len(self.blocks)]
        place.count += 1
        self.looked = True
        return key if key in self.blocks else None


@dataclass
class Beside(ModelCall):
    """A model call behind the streams of its concepts, which were calls of the same prompt's place, picture and time: a
    cache of another pack may take one for the other."""

    call: Call | None = None

    def through(self, executor: Callable[..., Tensor]) -> Tensor:
        assert self.call is not None and self.call.streams is not None
        out = super().through(executor)
        if self.call.streams.found and not self.call.place.count:
            raise self.call.plan.specs[0].error(CACHED)
        return out


@dataclass
class Appended(ModelCall):
    """A model call with texts behind the prompt's, all of them where they would stand alone. prompt: its own tokens."""

    backbone: Joint | None = None
    place: Place | None = None
    prompt: int = 0
    plan: Any = None

    def through(self, executor: Callable[..., Tensor]) -> Tensor:
        assert self.backbone is not None and self.place is not None
        kind, network, place = self.backbone.kind, self.backbone.network, self.place

        def moved(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return kind.placed(inputs[0], place), *inputs[1:]

        with ExitStack() as stack:
            if kind.positions:
                module = getattr(network, kind.positions)
                stack.callback(module.register_forward_pre_hook(moved).remove)
            if kind.multiple(network) > 1:
                stack.callback(network.cap_embedder.register_forward_hook(self.fill).remove)
            out = super().through(executor)
        if not place.count and not self.backbone.looked:
            raise self.plan.specs[0].error(self.backbone.unreached)
        return out

    def fill(self, network: Any, _: Any, out: Tensor) -> Tensor:
        """Z-Image's own token in the room behind each text. out: [B, L, C]."""
        assert self.backbone is not None and self.place is not None
        lengths = {name: tokens.shape[1] for names, tokens, _ in self.plan.prompts for name in names}
        ends = [(self.prompt, self.place.text)]
        ends += [(each.at.start + each.front + lengths[each.name], each.at.stop) for each in self.place.segments]
        for end, stop in ends:
            out[:, end:stop] = self.backbone.network.cap_pad_token.to(out)
        return out


@dataclass
class Parted(ModelCall):
    """A model call in two: of the parts that no edit is for, as it would be without one, and of the others.

    index: rows of either; served: what the others are; edited: their call.
    """

    call: Call | None = None
    index: tuple[Tensor, Tensor] | None = None
    served: Served | None = None
    edited: Appended | None = None

    @classmethod
    def in_two(cls, backbone: Joint, run: Run, call: Call, made: ModelCall, idle: set[int]) -> Parted:
        served, options = call.served, made.more["transformer_options"]
        parts = [i for i in range(len(served.parts)) if i not in idle]
        of_row = served.layout(len(made.x)).part
        others, own_rows = (
            torch.tensor([row for row, part in enumerate(of_row) if (part in idle) == plain], device=made.x.device)
            for plain in (True, False)
        )

        def some(of: Sequence[int]) -> dict[str, Any]:
            """transformer_options for these parts alone."""
            told = {name: options[name] for name in ("cond_or_uncond", "uuids") if options.get(name)}
            return {**options, **{name: [each[i] for i in of] for name, each in told.items()}}

        plain = {**some(sorted(idle)), CALL: None}
        del plain[OVERRIDE]
        own = made.rows(own_rows, 1).with_options(some(parts))
        said, call.place = call.place.said, backbone.place(own)
        call.place.said = said.of(own_rows)
        here = run.same(served.of(parts))
        rows = call.plan.rows(here, len(own.x))
        assert rows is not None
        edited = backbone.appended(call, own, rows)
        other = made.rows(others, 1).with_options({**plain, **call.previous})
        return cls(other.x, other.t, other.more, other.given, call, (others, own_rows), here, edited)

    def through(self, executor: Callable[..., Tensor]) -> Tensor:
        assert self.call is not None and self.index is not None and self.served is not None and self.edited is not None
        whole = self.call.served
        plain = super().through(executor)
        self.call.served = self.served
        edited = self.edited.through(executor)
        self.call.served = whole
        out = plain.new_empty(len(plain) + len(edited), *plain.shape[1:])
        for index, part in zip(self.index, (plain, edited), strict=True):
            out[index] = part
        return out


@dataclass
class Recorder:
    """Keeps the text's keys and values of one model call, of prompts `names`, each with all edited rows. front: tokens
    before the prompts' own, which are kept behind them. q, k, v: as the host has them, [B, S, C] or [B, H, S, d]."""

    backbone: Joint
    place: Place
    call: Call
    names: list[str]
    streams: Streams
    front: int = 0

    def attention(self, plain: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **more: Any) -> Tensor:
        out = through(self.call.previous.get(OVERRIDE), plain, q, k, v, heads, *args, **more)
        if (shapes := shaped(self.place, q, k, v, heads, more)) is not None:
            key = self.backbone.key(self.place, more["transformer_options"])
            if key is not None and self.call.reaches(key):
                text, _ = sections(self.backbone.kind, self.place, shapes[0].shape[1])
                K, V = (x[:, text].roll(-self.front, 1).unflatten(0, (len(self.names), -1)) for x in shapes[1:])
                for name, K_m, V_m in zip(self.names, K, V, strict=True):
                    self.streams.found[key, name] = K_m, V_m
        return out


@dataclass
class JointHooks:
    """One override for all attentions. q, k, v: as the host has them, [B, S, C] or [B, H, S, d]."""

    run: Run
    backbone: Joint

    def install(self, options: dict[str, Any], call: Call) -> dict[str, Any]:
        call.previous = {OVERRIDE: options[OVERRIDE]} if options.get(OVERRIDE) else {}
        return {**Around(self.backbone, call.who).wrapped(options), OVERRIDE: self.attention}

    def attention(self, plain: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **more: Any) -> Tensor:
        call: Call = more["transformer_options"][CALL]
        asked = partial(through, call.previous.get(OVERRIDE), plain)
        apart = Apart.of(self.backbone, call, q, heads, more) if call.place.segments else None
        if apart is None:
            return self.edited(call, asked, [q, k, v], heads, args, more)
        prompt, texts = apart.prompt(q, k, v), apart.texts(q, k, v)
        beside = [asked(*each, heads, *args, **more) for each in texts]
        if apart.joint:
            O = self.edited(call, asked, prompt, heads, args, more, apart.keys_values(k, v, heads))
        else:
            O = asked(*prompt, heads, *args, **more)
        return apart.together(O, beside)

    def edited(
        self,
        call: Call,
        asked: Callable[..., Tensor],
        qkv: list[Tensor],
        heads: int,
        args: tuple[Any, ...],
        more: dict[str, Any],
        found: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """An attention's output as the edits leave it. asked: the host's; found: keys and values of the concepts there,
        if they stand behind the prompt."""
        (q, k, v), extra = qkv, more["transformer_options"]
        shapes = shaped(call.place, q, k, v, heads, more)
        key = None if shapes is None else self.backbone.key(call.place, extra)
        if shapes is not None and key is not None and key in call.watched:
            self.watched(call, key, shapes, args, more)
        rows = None if key is None or call.streams is None else call.plan.rows(call.served, len(q))
        if shapes is None or key is None or rows is None or not call.reaches(key):
            return asked(q, k, v, heads, *args, **more)
        assert call.streams is not None
        if found is None and not call.streams.found:
            raise call.plan.specs[0].error(CACHED)
        if found is not None:  # of no other block
            call.streams.found = {(key, name): keys_values for name, keys_values in found.items()}
        text, image = sections(self.backbone.kind, call.place, shapes[0].shape[1])
        q_i, k_i, v_i = (x[rows.index] for x in shapes)
        q_i, mask = q_i[:, image], mask_of(args, more, rows.index, image)
        k_P, v_P, bias = k_i[:, text], v_i[:, text], bias_of(mask, text)

        def changed(A: Tensor) -> tuple[Tensor, Tensor | float]:
            """A_t as the edits leave it, and what log Z_text gains, [R, N, H, 1]. A: [R, N, H, d]."""
            flat, queries, keys, values = (x.flatten(-2) for x in (A.to(q.dtype), q_i, k_P, v_P))
            shape = (len(q), 1, call.place.height, call.place.width)
            here, seen = {**extra, "activations_shape": shape}, call.place.said.of(rows.index)
            if bias is not None:
                seen = seen._replace(tokens=seen_of(seen.tokens, bias), said={})
            out, gained = self.run.edited(key, rows, flat, queries, keys, values, here, text=seen, bias=bias)
            return out.unflatten(-1, (heads, -1)), 0.0 if gained is None else gained

        by_head = more.get("skip_output_reshape", False)
        if mask is None and not call.previous and (parts := halves(q_i, k_i, v_i, text)) is not None:
            O = besides(asked, q, k, v, rows.index, image, heads, args, more)
            A, A_i, u = parts
            A_e, gained = changed(A)
            return placed(O, A_i + torch.sigmoid(u + gained) * (A_e - A_i), rows.index, image, by_head)
        O = asked(q, k, v, heads, *args, **more)
        A, u = split(q_i, k_i, v_i, text, mask)
        O_i = picture_of(O, rows.index, image, by_head, heads)
        A_e, gained = changed(A)
        # (1 - m') A_i, from O_I = m A_t + (1 - m) A_i
        rest = (logsigmoid(-u - gained) - logsigmoid(-u)).exp() * (O_i - torch.sigmoid(u) * A.to(q.dtype).float())
        return placed(O, torch.sigmoid(u + gained) * A_e.float() + rest, rows.index, image, by_head)

    def watched(
        self,
        call: Call,
        key: BlockKey,
        shapes: tuple[Tensor, Tensor, Tensor],
        args: tuple[Any, ...],
        more: dict[str, Any],
    ) -> None:
        """Shows the watch what the picture of the positive prompts finds in the text. shapes: q, k, v [B, L, H, d]."""
        assert call.watch is not None and call.seen is not None
        index = torch.tensor(call.served.conditional(len(shapes[0])), device=shapes[0].device)
        text, image = sections(self.backbone.kind, call.place, shapes[0].shape[1])
        q, k, v = (x[index] for x in shapes)
        q, mask = q[:, image], mask_of(args, more, index, image)
        A, _ = split(q, k, v, text, mask)
        flat, queries, keys = (x.flatten(2) for x in (A.to(q.dtype), q, k[:, text]))
        bind = partial(call.seen.keys_values, key)
        shape = (len(q), 1, call.place.height, call.place.width)
        rows, bias = range(len(q)), bias_of(mask, text)
        call.watch.see(self.backbone, key, flat, queries, keys, rows, call.served.images, shape, bind, bias)


@dataclass
class Around:
    """Sees what the network is called with before and behind other packs' wrappers of it, for an error where these add
    tokens to the text, which would be taken for the picture's, and as many of its own left unedited; or where they put
    an override in the place of the edits', and no attention asks for these. who: asks; before: tokens of each text."""

    backbone: Backbone
    who: str
    before: list[int] = field(default_factory=list)
    override: Any = None

    def wrapped(self, options: dict[str, Any]) -> dict[str, Any]:
        """transformer_options in which it stands around all of them."""
        wrappers = options.get("wrappers", {})
        others = wrappers.get(NETWORK)
        if not others or not any(others.values()):
            return options
        these = {f"{NETWORK} first": [self.first], **others, f"{NETWORK} last": [self.last]}
        return {**options, "wrappers": {**wrappers, NETWORK: these}}

    def given(self, args: tuple[Any, ...], more: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        """The tokens of each text [B, T, W] among the network's arguments, and its transformer_options."""
        texts = [x for x in (*args, *more.values()) if isinstance(x, Tensor) and x.ndim == 3]
        options = more.get("transformer_options") or next(x for x in reversed(args) if isinstance(x, dict))
        return [text.shape[1] for text in texts if text.shape[-1] == self.backbone.width], options

    def first(self, executor: Callable[..., Tensor], *args: Any, **more: Any) -> Tensor:
        self.before, options = self.given(args, more)
        self.override = options.get(OVERRIDE)
        return executor(*args, **more)

    def last(self, executor: Callable[..., Tensor], *args: Any, **more: Any) -> Tensor:
        lengths, options = self.given(args, more)
        if lengths != self.before:
            raise self.error(
                options,
                "changes how many tokens the text has",
                "and an edit cannot tell them from the picture's; take it out, or join the texts with Conditioning "
                "(Concat)",
            )
        call = options.get(CALL)
        reached = None if call is None else call.place.count
        out = executor(*args, **more)
        if call is not None and options.get(OVERRIDE) != self.override and call.place.count == reached:
            raise self.error(options, "puts an attention of its own in the place of the edits'", "take it out")
        return out

    def error(self, options: dict[str, Any], does: str, mend: str) -> ValueError:
        names = [named(each) for held in options["wrappers"][NETWORK].values() for each in held]
        others = ", ".join(name for name in names if type(self).__qualname__ not in name)
        return ValueError(f"{self.who}: the edit was not applied: a wrapper of the network {does} ({others}), {mend}")


@dataclass
class Apart:
    """An attention over several texts behind each other, and the picture if it is joint: each text reads itself and
    the picture. along: of q, k, v; out: of what it returns; by_head: whether q, k, v are [B, H, L, d]."""

    place: Place
    length: int
    joint: bool
    along: int
    out: int

    @classmethod
    def of(cls, backbone: Joint, call: Call, q: Tensor, heads: int, more: dict[str, Any]) -> Apart | None:
        """None for one over the picture alone."""
        place, along = call.place, 2 if more.get("skip_reshape") else 1
        place.calls += 1
        joint = place.calls > backbone.kind.aside and q.shape[along] >= place.behind + place.image
        refined = 0 < place.calls - backbone.kind.aside <= backbone.kind.refiners(backbone.network)
        if not joint and not refined:
            return None
        return cls(place, q.shape[along], joint, along, 2 if more.get("skip_output_reshape") else 1)

    def prompt(self, *parts: Tensor) -> list[Tensor]:
        """q, k, v of the prompt and the picture."""
        return [self.join(self.cut(x, 0, self.place.text), self.picture(x)) for x in parts]

    def texts(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[list[Tensor]]:
        """q, k, v of each text; of the rows that have any use for it."""
        q, k, v = (x[self.place.rows] for x in (q, k, v))
        image = [self.picture(x) for x in (k, v)]
        for each in self.place.segments:
            own = [self.cut(x, each.at.start, each.at.stop) for x in (q, k, v)]
            yield [own[0], *(self.join(x, picture) for x, picture in zip(own[1:], image, strict=True))]

    def keys_values(self, k: Tensor, v: Tensor, heads: int) -> dict[str, tuple[Tensor, Tensor]]:
        """[R, T, H, d] of each text, what fills it in front moved behind it."""
        found = {}
        for each in self.place.segments:
            own = (self.cut(x[self.place.rows], each.at.start, each.at.stop) for x in (k, v))
            shapes = [x.transpose(1, 2) if self.along == 2 else x.reshape(*x.shape[:2], heads, -1) for x in own]
            K, V = (x.roll(-each.front, 1) for x in shapes)
            found[each.name] = K, V
        return found

    def together(self, O: Tensor, texts: Sequence[Tensor]) -> Tensor:
        """What was attended apart, in its place."""
        shape = list(O.shape)
        shape[self.out] = self.length
        out, place = O.new_zeros(shape), self.place
        out.narrow(self.out, 0, place.text).copy_(O.narrow(self.out, 0, place.text))
        rest = self.length - place.behind
        out.narrow(self.out, place.behind, rest).copy_(O.narrow(self.out, place.text, rest))
        for each, found in zip(place.segments, texts, strict=True):
            out.narrow(self.out, each.at.start, each.at.stop - each.at.start)[place.rows] = found
        return out

    def picture(self, x: Tensor) -> Tensor:
        """And what else there is behind the texts."""
        return self.cut(x, self.place.behind, self.length)

    def cut(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x.narrow(self.along, start, stop - start)

    def join(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, self.along)


def admit_beside(spec: EditSpec, name: str, model: str) -> None:
    """Raise if an edit needs what stands beside a text's encoding, and cannot have it."""
    whole = spec.method == "projection" and spec.options.tokens == "all"
    whole = whole or (spec.method == "erasure" and spec.options.baseline == "neutral")
    if not whole:
        raise spec.error(
            f"{model} reads more of each prompt than its encoding, which this edit cannot change; edit it with CRE on "
            'all tokens, or with EIUP and evidence "alike"'
        )
    concept = spec.source
    encodings = [each.tokens for each in (*concept.phrases, *concept.keep)]
    encodings += [tokens for tokens in (concept.baseline, concept.instead) if tokens is not None]
    told = [said for tokens in encodings for said in concept.beside.get(digest((tokens[0],)), ({},))]
    if not all(name in said for said in told):
        raise spec.error(
            f'concept "{concept.name}" lacks what {model} reads of a prompt beside its encoding; make it with the CLIP '
            "that belongs to this model"
        )


def through(before: Any, plain: Any, *args: Any, **more: Any) -> Tensor:
    """The attention as it would be without an edit; before: the override that stood there."""
    return plain(*args, **more) if before is None else before(plain, *args, **more)


def shaped(
    place: Place, q: Tensor, k: Tensor, v: Tensor, heads: int, more: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k, v as [B, L, H, d], scaled for 1 / sqrt d, if this is an attention over text and picture; None for one over
    the text or the picture alone."""
    along = 2 if more.get("skip_reshape") else 1
    if q.shape[along] != k.shape[along] or q.shape[along] < place.text + place.image:
        return None
    if along == 2:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    else:
        width = q.shape[-1] // heads
        q, k, v = (x.reshape(*x.shape[:2], -1, width) for x in (q, k, v))
    if k.shape[2] != q.shape[2]:  # enable_gqa
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    if more.get("scale") is not None:
        q = q * (more["scale"] * q.shape[-1] ** 0.5)
    return q, k, v


def numbers(rows: Rows, made: ModelCall) -> Tensor:
    """Of the edited rows of a model call: [R]."""
    index = rows.index
    return torch.arange(index.start, index.stop, device=made.x.device) if isinstance(index, slice) else index


def sections(kind: Family, place: Place, length: int) -> tuple[slice, slice]:
    """Where the text and the picture stand among an attention's tokens."""
    if kind.text_first:
        return slice(0, place.text), slice(place.text, place.text + place.image)
    return slice(length - place.text, length), slice(0, place.image)


def mask_of(args: tuple[Any, ...], more: dict[str, Any], rows: slice | Tensor, image: slice) -> Tensor | None:
    """The mask of some rows' picture, as the host's attentions read it: [1 or R, 1 or H, 1 or N, L]."""
    mask = args[0] if args else more.get("mask")
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim != 3 else mask[:, None]
    mask = mask[rows] if len(mask) > 1 else mask
    return mask[:, :, image] if mask.shape[2] > 1 else mask


def bias_of(mask: Tensor | None, text: slice) -> Tensor | None:
    """What the mask, [R, H, N, L], adds to the logits of the text's tokens: fp32 [R, H, N, T]."""
    if mask is None:
        return None
    of_text = mask[..., text]
    return torch.where(of_text, 0.0, -torch.inf) if of_text.dtype == torch.bool else of_text.float()


def seen_in(made: ModelCall) -> Tensor:
    """`seen_of` the text that a model is called with, [B, T, W]: its mask is of the text's tokens, [B, T], or of all
    that its attentions read, [B, L, L]."""
    mask, T = made.more.get("attention_mask"), made.context.shape[1]
    if mask is None or mask.ndim not in (2, 3):
        return made.context
    if mask.ndim == 2 and not mask.is_floating_point():
        mask = mask > 0
    of_text = mask[:, None, None] if mask.ndim == 2 else mask[:, None, T:]
    return seen_of(made.context, bias_of(of_text, slice(0, T)))


def seen_of(said: Tensor, bias: Tensor | None) -> Tensor:
    """A text [R, T, W] in which a token that the picture does not see says what the first does that it sees. bias:
    [R or 1, H, N, T or more], fp32."""
    if bias is None:
        return said
    seen = (bias > HIDDEN).flatten(1, 2).any(1)[:, : said.shape[1]]
    first = seen.int().argmax(1).expand(len(said))
    return torch.where(seen[..., None], said, said[torch.arange(len(said), device=said.device), first][:, None])


def split(q: Tensor, k: Tensor, v: Tensor, text: slice, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A_t [R, N, H, d] and log Z_text - log Z_picture [R, N, H, 1], in fp32. q: [R, N, H, d]; k, v: [R, L, H, d]."""
    step = max(1, PIECE.get(q.device.type, PIECE["other"]) // (q[:, 0, :, 0].numel() * k.shape[1]))
    V, A, u = v[:, text].transpose(1, 2).float(), [], []
    for first in range(0, q.shape[1], step):
        weights = logits(q[:, first : first + step], k)  # [R, H, n, L]
        if mask is not None:
            part = mask[:, :, first : first + step] if mask.shape[2] > 1 else mask
            weights = weights.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else weights + part
        of_text = weights[..., text]
        A.append(of_text.softmax(-1).nan_to_num() @ V)  # nothing is found where the mask hides all
        of_picture = torch.cat([weights[..., : text.start], weights[..., text.stop :]], -1)
        u.append((of_text.logsumexp(-1) - of_picture.logsumexp(-1))[..., None])
    return torch.cat(A, 2).transpose(1, 2), torch.cat(u, 2).transpose(1, 2)


def halves(q: Tensor, k: Tensor, v: Tensor, text: slice) -> tuple[Tensor, Tensor, Tensor] | None:
    """A_t, A_i [R, N, H, d] and log Z_text - log Z_picture [R, N, H, 1] where a kernel tells them.

    q: [R, N, H, d]; k, v: [R, L, H, d].
    """
    at_start, rest = text.start == 0, k.shape[1] - text.stop + text.start
    others = slice(text.stop, None) if at_start else slice(0, rest)
    of_text, of_picture = (found_and_weight(q, k[:, part], v[:, part]) for part in (text, others))
    if of_text is None or of_picture is None:
        return None
    (A_t, Z_t), (A_i, Z_i) = of_text, of_picture
    return A_t, A_i.float(), (Z_t - Z_i)[..., None]


def besides(
    asked: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: slice | Tensor,
    image: slice,
    heads: int,
    args: tuple[Any, ...],
    more: dict[str, Any],
) -> Tensor:
    """An attention's output without what the picture of some rows finds, which is left empty.

    q, k, v: as the host has them, [B, L, H d] or [B, H, L, d]; rows: [R], or a slice.
    """
    along, out = (2 if more.get(name) else 1 for name in ("skip_reshape", "skip_output_reshape"))
    before, after = (0, image.start), (image.stop, q.shape[along])
    index = torch.arange(len(q), device=q.device)[rows]
    edited = torch.zeros(len(q), device=q.device).index_fill(0, index, 1)
    others = edited.argsort(stable=True)[: len(q) - len(index)]  # by number: a mask would be waited for
    O = None
    if len(index) < len(q):
        left = [x[others] for x in (q, k, v)]
        found = asked(*left, heads, *args, **more)
        O = found.new_empty(len(q), *found.shape[1:])
        O[others] = found
    for start, stop in (before, after):
        if stop > start:
            found = asked(q[rows].narrow(along, start, stop - start), k[rows], v[rows], heads, *args, **more)
            if O is None:
                shape = list(found.shape)
                shape[0], shape[out] = len(q), q.shape[along]
                O = found.new_empty(shape)
            view = O.narrow(out, start, stop - start)
            view[rows] = found
    assert O is not None, "a text has tokens"
    return O


def picture_of(O: Tensor, rows: slice | Tensor, image: slice, by_head: bool, heads: int) -> Tensor:
    """O_I of some rows, fp32 [R, N, H, d]. O: [B, L, H d], or [B, H, L, d]."""
    O = O[rows].float()
    return O[:, :, image].transpose(1, 2) if by_head else O[:, image].unflatten(-1, (heads, -1))


def placed(O: Tensor, O_i: Tensor, rows: slice | Tensor, image: slice, by_head: bool) -> Tensor:
    """O with another O_I [R, N, H, d] in some rows."""
    out = O.clone()
    view = out[:, :, image] if by_head else out[:, image]
    view[rows] = (O_i.transpose(1, 2) if by_head else O_i.flatten(-2)).to(O.dtype)
    return out
