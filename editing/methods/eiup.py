"""EIUP's erasure prompt: its tokens enter the attention and the features that attend to them are re-weighted.

arXiv 2408.01014 and its successor GIE (ICLR 2025), whose code reads

    out = A V + sum_j w_j A_e[:, j] v_j,      A_e = softmax(Q K_e^T / sqrt d),  j over the concept's own tokens

w_j < 0 takes the concept's features away, 0 leaves them, w_j > 0 adds them. DEFAULTS are what an input left alone gets.

A text encoder may say most of a thing at its start, end and padding, which the own tokens lack: then this takes little
away, and a large w_j destroys the picture. Evidence "alike" re-weights all that the erasure prompt At adds to what
ordinary prompts A0 do, and finds the features by it (our reading; A0, cosines and neighbours as in cre.py):

    out = A + w E (At - A0),      E = 1 + max(0, c - 1) / n where cos(A - A0, At - A0) >= FLOOR, else 0,
                                  c = <A - A0, At - A0> / ||At - A0||^2

with A_r for the A0 that is added where the concept has something to draw instead, and a FLOOR that follows what the
prompt's own tokens say (said.py). What is taken away is so as often as the prompt says it: c is 2 by a weight of 2,
which the n phrases that are found there share; it is no more than A has beyond A_r, as in cre.py, where that is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..edits.method import Method, register
from ..edits.spec import Concept, EditSpec, Phrase
from ..presets.parts import ConceptEdit
from .attention import attend, logits, repetitions
from .cre import DEFAULTS as CRE
from .cre import TINY, alike, beyond, less, likeness, neutral_needed
from .eiup_weight import EVIDENCE, Regressor
from .found import Found
from .said import floors
from .tokens import TokenSet, TokenSets, solved_together

FLOOR = CRE.floor
CHOICES = {"form": ("separate", "joint"), "evidence": EVIDENCE}


@dataclass(frozen=True)
class EIUPOptions:
    """form: a softmax of its own ("separate"), or the prompt's ("joint"), for the erasure prompt's tokens.

    weights: w_j, one for all phrases of the concept, or one for each phrase.
    evidence: "share" multiplies A_e by the share of the attention that the concept's own tokens would get beside the
    prompt's; "none" does not; "alike" edits only where the picture's features are like the erasure prompt's, and there
    all of them. Only for a softmax of its own: a shared one weighs both kinds of tokens anyway.
    auto: finds the weight of each phrase and image at the first step; `weights` then scale it, -1 being as trained.
    """

    form: str = "separate"
    weights: tuple[float, ...] = (-1.0,)
    evidence: str = "none"
    auto: Regressor | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        for weight in self.weights:
            if not math.isfinite(weight):
                raise ValueError(f"weight is {weight}; give a finite number (-1 removes the concept, 0 does nothing)")
        if self.auto is not None and self.form != "separate":
            raise ValueError('auto finds weights for form "separate" only; choose that form, or set auto to "off"')

    @property
    def nothing(self) -> bool:
        """With a softmax of its own, a weight of 0 leaves the attention as it was; in a shared one it does not."""
        return self.form == "separate" and not any(self.weights)

    @property
    def baseline(self) -> str:
        """What A and the erasure prompt's output are compared with, as CREOptions has it."""
        return "neutral" if self.form == "separate" and self.evidence == "alike" else "none"

    def weight(self, phrase: int) -> float:
        return self.weights[0] if len(self.weights) == 1 else self.weights[phrase]


DEFAULTS = EIUPOptions(form="separate", weights=(-1.0,), evidence="none")


def reweighted(q: Tensor, K: Tensor, wV: Tensor, s: Tensor, evidence: Tensor | None = None) -> Tensor:
    """sum_j w_j A_e[:, j] v_j over the tokens j of M erasure prompts, A_e = softmax(q K^T / sqrt d); fp32 [R, N, H, d].

    q: [R, N, H, d]; K, wV: [M, T, H, d], the values already weighted (0 for the tokens that are not the concept's own,
    which still take part in the softmax); s: [M, R], each prompt's strength; evidence: [M, R, N, H, 1], `share` below.
    """
    s = s[:, :, None, None, None]
    return ((s if evidence is None else s * evidence) * attend(q, K, wV).float()).sum(0)


def share(q: Tensor, k: Tensor, own: list[Tensor], bias: Tensor | None = None) -> Tensor:
    """Z_own / (Z_own + Z_prompt), Z = sum_j exp(q k_j / sqrt d): evidence that a concept is there; [M, R, N, H, 1].

    q: [R, N, H, d]; k: [R, L, H, d], the prompt's keys; own: M times [1, n, H, d], the concepts' own tokens' keys;
    bias: what a mask adds to the prompt's logits, as `logits` has it.

    Our reading, the papers have none: A_e is a softmax over the concept's prompt alone and spends its mass somewhere,
    concept or not. Beside the prompt's tokens, the concept's own get much only where the picture turns to them. A
    prompt that was repeated (attention.repetitions) counts once.
    """
    log_Z = logits(q, k, bias).logsumexp(-1) - repetitions(k).log()[:, None, None]  # [R, H, N]
    shares = [torch.sigmoid(logits(q, K).logsumexp(-1) - log_Z) for K in own]
    return torch.stack(shares).transpose(2, 3)[..., None]


def where_alike(found: Found) -> tuple[Tensor, Tensor]:
    """1 where the picture's features are like phrase p's, else 0; and E_p. [P, ...] each; found: with A [..., H, d]."""
    assert found.A0 is not None
    a, x = (less(each, found.A0, "full") for each in (found.A, found.At))
    along, norm = (x * a).sum(-1, keepdim=True), x.norm(dim=-1, keepdim=True)
    near = None if found.kept is None else likeness(a, less(found.kept.found, found.A0, "full"), found.kept.of)
    there = alike(a, along, norm, floors(FLOOR, found.said), near)
    assert isinstance(there, Tensor)
    times = along / norm.square().clamp_min(TINY)
    times = times if found.Ar is None else times.minimum(beyond(found, "full"))
    E = there * (1 + (times - 1).clamp_min(0) / there.sum(0).clamp_min(1))
    return there[..., 0, 0], E[..., 0, 0]


def steered(found: Found, s: Tensor, note: Callable[[Tensor], None] | None = None) -> Tensor:
    """What evidence "alike" takes away, sum_p s_p E_p (At_p - A0) over the phrases p, s_p = -w_p; fp32 [..., H, d].

    Where there is something to draw instead, A_r stands in A0's place. s: [P, ...]; note: told where, [P, ...].
    """
    assert found.A0 is not None
    (there, E), x = where_alike(found), less(found.At, found.A0 if found.Ar is None else found.Ar, "full")
    E = torch.where(s > 0, E, there)  # more of it is added no more often than its weight says
    if note is not None:
        note(there)
    if found.weight is not None:
        found.weight.taken((s * there)[..., None, None])
    return ((s * E)[..., None, None] * x).sum(0).reshape(found.A.shape)


Weight = Annotated[float, Field(ge=-16, le=16)]


class EIUPEdit(ConceptEdit):
    method: Literal["EIUP"]
    weights: Annotated[tuple[Weight, ...], Field(min_length=1, max_length=64)] = (-1.0,)
    form: Literal["separate", "joint"] = "separate"
    evidence: Literal["none", "share", "alike"] = "none"

    @model_validator(mode="after")
    def _a_weight_for_each_phrase(self) -> EIUPEdit:
        phrases = len(self.concept.phrases)
        if phrases and len(self.weights) not in (1, phrases):
            raise ValueError(f"{len(self.weights)} weights for {phrases} phrases; give one, or as many")
        return self


class EIUP(Method):
    name, label, order = "erasure", "EIUP", 30
    source, options, document = Concept, EIUPOptions, EIUPEdit

    def complaint(self, spec: EditSpec) -> str | None:
        weights, phrases = len(spec.options.weights), len(spec.source.phrases)
        if weights not in (1, phrases):
            return (
                f'weights has {weights} numbers, but concept "{spec.source.name}" has {phrases} phrases; give one '
                "number a line for each phrase, or leave it empty to use `weight` for all"
            )
        return None

    def idle(self, spec: EditSpec) -> bool:
        return spec.options.nothing

    def adds(self, spec: EditSpec) -> bool:
        return any(weight > 0 for weight in spec.options.weights)

    def admit(self, spec: EditSpec, backbone: Any) -> None:
        neutral_needed(spec, "another evidence")
        auto = spec.options.auto
        if auto is not None and auto.blocks != backbone.block_names:
            raise spec.error(
                f'auto: "{auto.name}" was trained on another model, of {len(auto.blocks)} cross-attentions from '
                f"{auto.blocks[0]} to {auto.blocks[-1]}; {backbone.name} has {len(backbone.blocks)}. Choose a file "
                "that was trained on this model, or set auto to off"
            )

    def token_sets(self, edits: Sequence[tuple[int, EditSpec]], device: torch.device) -> TokenSets:
        compared = [(i, spec) for i, spec in edits if spec.options.baseline == "neutral"]
        phrases = [
            (i, phrase, spec.options, spec.options.weight(p))
            for i, spec in edits
            if spec.options.baseline == "none"
            for p, phrase in enumerate(spec.source.phrases)
        ]
        joint = [own_set(i, phrase, w, device) for i, phrase, options, w in phrases if options.form == "joint"]
        groups: dict[tuple[int, str], list[tuple[int, Phrase, float]]] = {}
        for i, phrase, options, w in phrases:
            if options.form == "separate":
                groups.setdefault((phrase.tokens.shape[1], options.evidence), []).append((i, phrase, w))
        return TokenSets(
            joined=joint,
            separate=[weighted_set(groups[T, e], e == "share", device) for T, e in sorted(groups)],
            solved=solved_together(self, compared, device, scale=lambda o, p: -o.weight(p), tested=lambda o: True),
        )

    def taken(self, found: Found, s: Tensor, options: Any, note: Any = None) -> Tensor:
        return steered(found, s, note)

    def first_look(self, spec: EditSpec) -> str | None:
        return None if spec.options.auto is None else spec.options.evidence

    def settled(self, spec: EditSpec, watch: Any, blocks: Iterable[Any], images: Sequence[int]) -> list[EditSpec]:
        """One edit a phrase, with the weights that the regressor found. images: of the batch, as the watch saw them."""
        w = spec.options.auto.weights(watch.features(blocks))  # [P, images]
        out = []
        for p, phrase in enumerate(spec.source.phrases):
            found = {i: -spec.options.weight(p) * w_i for i, w_i in zip(images, w[p].tolist(), strict=True)}
            scale = tuple(found.get(i, 0.0) for i in range(max(images) + 1))
            concept, options = replace(spec.source, phrases=(phrase,)), replace(spec.options, weights=(1.0,), auto=None)
            out.append(replace(spec, source=concept, options=options, scale=scale))
        return out

    def to_document(self, spec: EditSpec, saver: Any, common: dict[str, Any]) -> EIUPEdit:
        concept, options = saver.concept(spec.source), spec.options
        if options.auto is not None:
            raise ValueError(f"the edit of {spec.node} finds its weight with a file of its own; set its auto to off")
        numbers = {k: v for k, v in vars(options).items() if k != "auto"}
        return EIUPEdit(method="EIUP", concept=concept, blocks=spec.blocks, **common, **numbers)

    def from_document(self, edit: EIUPEdit, maker: Any) -> dict[str, Any]:
        options = EIUPOptions(edit.form, edit.weights, edit.evidence)
        return dict(source=maker.concept(edit.concept), options=options)

    def described(self, edit: EIUPEdit) -> str:
        weights = ", ".join(f"{weight:g}" for weight in edit.weights)
        verb = "Adds" if all(weight > 0 for weight in edit.weights) else "Weakens or adds"
        verb = "Takes away" if all(weight <= 0 for weight in edit.weights) else verb
        scaled = "" if edit.strength == 1 else f", strength {edit.strength:g}"
        return f"{verb} what attends to {edit.concept.said()} (EIUP, weight {weights}{scaled})"


def own_set(i: int, phrase: Phrase, weight: float, device: torch.device) -> TokenSet:
    """A phrase's own tokens alone: start, end and padding are in the prompt already."""
    own = phrase.tokens[:, list(phrase.own)].to(device)
    return TokenSet([i], own, own, torch.full((1, own.shape[1], 1, 1), weight, device=device))


def weighted_set(phrases: Sequence[tuple[int, Phrase, float]], evidence: bool, device: torch.device) -> TokenSet:
    """Erasure prompts of one length; only the values of a phrase's own tokens count, each with the phrase's weight."""
    tokens = torch.cat([phrase.tokens for _, phrase, _ in phrases]).to(device)
    w = torch.zeros(*tokens.shape[:2], 1, 1)
    for m, (_, phrase, weight) in enumerate(phrases):
        w[m, list(phrase.own)] = weight
    own = [phrase.own for _, phrase, _ in phrases] if evidence else []
    return TokenSet([i for i, _, _ in phrases], tokens, tokens, w.to(device), own)


METHOD = register(EIUP())
