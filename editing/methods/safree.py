"""SAFREE: the words of a prompt that lead to a concept are projected out of its span (ICLR 2025; without its LRA).

A text's pooled vector is its row behind the last word. With P_C onto the span of the concept's phrasings' pooled
vectors and e_i that of the prompt whose token i is masked (by the token of id 0), P_I onto the span of e_1 .. e_n:

    d_i = ||(I - P_C) e_i||,      token i leads to the concept if d_i >= (1 + alpha) mean of d_j, j other than i
    c'_i = (I - P_C) P_I c_i      for those tokens; all other rows stay

for without such a token the prompt lies farther from the concept. Self-validating filtering: the more beta, 1 less the
mean cosine of c_i and (I - P_C) P_I c_i over the prompt's own tokens, the longer it acts: for t' + 1 of 50 steps,
t' = round(10 sigmoid(2 k (10 beta - t0))), k = 2.5, t0 = 5.333.

It is about one prompt, whose text the node is given: only rows that read that prompt are edited. A prompt of several
pieces is filtered piece by piece (INF), and SDXL's encoding stands in for its pooled vectors (INF). A prompt of one
token has no others to be compared with, and stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..edits.digest import Shared, digest
from ..edits.encode import CONTEXT, encode, own_tokens, stored
from ..edits.method import Method, OnText, register
from ..edits.spec import Concept, EditSpec, Phrase
from ..presets.parts import ConceptEdit

ALPHA = 0.01
STEPS = 50  # that the self-validating filter reckons with
MOST, K, T0 = 10, 2.5, 5.333
SAME = 0.02  # of an encoding's size: what lies no farther apart is the same prompt, in half precision as well


@dataclass(frozen=True, eq=False, repr=False)
class Filtered(Shared):
    """A prompt's encoding c [T, W], what is added to it, d [T, W], the tokens that lead to the concept, and beta."""

    c: Tensor
    d: Tensor
    triggers: tuple[int, ...]
    beta: float

    def __repr__(self) -> str:
        return f"Filtered({self.key})"

    @cached_property
    def key(self) -> str:
        return digest((self.c, self.d))

    @property
    def share(self) -> float:
        """Of the steps, for which self-validating filtering lets it act."""
        t = round(MOST / (1 + math.exp(-2 * K * (10 * self.beta - T0))))
        return (t + 1) / STEPS


@dataclass(frozen=True)
class SAFREEOptions:
    """prompt: as it was filtered; alpha; svf: whether self-validating filtering shortens the window."""

    prompt: Filtered | None = None
    alpha: float = ALPHA
    svf: bool = True

    def __post_init__(self) -> None:
        if not self.alpha >= 0:  # catches NaN as well
            raise ValueError(f"alpha is {self.alpha}; give a number of at least 0 (the most words are filtered)")


def span(X: Tensor) -> Tensor:
    """The projector onto the rows of X [n, W]: [W, W]."""
    X = X.double()
    return X.T @ torch.linalg.pinv(X @ X.T, rtol=1e-10) @ X


def filtered(c: Tensor, E: Tensor, C: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """c' of the n own tokens, which of them lead to the concept, and their cosines with (I - P_C) P_I c_i.

    c: [n, W]; E: [n, W], the pooled vectors of the masked prompts; C: [k, W], of the concept's phrasings.
    """
    away = torch.eye(c.shape[1], dtype=torch.double) - span(C)
    d = (E.double() @ away).norm(dim=-1)
    n = len(d)
    others = (d.sum() - d) / max(n - 1, 1)
    leads = (d >= (1 + alpha) * others) & (n > 1)
    safe = c.double() @ span(E) @ away
    cos = torch.cosine_similarity(c.double(), safe, dim=-1)
    return torch.where(leads[:, None], safe, c.double()), leads, cos


def pooled(phrase: Phrase) -> Tensor:
    """The row behind the last word, [W]; of a text of several pieces, the last one's."""
    return phrase.tokens[0, min(phrase.own[-1] + 1, phrase.tokens.shape[1] - 1)]


def masked(clip: Any, text: str, own: Sequence[int], length: int) -> Tensor:
    """The pooled vectors of a prompt's piece with each of its own tokens masked in turn, [n, W], encoded in one batch.

    own: positions in the whole prompt, all of one piece of `length` tokens.
    """
    tokens, piece = clip.tokenize(text), own[0] // length
    batch: dict[str, list[Any]] = {encoder: [] for encoder in tokens}
    for encoder, pieces in tokens.items():
        for i in own:
            row = list(pieces[piece])
            row[i % length] = (0, *row[i % length][1:])
            batch[encoder].append(row)
    encoded = stored(clip.encode_from_tokens(batch))[0].unflatten(0, (len(own), -1))
    return encoded[:, min(own[-1] % length + 1, length - 1)]


def of_prompt(clip: Any, text: str, concept: Concept, alpha: float = ALPHA) -> Filtered:
    """Raises ValueError for a prompt without a word, or a text encoder that is not the concept's."""
    c, own = encode(clip, text)[0], own_tokens(clip, text)
    if not own:
        raise ValueError("text is empty; connect the prompt that is sampled")
    if c.shape[-1] != concept.width:
        raise ValueError("clip is another text encoder than the concept's; connect the one that made it")
    C = torch.stack([pooled(phrase) for phrase in concept.phrases])
    d, triggers, cosines = torch.zeros_like(c), [], []
    for piece in sorted({i // CONTEXT for i in own}):
        here = [i for i in own if i // CONTEXT == piece]
        changed, leads, cos = filtered(c[here], masked(clip, text, here, CONTEXT), C, alpha)
        d[here] = (changed - c[here].double()).float()
        triggers += [i for i, on in zip(here, leads.tolist(), strict=True) if on]
        cosines += cos.tolist()
    return Filtered(c, d, tuple(triggers), 1 - sum(cosines) / len(cosines))


class SAFREEEdit(ConceptEdit):
    method: Literal["SAFREE"]
    alpha: Annotated[float, Field(ge=0, le=10)] = ALPHA
    svf: bool = True


class SAFREE(Method):
    name, label, order = "filter", "SAFREE", 5
    source, options, document = Concept, SAFREEOptions, SAFREEEdit
    stage = "text"

    def complaint(self, spec: EditSpec) -> str | None:
        return None if spec.options.prompt is not None else "it has no prompt to filter; connect `clip` and `text`"

    def idle(self, spec: EditSpec) -> bool:
        return not spec.options.prompt.triggers

    def admit(self, spec: EditSpec, backbone: Any) -> None:
        if not backbone.values_apart:
            raise spec.error(
                f"the pooled vectors of its words are CLIP's, and {backbone.name} reads another encoder's; use Erase "
                "Concept (CRE) there"
            )

    def window(self, spec: EditSpec) -> tuple[float, float]:
        end = min(spec.end_percent, spec.options.prompt.share) if spec.options.svf else spec.end_percent
        return spec.start_percent, max(spec.start_percent, end)

    def on_text(self, spec: EditSpec, device: torch.device) -> OnText:
        return Once(spec, device)

    def to_document(self, spec: EditSpec, saver: Any, common: dict[str, Any]) -> SAFREEEdit:
        numbers = dict(alpha=float(spec.options.alpha), svf=spec.options.svf)
        concept = saver.concept(spec.source)
        return SAFREEEdit(method="SAFREE", concept=concept, blocks=spec.blocks, **common, **numbers)

    def from_document(self, edit: SAFREEEdit, maker: Any) -> dict[str, Any]:
        if maker.given.text is None:
            raise ValueError("it needs the prompt; give it to a Preset Gate node (`text`), and connect that to `gate`")
        concept = maker.concept(edit.concept)
        prompt = of_prompt(maker.given.clip, maker.given.text, concept, edit.alpha)
        return dict(source=concept, options=SAFREEOptions(prompt, edit.alpha, edit.svf))

    def described(self, edit: SAFREEEdit) -> str:
        brief = ", for a first part of the steps" if edit.svf else ""
        words = f"Filters the words that lead to {edit.concept.said()} out of the prompt"
        return f"{words} (SAFREE, strength {edit.strength:g}){brief}"


class Once:
    """c + s d in the rows that read the prompt; the first time it is called, it sees that there are any."""

    def __init__(self, spec: EditSpec, device: torch.device) -> None:
        self.spec, self.seen = spec, False
        self.c, self.d = (x.to(device) for x in (spec.options.prompt.c, spec.options.prompt.d))

    def __call__(self, x: Tensor, s: Tensor) -> Tensor:
        """x: [R, L, W]; s: [R]."""
        T = len(self.c)
        again, rest = divmod(x.shape[1], T)  # the host repeats a prompt that is batched with a longer one
        alike = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if again and not rest:
            c, d = self.c.repeat(again, 1), self.d.repeat(again, 1)
            alike = (x.float() - c).norm(dim=(1, 2)) <= SAME * c.norm()
        if not self.seen:
            self.seen = True
            if not alike.any():
                raise self.spec.error(
                    "the prompt that is sampled is not the one in `text`; connect the same text to both, and the CLIP "
                    "that encodes it"
                )
        return (x.float() + (s * alike)[:, None, None] * d).to(x.dtype) if again and not rest else x


METHOD = register(SAFREE())
