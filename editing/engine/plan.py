"""The edits that are active together as tensors: what they do to each cross-attention, and to which rows of a batch.

Made at the first model call that needs it, when the weights are loaded and patched, and kept for the calls that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..edits.blocks import BlockKey, select_blocks
from ..edits.method import OnText, OnValues
from ..edits.spec import EditSpec
from ..methods.attention import attend, attend_and_weigh, logits, split_heads
from ..methods.eiup import reweighted, share
from ..methods.found import Found, Kept, Weight
from ..methods.kpop import append
from ..methods.reread import Ordinary, Reading, reading
from ..methods.said import MARGIN, UNKNOWN, Said, said_test
from ..methods.tokens import Solved, TokenSet, TokenSets, gather
from .backbone import Backbone
from .binding import KV
from .rows import Layout, Rows, Served, put
from .streams import Streams, prompts_of

Observer = Callable[..., None]
Note = Callable[[Sequence[int], Tensor], None]  # told the owners of phrases, and where each was found, [K, R, N, ..]

# Numbers that the outputs found for all of a block's prompts may hold at once. A CPU is several times faster on what
# fits its caches; elsewhere this only bounds the memory of large pictures with many concepts.
PIECE = {"cpu": 2**21, "other": 2**26}


class Steering:
    """Concepts that are solved together in one attention, their prompts by length; the baseline, if any, is the very
    first. keep: the prompts of their neighbours; kept_for: whose each is, [K, M].

    place: for each phrase the number of what is drawn instead, -1 for none; tests: of the prompt's own tokens, by edit;
    readings: of prompts that say it, by edit, where a test tells which.
    """

    def __init__(
        self,
        group: Solved,
        bind: Callable[[TokenSet], KV],
        tests: Mapping[int, Said] = MappingProxyType({}),
        readings: Mapping[int, Reading] = MappingProxyType({}),
    ) -> None:
        self.group, self.tests = group, {i: test for i, test in tests.items() if i in group.tested}
        self.readings = {i: made for i, made in readings.items() if i in self.tests}
        sets = (group.phrases, group.keep, group.instead)
        self.prompts, self.keep, self.instead = ([bind(part) for part in parts] for parts in sets)
        self.owner = torch.cat([kv.owner for kv in self.prompts])
        self.scale = torch.cat([kv.scale for kv in self.prompts])
        owners = [owner for part in group.phrases for owner in part.owner]
        self.owners = owners[1:] if group.compared else owners  # of the phrases alone
        if self.keep:
            concepts = self.owner[1:] if group.compared else self.owner
            self.kept_for = concepts[:, None] == torch.cat([kv.owner for kv in self.keep])
        if self.instead:
            replaced = [owner for part in group.instead for owner in part.owner]
            self.place = [replaced.index(i) if i in replaced else -1 for i in self.owners]
        self.phrases_of = {i: [k for k, owner in enumerate(self.owners) if owner == i] for i in self.readings}

    def found(self, A: Tensor, q: Tensor, said: Tensor | None = None, text: Text | None = None) -> Found:
        """What the queries find. A, q: [R, N, H, d]; said: of the rows, [K, R, 1]."""
        (At, Z), (drawn, Zr) = found_in(self.prompts, q), found_in(self.instead, q)
        A0, Ar = None, None
        if self.group.compared:
            A0, At = At[0], At[1:]
        if self.instead:
            Ar = self.replaced((At.new_zeros(1) if A0 is None else A0).expand_as(At), drawn, text)
        kept = Kept(found_in(self.keep, q)[0], self.kept_for) if self.keep else None
        return Found(A, At, A0, Ar, kept, said, self.weight(Z, Zr, text))

    def weight(self, Z: Tensor, drawn: Tensor, text: Text | None) -> Weight | None:
        """Beside a picture. Z: the logs of the prompts' weights; drawn: of what is drawn instead; [M, R, N, H, 1]."""
        if not len(Z):
            return None
        remains, Z = (Z[:1].expand_as(Z[1:]), Z[1:]) if self.group.compared else (Z, Z)
        return Weight((self.replaced(remains, drawn, text) if self.instead else remains) - Z)

    def replaced(self, otherwise: Tensor, drawn: Tensor, text: Text | None) -> Tensor:
        """What remains of each phrase, [K, R, ...]: what is drawn instead, or `otherwise` where a text only leads to
        the concept."""
        of = {} if text is None else {i: leads[..., None, None] for i, leads in text.leads.items()}
        there = (owner if i >= 0 else None for owner, i in zip(self.owners, self.place, strict=True))
        out = [rest if i < 0 else drawn[i] for i, rest in zip(self.place, otherwise, strict=True)]
        pairs = zip(there, out, otherwise, strict=True)
        return torch.stack([whole.lerp(rest, of[i].to(whole)) if i in of else whole for i, whole, rest in pairs])

    def said(self, text: Text) -> Tensor | None:
        """How surely a prompt's tokens say each phrase's concept: [K, R, 1]; None: nobody asks."""
        if not self.tests:
            return None
        of = {i: text.says(i, test) for i, test in self.tests.items()}
        unknown = torch.full((len(text.tokens), 1), UNKNOWN, device=text.tokens.device)
        return torch.stack([of.get(i, unknown) for i in self.owners])

    def reread(self, said: Tensor) -> Tensor:
        """How surely a prompt says each phrase's concept, in any phrasing, if it can be read anew; [K, R, 1]."""
        of = {i: said[places].amax(0) for i, places in self.phrases_of.items()}
        nothing = torch.zeros_like(said[0])
        return torch.stack([of.get(i, nothing) for i in self.owners])

    def anew(self, prompt: Prompt, share: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values, [R, L, H, d], read anew where it says a concept: of several at once each as far
        as how surely it is said, times its strength, is of the greatest. share: as `reread` has it; s: [K, R, 1]."""
        asked = share * s.abs()
        of = {i: asked[places].amax(0) for i, places in self.phrases_of.items()}
        most = torch.stack([*of.values()]).amax(0).clamp_min(torch.finfo(s.dtype).tiny)  # [R, 1]
        keys, values = prompt.k.float().flatten(2), prompt.v.float().flatten(2)
        for i, of_concept in self.readings.items():
            k, v = of_concept(prompt.v.flatten(2))
            strength = (of[i] / most)[..., None]
            keys, values = keys + strength * k, values + strength * v
        return keys.to(prompt.k.dtype).view_as(prompt.k), values.to(prompt.v.dtype).view_as(prompt.v)

    def projection(
        self, A: Tensor, q: Tensor, prompt: Prompt, s: Tensor, observe: Observer | None, note: Note | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What they take away, fp32 [R, N, H, d], and where texts are weighed what the prompt's log Z gains by it,
        [R, N, H, 1]. A, q: [R, N, H, d]; s: [edits, R]."""
        s = (s[self.owner] * self.scale[:, None])[:, :, None]
        sets = len(s) + sum(len(kv.owner) for kv in (*self.keep, *self.instead))
        step = max(1, PIECE.get(A.device.type, PIECE["other"]) // (sets * A[:, 0].numel()))
        s = s[1:] if self.group.compared else s
        where: list[Tensor] = []  # at the positions of each piece
        said = self.said(prompt.text)
        share = self.reread(said) if self.readings and said is not None else None
        anew = None if share is None else self.anew(prompt, share, s)
        pieces, gained, peak = [], [], None
        parts = list(zip(*(x.split(step, 1) for x in (A, prompt.A, q)), strict=True))
        for a, of_prompt, queries in parts:
            found = self.found(a, queries, said, prompt.text)
            if anew is not None:
                lost = of_prompt - attend(queries, *(x[None] for x in anew))[0]
                found = replace(found, lost=lost, reread=share)
            if found.weight is not None and said is not None:
                if peak is None:
                    n = len(parts)  # of every n-th position: as many as a piece has
                    every = found if n == 1 else self.found(A[:, ::n], q[:, ::n], said, prompt.text)
                    peak = self.group.method.peak(every, self.group.options)
                found = replace(found, peak=peak)
            pieces.append(self._project(found, s, observe, where.append))
            if found.weight is not None and found.weight.gained is not None:
                gained.append(found.weight.gained)
        if note is not None and where:
            note(self.owners, where[0] if len(where) == 1 else torch.cat(where, 2))
        return along_positions(pieces), along_positions(gained) if gained else None

    def _project(self, found: Found, s: Tensor, observe: Observer | None, note: Callable[[Tensor], None]) -> Tensor:
        """The same for some positions; s: [K, R, 1]."""
        if observe is not None:
            observe(A=found.A, At=found.At, A0=found.A0, s=s, options=self.group.options)
        return self.group.method.taken(found, s, self.group.options, note)


class Text(NamedTuple):
    """What may say a concept: tokens, [R, L, C or W], as they are read. Where all attentions read the same text, by
    edit, [R, 1]: how surely what is not read anew of it still says the concept; how surely it only leads to it, with no
    word that what is drawn instead could stand in for; and, asked once for all of them, how surely it says it."""

    tokens: Tensor
    unread: Mapping[int, Tensor] = MappingProxyType({})
    leads: Mapping[int, Tensor] = MappingProxyType({})
    said: Mapping[int, Tensor] = MappingProxyType({})

    def of(self, index: slice | Tensor) -> Text:
        """Of these rows."""
        rows = ({i: x[index] for i, x in each.items()} for each in self[1:])
        return Text(self.tokens[index], *rows)

    def says(self, i: int, test: Said) -> Tensor:
        """How surely it says the concept of the edit i, in any phrasing, [R, 1]. test: the concept's."""
        if i in self.said:
            return self.said[i]
        said = test(self.tokens).amax(0)
        return said.maximum(self.unread[i]) if i in self.unread else said


class Prompt(NamedTuple):
    """In one attention: keys and values, [R, L, H, d]; text: of its tokens; A: what the queries find, [R, N, H, d]."""

    k: Tensor
    v: Tensor
    text: Text
    A: Tensor


def tests_of(
    groups: Iterable[Solved], values: Callable[[Tensor], Tensor | None], margin: float | None = None
) -> dict[int, Said]:
    """Of the edits whose concepts bring examples; values, margin: as `said_test` has them."""
    found = {i: said_test(concept, values, margin) for group in groups for i, concept in group.tested.items()}
    return {i: test for i, test in found.items() if test is not None}


def readings_of(
    groups: Iterable[Solved],
    keys: Callable[[Tensor], Tensor],
    values: Callable[[Tensor], Tensor | None],
    styles: bool,
) -> dict[int, Reading]:
    """Of the edits whose concepts say what their prompts become; of styles or of things alone. keys, values: as
    `reading` has them."""
    plain: dict[str, Ordinary] = {}
    tested = [(i, concept) for group in groups for i, concept in group.tested.items()]
    found = {i: reading(concept, keys, values, plain) for i, concept in tested if styles or concept.kind == "thing"}
    return {i: made for i, made in found.items() if made is not None}


def found_in(prompts: Sequence[KV], q: Tensor) -> tuple[Tensor, Tensor]:
    """What the queries [R, N, H, d] find in each prompt, [M, R, N, H, d]; and the log of its weight beside a picture,
    [M, R, N, H, 1], if its keys are those of a model call (streams.py)."""
    found, weights = [], []
    for kv in prompts:
        if kv.K.ndim == 5:
            A, Z = attend_and_weigh(q, kv.K, kv.V)
            weights.append(Z)
        else:
            A = attend(q, kv.K, kv.V)
        found.append(A)
    return stacked(found), stacked(weights)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Phrases one behind the other: of [K, ...] each, one [sum of K, ...]."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts)) if parts else torch.empty(0)


def along_positions(pieces: Sequence[Tensor]) -> Tensor:
    """Of [R, L, ...] each, one [R, sum of L, ...]."""
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces), 1)


class BlockEdits:
    """What happens to one attention's output. tests: of the prompt's tokens, where they are the same in all."""

    def __init__(
        self,
        sets: TokenSets,
        backbone: Backbone,
        key: BlockKey,
        device: torch.device,
        dtype: torch.dtype,
        streams: Streams | None = None,
        tests: Mapping[int, Said] | None = None,
    ) -> None:
        def bind(tokens: TokenSet) -> KV:
            if streams is not None:
                return streams.keys_values(key, tokens)
            return backbone.keys_values(key, tokens, dtype)

        def values(rows: Tensor) -> Tensor | None:
            return backbone.values(key, rows.to(device), dtype)

        def keys(rows: Tensor) -> Tensor:
            return backbone.blocks[key].to_k(rows.to(device, dtype)[None])[0]

        self.heads = backbone.blocks[key].heads
        self.joined, self.separate = ([bind(each) for each in some] for some in (sets.joined, sets.separate))
        if tests is None:
            # What eq. 4 takes of a style says enough; of one that is read anew as well it takes too much.
            self.steering = [
                Steering(group, bind, tests_of([group], values), readings_of([group], keys, values, styles=False))
                for group in sets.solved
            ]
        else:
            self.steering = [Steering(group, bind, tests) for group in sets.solved]
        then = sets.then
        self.then = None if then is None else BlockEdits(then, backbone, key, device, dtype, streams, tests)

    def apply(
        self,
        A: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        s: Tensor,
        foreign: bool,
        observe: Observer | None,
        note: Note | None = None,
        text: Text | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The edited A, fp32 or A's dtype [R, N, C], and what the prompt's log Z gains where texts are weighed, [R, N,
        H, 1]. A, q: [R, N, C]; k, v: [R, L, C]; s: [edits, R]; text: whose tokens say a concept, if v do not; bias:
        what a mask adds to the prompt's logits, [R or 1, H or 1, N or 1, L].

        `foreign` says that another pack's patch made A: then it is not the attention to k and v alone.
        """
        given = q, k, v, s
        said = Text(v) if text is None else text
        A, q, k, v = (split_heads(x, self.heads) for x in (A, q, k, v))
        base = A
        if foreign and (self.joined or any(steering.readings for steering in self.steering)):
            base = (logits(q, k, bias).softmax(-1).nan_to_num() @ v.transpose(1, 2).float()).transpose(1, 2)
        prompt = Prompt(k, v, said, base)
        if self.joined:
            A = A + append(base, q, k, [(*kv.single, s[kv.owner][0]) for kv in self.joined], bias)
        for kv in self.separate:
            A = A + reweighted(q, kv.K, kv.V, s[kv.owner], share(q, k, kv.own, bias) if kv.own else None)
        # All from the same A:
        taken = [steering.projection(A, q, prompt, s, observe, note) for steering in self.steering]
        for part, _ in taken:
            A = A.float() - part
        gained = [gain for _, gain in taken if gain is not None]
        A = A.flatten(-2)
        if self.then is not None:
            A, more = self.then.apply(A, *given, foreign=True, observe=observe, note=note, text=text, bias=bias)
            gained += [] if more is None else [more]
        return A, torch.stack(gained).sum(0) if gained else None


def projected(to_v: Callable[[Tensor], Tensor], dtype: torch.dtype, x: Tensor) -> Tensor:
    """Texts [.., W] as an attention's values."""
    return to_v(x.to(dtype))


class Plan:
    """The edits of one or more model calls. sets: of every attention whose output they change; blocks: the same bound
    to it, but not where that needs the model call's own streams."""

    def __init__(self, specs: Sequence[EditSpec], backbone: Backbone, device: torch.device, dtype: torch.dtype) -> None:
        self.specs = specs
        self.backbone, self.device, self.dtype = backbone, device, dtype
        self.chosen = [select_blocks(spec.blocks, backbone.blocks) for spec in specs]
        on_text = {i: spec.how.on_text(spec, device) for i, spec in enumerate(specs)}
        self.texts: dict[int, OnText | None] = {i: c for i, c in on_text.items() if c is not None}
        pooled = {i: spec.how.on_pooled(spec, device) for i, spec in enumerate(specs)} if backbone.pooled else {}
        everywhere = set(backbone.blocks)
        self.pooled = {i: c for i, c in pooled.items() if c is not None and set(self.chosen[i]) == everywhere}
        self.sets: dict[BlockKey, TokenSets] = {}
        self.values: dict[BlockKey, list[OnValues]] = {}
        self._find_values(backbone, device, dtype)
        self.blocks: dict[BlockKey, BlockEdits] = {}
        self._rows: dict[tuple[object, ...], Rows | None] = {}
        gathered: dict[tuple[int, ...], TokenSets] = {}  # most blocks get the same edits
        for key in backbone.blocks:
            here = tuple(i for i in range(len(specs)) if key in self.chosen[i] and i not in self.texts)
            if here:
                if here not in gathered:
                    gathered[here] = gather(specs, here, device)
                self.sets[key] = gathered[here]
                if not backbone.streamed:
                    self.blocks[key] = BlockEdits(gathered[here], backbone, key, device, dtype)
        self.prompts = list(prompts_of(gathered.values())) if backbone.streamed else []
        stages = [stage for sets in gathered.values() for stage in sets.stages] if backbone.streamed else []
        solved = [group for stage in stages for group in stage.solved]

        def as_it_is(rows: Tensor) -> Tensor:
            return rows.to(device)

        # Of a text that no block has changed yet:
        self.tests = tests_of(solved, as_it_is, MARGIN)
        readings = readings_of(solved, as_it_is, as_it_is, styles=True) if self.tests else {}
        self.readings = {
            i: made for i, made in readings.items() if i in self.tests and set(self.chosen[i]) == everywhere
        }

    def edits(self, key: BlockKey, streams: Streams | None) -> BlockEdits | None:
        """What happens to one attention's output in a model call with these streams."""
        if streams is None or key not in self.sets:
            return self.blocks.get(key)
        return BlockEdits(self.sets[key], self.backbone, key, self.device, self.dtype, streams, self.tests)

    def _find_values(self, backbone: Backbone, device: torch.device, dtype: torch.dtype) -> None:
        """The edits of the text that values are made of, attention by attention."""
        valued = [i for i, spec in enumerate(self.specs) if spec.how.stage == "values"]
        self.texts |= dict.fromkeys(valued)
        told: dict[int, int] = dict.fromkeys(valued, 0)
        for turn in dict.fromkeys((self.specs[i].last, self.specs[i].how) for i in valued):
            method = turn[1]
            for key in backbone.blocks:
                among = [(i, self.specs[i]) for i in valued if key in self.chosen[i]]
                here = [(i, spec) for i, spec in among if (spec.last, spec.how) == turn]
                if not here:
                    continue
                change, untold = method.on_values(here, partial(projected, backbone.blocks[key].to_v, dtype), device)
                self.values.setdefault(key, []).extend([change] if change else [])
                for i, _ in here:
                    told[i] += i not in untold
        for i, blocks in told.items():
            self.specs[i].how.heard(self.specs[i], blocks, len(self.chosen[i]))

    def rows(self, served: Served, batch: int, couple: tuple[int, ...] = ()) -> Rows | None:
        """The rows to edit of a batch of a model call, or of an attention in it; None if there are none.

        couple: what an attention couple says of it.
        """
        key = served, batch, couple
        if key not in self._rows:
            try:
                self._rows[key] = self._find_rows(served, served.layout(batch, couple))
            except ValueError as error:
                raise self.specs[0].error(str(error)) from None
        return self._rows[key]

    def _find_rows(self, served: Served, layout: Layout) -> Rows | None:
        strengths = []
        for spec in self.specs:
            gate, here = spec.strengths(served.images, served.window), served.reached(spec)
            strengths.append([gate[image] * here[part] for part, image in zip(layout.part, layout.image, strict=True)])
        index = [row for row, of_edits in enumerate(zip(*strengths, strict=True)) if any(of_edits)]
        if not index:
            return None
        s = torch.tensor([[of_rows[row] for row in index] for of_rows in strengths], device=self.device)
        image = torch.tensor([served.shown[layout.image[row]] for row in index], device=self.device)
        on = tuple(sum(map(bool, of_rows)) for of_rows in strengths)
        parts = frozenset(layout.part[row] for row in index)
        if index == list(range(index[0], index[-1] + 1)):
            return Rows(slice(index[0], index[-1] + 1), s, image, on, parts)
        return Rows(torch.tensor(index, device=self.device), s, image, on, parts)

    def changed(self, context: Tensor, key: BlockKey, rows: Rows) -> Tensor:
        """`context` [B, L, W] as the edits of the text that reach this attention make it, in the edited rows."""
        here = [(i, change) for i, change in self.texts.items() if change and key in self.chosen[i]]
        if not here:
            return context
        c = context[rows.index]
        for i, change in here:
            c = change(c, rows.s[i])
        return put(context, rows.index, c)

    def reread(self, context: Tensor, seen: Tensor, rows: Rows) -> Text:
        """`context` [B, L, W], before the first block, read anew where it says a concept, in the edited rows. seen: the
        same without what a mask hides."""
        c = context[rows.index]
        more = torch.zeros_like(c, dtype=torch.float32)
        clearly = {i: self.tests[i].clearly(seen).amax(0) for i in self.readings}  # [B, 1]
        for i, of_concept in self.readings.items():
            share = clearly[i][rows.index] * rows.s[i][:, None].clamp(0, 1)  # [R, 1]
            more += share[..., None] * of_concept(c)[1]
        read = torch.stack([of[rows.index] * (rows.s[i] > 0)[:, None] for i, of in clearly.items()]).amax(0)
        left = put(torch.ones(len(context), 1, device=read.device), rows.index, 1 - read)
        unread = {i: left * self.tests[i](seen).amax(0) for i in self.readings}
        leads = {i: self.tests[i].leads(seen) for i in self.readings}
        return Text(put(context, rows.index, c.float() + more), unread, leads)

    def told(self, text: Text) -> Text:
        """The text of all attentions, and how surely it says each concept."""
        return text._replace(said={i: text.says(i, test) for i, test in self.tests.items()})

    def repooled(self, y: Tensor, rows: Rows) -> Tensor:
        """What a model is told beside the time, y [B, ..], as the edits of the pooled text in front of it make it."""
        p = y[rows.index, : self.backbone.pooled]
        for i, change in self.pooled.items():
            p = change(p, rows.s[i])
        return put(y, rows.index, torch.cat([p, y[rows.index, self.backbone.pooled :]], -1))

    def revalued(self, value: Tensor, key: BlockKey, rows: Rows) -> Tensor:
        """The text [B, L, W] that this attention makes values of, as the edits of values make it."""
        if not self.values.get(key):
            return value
        x = value[rows.index]
        for change in self.values[key]:
            x = change(x, rows.s)
        return put(value, rows.index, x)
