"""Diffusion transformers whose text and picture share one attention: a row of FAMILIES each.

For the picture's queries, and per head, such an attention is a mean of what they find in the text and in the picture,

    O_I = m A_t + (1 - m) A_i,      m = Z_text / (Z_text + Z_picture),  Z = sum_j exp(q k_j / sqrt d),

and the edits change A_t as they change the cross-attention's output of a UNet: O_I <- O_I + m (A_t' - A_t). The text's
own queries are left alone, and so are reference pictures (Kontext, Qwen-Image-Edit): a concept in them is not text.
A concept's keys and values are those of its stream (streams.py). All of it happens in the host's
`optimized_attention_override`, around whatever another pack has put there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...edits.blocks import BlockKey
from ...edits.digest import Shared, digest
from ...edits.spec import EditSpec
from ...methods.attention import logits
from ..backbone import Backbone, register_backbone
from ..plan import PIECE
from ..rows import put
from ..run import CALL, Call, Run
from ..streams import ModelCall, Streams

OVERRIDE = "optimized_attention_override"  # in transformer_options: one slot for all packs


def attribute(path: str) -> Callable[[Any], Any]:
    """The attribute of a network at a path like "params.num_heads", or "layers.0.dim"."""

    def found(network: Any) -> Any:
        for name in path.split("."):
            network = network[int(name)] if name.isdigit() else getattr(network, name)
        return network

    return found


def context_tokens(network: Any, made: ModelCall) -> int:
    return made.context.shape[1]


def padded_tokens(network: Any, made: ModelCall) -> int:
    """Z-Image fills its text up to a multiple."""
    n, multiple = made.context.shape[1], getattr(network, "pad_tokens_multiple", None) or 1
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Family:
    """One class of the host's. name: for people, and for presets; of: its name; blocks: the side of the keys and the
    attribute of its lists of blocks, in the order of their attentions.

    width: of the text that it is called with; text: how many tokens stand for it in an attention; text_first: before
    the picture's; least: what the host fills it up to, with zeros in front; indexed: whether the host says in
    transformer_options which block is at work, or they are counted.
    """

    name: str
    of: str
    blocks: tuple[tuple[str, str], ...]
    width: Callable[[Any], int]
    heads: Callable[[Any], int]
    text: Callable[[Any, ModelCall], int] = context_tokens
    text_first: bool = True
    least: Callable[[Any], int] = lambda network: 0
    indexed: bool = False


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
    ),
    Family("Chroma", "Chroma", FLUX, attribute("params.context_in_dim"), attribute("num_heads"), indexed=True),
    Family(
        "Qwen-Image",
        "QwenImageTransformer2DModel",
        (("double", "transformer_blocks"),),
        attribute("txt_in.in_features"),
        attribute("transformer_blocks.0.attn.heads"),
        indexed=True,
    ),
    Family(
        "Lumina 2 and Z-Image",
        "NextDiT",
        (("layer", "layers"),),
        attribute("cap_embedder.1.in_features"),
        attribute("n_heads"),
        padded_tokens,
    ),
    Family(
        "SD3",
        "OpenAISignatureMMDITWrapper",
        (("joint", "joint_blocks"),),
        attribute("context_embedder.in_features"),
        attribute("joint_blocks.0.x_block.attn.num_heads"),
    ),
)


@dataclass
class Place(Shared):
    """What one model call's attentions consist of. text, image: tokens; height, width: the picture's; count: joint
    attentions that have been called."""

    text: int
    height: int
    width: int
    count: int = 0

    @property
    def image(self) -> int:
        return self.height * self.width


@dataclass
class Attention(Shared):
    """Of one block. What a text becomes there, only a model call can tell: it has no to_k and to_v."""

    heads: int


@register_backbone
class Joint(Backbone):
    supports = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    sides = tuple(dict.fromkeys(side for family in FAMILIES for side, _ in family.blocks))
    streamed = True
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
        found.kind, found.network = kind, network
        return found

    def hooks(self, run: Run) -> JointHooks:
        return JointHooks(run, self)

    def values(self, key: BlockKey, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
        return None

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

    def place(self, made: ModelCall) -> Place:
        patch = self.network.patch_size
        height, width = (-(-side // patch) for side in made.x.shape[-2:])
        return Place(self.kind.text(self.network, made), height, width)

    def prepare(self, run: Run, call: Call, made: ModelCall, executor: Callable[..., Tensor]) -> ModelCall:
        """The text as edits of the text make it, and the concepts' streams."""
        if made.more.get("c_crossattn") is None:
            raise call.plan.specs[0].error(f"{self.name} is called without a text; connect a prompt")
        call.place = self.place(made)
        rows = call.plan.rows(call.served, len(made.x)) if call.plan.specs else None
        if rows is None:
            return made
        if call.plan.texts:
            made.more["c_crossattn"] = self.changed(run, call, made)
        if call.plan.prompts:
            index = rows.index
            if isinstance(index, slice):
                index = torch.arange(index.start, index.stop, device=made.x.device)
            call.streams = self.streams(call, made, index, executor)
        return made

    def changed(self, run: Run, call: Call, made: ModelCall) -> Tensor:
        """The text that the model reads instead; what fills it up in front stays."""
        context, front = made.context, 0
        if self.kind.least(self.network):
            front = int((context != 0).any(-1).any(0).int().argmax())
        text = context[:, front:]
        changed, _ = run.text(next(iter(self.blocks)), text, text, made.more["transformer_options"])
        call.read.update(dict.fromkeys(self.blocks))
        return torch.cat([context[:, :front], changed], 1) if front else changed

    def streams(self, call: Call, made: ModelCall, index: Tensor, executor: Callable[..., Tensor]) -> Streams:
        """What every block makes of the prompts that the plan needs, in copies of the rows."""
        streams = Streams()
        for names, tokens in call.plan.prompts:
            front = max(0, self.kind.least(self.network) - tokens.shape[1])
            context = F.pad(tokens, (0, 0, front, 0)).repeat_interleave(len(index), 0)
            beside = made.rows(index, len(names)).reading(context)
            recorder = Recorder(self, self.place(beside), call, names, streams, front)
            options = made.more["transformer_options"]
            part = call.served.layout(len(made.x)).part
            mine = [call.served.parts[part[i]] for i in index.tolist()[:: call.served.images]]
            own = {OVERRIDE: recorder.attention, CALL: None, "cond_or_uncond": mine * len(names), "uuids": names}
            beside.with_options({**options, **own}).through(executor)
        if not streams.found:
            raise call.plan.specs[0].error(
                f"{self.name} has attention of its own (of GGUF, Nunchaku or another loader), which no edit reaches; "
                f"load the model with the host's own loader. ConceptGuard edits {self.supports} there"
            )
        return streams

    def key(self, place: Place, extra: dict[str, Any]) -> BlockKey | None:
        """The block whose joint attention is called; None for one that is not known."""
        key: BlockKey
        if self.kind.indexed:
            key = (extra.get("block_type", ""), extra.get("block_index", 0), 0)
        else:
            key = tuple(self.blocks)[place.count % len(self.blocks)]
        place.count += 1
        return key if key in self.blocks else None


@dataclass
class Recorder:
    """Keeps the text's keys and values of one model call, of prompts `names`, each with all edited rows. front: tokens
    before the prompts' own, which are kept behind them."""

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
    """One override for all attentions."""

    run: Run
    backbone: Joint

    def install(self, options: dict[str, Any], call: Call) -> dict[str, Any]:
        call.previous = {OVERRIDE: options[OVERRIDE]} if options.get(OVERRIDE) else {}
        return {**options, OVERRIDE: self.attention}

    def attention(self, plain: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **more: Any) -> Tensor:
        extra = more["transformer_options"]
        call: Call = extra[CALL]
        O = through(call.previous.get(OVERRIDE), plain, q, k, v, heads, *args, **more)
        shapes = shaped(call.place, q, k, v, heads, more)
        if shapes is None:
            return O
        key = self.backbone.key(call.place, extra)
        if key is None or not call.reaches(key) or call.streams is None:
            return O
        rows = call.plan.rows(call.served, len(q))
        if rows is None:
            return O
        text, image = sections(self.backbone.kind, call.place, shapes[0].shape[1])
        q_i, k_i, v_i = (x[rows.index] for x in shapes)
        q_i, mask = q_i[:, image], mask_of(args, more, rows.index, image)
        A, m = split(q_i, k_i, v_i, text, mask)
        read = readable(mask, text)
        k_P, v_P = k_i[:, text][:, read], v_i[:, text][:, read]
        flat, queries, keys, values = (x.flatten(-2) for x in (A.to(q.dtype), q_i, k_P, v_P))
        shape = (len(q), 1, call.place.height, call.place.width)
        edited = self.run.edited(key, rows, flat, queries, keys, values, {**extra, "activations_shape": shape})
        change = m * (edited.float() - flat.float()).unflatten(-1, (heads, -1))
        return added(O, change, rows.index, image, more.get("skip_output_reshape", False))


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


def readable(mask: Tensor | None, text: slice) -> Tensor | slice:
    """Which tokens of the text the mask lets the picture see."""
    if mask is None:
        return slice(None)
    seen = mask[..., text]
    return (seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2).flatten(0, 2).any(0)


def split(q: Tensor, k: Tensor, v: Tensor, text: slice, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A_t [R, N, H, d] and m [R, N, H, 1], in fp32. q: [R, N, H, d]; k, v: [R, L, H, d]."""
    step = max(1, PIECE.get(q.device.type, PIECE["other"]) // (q[:, 0, :, 0].numel() * k.shape[1]))
    V, A, m = v[:, text].transpose(1, 2).float(), [], []
    for first in range(0, q.shape[1], step):
        weights = logits(q[:, first : first + step], k)  # [R, H, n, L]
        if mask is not None:
            part = mask[:, :, first : first + step] if mask.shape[2] > 1 else mask
            weights = weights.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else weights + part
        of_text = weights[..., text]
        A.append(of_text.softmax(-1).nan_to_num() @ V)  # nothing is found where the mask hides all
        m.append((of_text.logsumexp(-1) - weights.logsumexp(-1)).exp()[..., None])
    return torch.cat(A, 2).transpose(1, 2), torch.cat(m, 2).transpose(1, 2)


def added(O: Tensor, change: Tensor, rows: slice | Tensor, image: slice, by_head: bool) -> Tensor:
    """O with what changes in the picture of some rows. O: [B, L, H d], or [B, H, L, d]; change: [R, N, H, d]."""
    out = O[rows].clone()
    view = out[:, :, image] if by_head else out[:, image]
    view.copy_(view.float() + (change.transpose(1, 2) if by_head else change.flatten(-2)))
    return put(O, rows, out)
