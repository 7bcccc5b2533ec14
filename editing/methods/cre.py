"""Causal representation editing: the cross-attention output loses its projection on the concept's (papers: CRE, eq. 4).

    Phi(A, At_k) = A - sum_k s_k (A^T At_k / ||At_k||^2) At_k,      At_k = softmax(Q Kt_k^T / sqrt d) Vt_k

per spatial position and before `to_out`, At_k being what the same queries find in the concept's prompt. The paper
leaves open what `CREOptions` chooses; `make bench` compares the readings on the demo model (table "readings").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.method import Method, register
from ..edits.spec import Concept, EditSpec, Phrase
from ..presets.parts import ConceptEdit
from ..presets.texts import Percent
from ..presets.versions import since
from .found import Found, Kept
from .pooled import OnPooled, pooled_edit
from .said import floors
from .solve import solve
from .tokens import TokenSets, solved_together

CHOICES = {
    "width": ("full", "head"),
    "tokens": ("all", "own"),
    "baseline": ("none", "neutral"),
    "negative": ("keep", "clip"),
    "solve": ("joint", "sum"),
    "evidence": ("tokens", "position"),
}
RIDGE = 1e-6  # of the Gram matrix' trace: dependent concepts share what they explain
PIVOTS = 4  # after which up to ten concepts are within 1 % of the exact ones; no end is waited for, on a device
TINY = 1e-12  # a concept without attention output has no direction to project on, and edits nothing


@dataclass(frozen=True)
class CREOptions:
    """The readings of eq. 4. The paper prints "all", "none", "keep", "sum", and does not say which width.

    width: "full", one coefficient per position over all heads; "head", one per head.
    tokens: "all" of the concept's prompt enter its softmax, or the concept's "own" without start, end and padding.
    baseline: "neutral" first takes from both A and At_k what the same queries find in the concept's neutral encoding,
        A0: what ordinary prompts find, or the empty one; "none" does not.
    negative: "clip" adds nothing back where A points away from the concept; "keep" does.
    solve: "joint" coefficients together explain A best; "sum" are each concept's own.
    floor: a concept is edited only where the cosine between A and At_k (less A0) is at least this; 0 edits everywhere.
        What other prompts share with the concept, "a picture of some thing", lies below it and is left alone.

    evidence: "position" asks the floor's cosine of each position alone, which other words of the prompt can push under
        it; "tokens" lowers the floor where the prompt's own tokens say the concept, and raises it elsewhere (said.py).
        In a joint attention, where the concept's stream reads the picture and is like all of it, the lowered floor is
        no less than a share of the greatest cosine of any position.

    And where A is more like one of the concept's kept prompts (spec.Concept.keep) than like the concept, it stays.
    Where the concept has something to draw instead, At_k - A_r is taken away in place of At_k - A0: what the same
    queries find in the replacement is what remains. As far as the prompt's own tokens say the concept (`evidence`), A'
    comes first, what they find in the prompt with those tokens read anew (reread.py), so that its other words stay what
    they are beside the replacement; eq. 4 is of A' then, with no more of At_k than A' has beyond A_r. In a joint
    attention the text itself is read anew, before the first block, where it says the concept clearly; what it says then
    is the evidence, and what it said as far as it is not. A_r is A0 there where the prompt only leads to the concept:
    what is drawn instead has no word to stand in for, and its stream, which reads the picture, would say it again.
    """

    width: str
    tokens: str
    baseline: str
    negative: str
    solve: str
    floor: float = 0.0
    evidence: str = "position"

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:  # catches NaN as well
            raise ValueError(f"floor is {self.floor}; give a cosine from 0 (edit everywhere) to 1 (nowhere)")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")


DEFAULTS = CREOptions(
    width="full", tokens="all", baseline="neutral", negative="clip", solve="joint", floor=0.5, evidence="tokens"
)


def project(
    A: Tensor, At: Tensor, s: Tensor, options: CREOptions, A0: Tensor | None = None, kept: Kept | None = None
) -> Tensor:
    """Phi(A), eq. 4, in A's dtype. Shapes as in `projection`."""
    return (A.float() - projection(Found(A, At, A0, kept=kept), s, options)).to(A.dtype)


def projection(found: Found, s: Tensor, options: CREOptions, note: Callable[[Tensor], None] | None = None) -> Tensor:
    """What eq. 4 takes away, sum_k s_k c_k (At_k - A0), or (At_k - Ar_k) where something is drawn instead, and before
    it what a prompt that says it loses by being read anew; in fp32.

    found: with A [..., H, d]; s: [K, ...], of which s_k = 0 means that concept k is not there at all; note: told where
    each concept is found, [K, ..., H or 1, 1]; returns [..., H, d].
    """
    A, At, A0 = found.A, found.At, found.A0
    a, x = (less(each, A0, options.width) for each in (A, At))
    s = s[..., None, None]  # [K, ..., 1, 1]
    along, square = (x * a).sum(-1, keepdim=True), (x * x).sum(-1, keepdim=True)
    near = None if found.kept is None else likeness(a, less(found.kept.found, A0, options.width), found.kept.of)
    where = alike(a, along, square.sqrt(), floors(options.floor, found.said, found.peak), near)
    if note is not None and isinstance(where, Tensor):
        note(where)
    if found.lost is not None and found.reread is not None:
        once = (found.reread[..., None, None] * s * where).amax(0) * less(found.lost, None, options.width)
        rest = replace(found, A=A.float() - once.reshape(A.shape), lost=None)
        return once.reshape(A.shape) + projection(rest, s[..., 0, 0], options)
    s = s * where
    alone = options.solve == "sum" or len(x) == 1
    c = along / square.clamp_min(TINY) if alone else least_squares(a, x, s != 0, options.negative == "clip")
    if options.negative == "clip":
        c = c.clamp_min(0)
    if found.reread is not None and found.Ar is not None:
        c = torch.where(found.reread[..., None, None] > 0, c.minimum(beyond(found, options.width)), c)
    if found.weight is not None:  # what else there is beside the concept keeps its own: the floor as it is, for weights
        found.weight.taken(s * c * alike(a, along, square.sqrt(), options.floor))
    taken = s * c * (x if found.Ar is None else less(At, found.Ar, options.width))
    return (taken[0] if len(x) == 1 else taken.sum(0)).reshape(A.shape)


def beyond(found: Found, width: str) -> Tensor:
    """max(0, <A - Ar_k, At_k - Ar_k> / ||At_k - Ar_k||^2): what A has of a phrase beyond what is drawn in its place,
    which has much in common with it. [K, ..., H or 1, 1]."""
    d, more = (less(x, found.Ar, width) for x in (found.At, found.A))
    return (more * d).sum(-1, keepdim=True).clamp_min(0) / (d * d).sum(-1, keepdim=True).clamp_min(TINY)


def less(x: Tensor, A0: Tensor | None, width: str) -> Tensor:
    """x [..., H, d] less the baseline, in fp32; at full width [..., 1, H d], one "head" as wide as all."""
    x = x.float() if A0 is None else x.float() - A0
    return x.flatten(-2)[..., None, :] if width == "full" else x


def alike(a: Tensor, along: Tensor, norm: Tensor, floor: Tensor | float, near: Tensor | None = None) -> Tensor | float:
    """1 where a's cosine with x_k is at least `floor` and its `likeness` to x_k that to a kept prompt, `near`; else 0.

    along, norm: a . x_k and ||x_k||, [K, ..., H, 1].
    """
    everywhere = isinstance(floor, float) and floor == 0
    found = None if everywhere else along >= floor * norm * a.norm(dim=-1, keepdim=True)
    if near is not None:
        own = along >= near * norm
        found = own if found is None else found & own
    return 1.0 if found is None else found.float()


def likeness(a: Tensor, y: Tensor, of: Tensor) -> Tensor:
    """max_m ||a|| cos(a, y_m) over each concept's kept prompts. a: [..., H, d]; y: [M, ..., H, d]; of: [K, M].

    Returns [K, ..., H, 1]; -inf where nothing is kept.
    """
    cosines = (y * a).sum(-1, keepdim=True) / y.norm(dim=-1, keepdim=True).clamp_min(TINY)
    own = of.view(*of.shape, *[1] * (cosines.ndim - 1))
    return cosines.where(own, -torch.inf).amax(1)


def most_alike(found: Found, options: CREOptions) -> Tensor:
    """The greatest cosine between A and At_k, less A0, of all positions: [K, R, 1, H or 1, 1]."""
    a, x = (less(each, found.A0, options.width) for each in (found.A, found.At))
    return F.cosine_similarity(a.expand_as(x), x, dim=-1)[..., None].amax(2, keepdim=True)


def least_squares(a: Tensor, x: Tensor, present: Tensor, positive: bool = False) -> Tensor:
    """argmin_c ||a - sum_k c_k x_k||^2 at every position and head, over the concepts that are present there.

    positive: over c >= 0. Two phrasings of one thing are nearly one vector, on which 3 and -2 do what 1 does; to clip
    the -2 alone would take the thing away three times. So what turns out negative is left out, what would help is taken
    back in, and the rest solved again (block principal pivoting; Portugal, Judice and Vicente 1994).

    a: [..., H, d]; x: [K, ..., H, d]; present: [K, ..., 1 or H, 1]; returns c: [K, ..., H, 1].
    """
    X = x.movedim(0, -2)  # [..., H, K, d]
    b, gram = (x * a).sum(-1, keepdim=True).movedim(0, -2), X @ X.mT
    eye = torch.eye(len(x), device=x.device)

    def solved(m: Tensor) -> Tensor:
        own = m * gram * m.mT
        ridge = RIDGE * own.diagonal(dim1=-2, dim2=-1).sum(-1) + TINY
        return m * solve(own + ridge[..., None, None] * eye, m * b)

    m = present.movedim(0, -2).to(X.dtype)  # [..., 1 or H, K, 1]
    c, there = solved(m), m > 0
    for left in reversed(range(PIVOTS)) if positive else ():
        back = there & (m == 0) & (gram @ c < b) if left else False  # the last only leaves out
        m = ((c > 0) | back).to(X.dtype)
        c = solved(m)
    return c.movedim(-2, 0)


class CREEdit(ConceptEdit):
    method: Literal["CRE"]
    width: Literal["full", "head"] = "full"
    tokens: Literal["all", "own"] = "all"
    baseline: Literal["none", "neutral"] = "neutral"
    negative: Literal["keep", "clip"] = "clip"
    solve: Literal["joint", "sum"] = "joint"
    floor: Percent = DEFAULTS.floor
    evidence: Annotated[Literal["tokens", "position"], since(2, "evidence by tokens or by position")] = "tokens"


class CRE(Method):
    name, label, order = "projection", "CRE", 40
    source, options, document = Concept, CREOptions, CREEdit

    def admit(self, spec: EditSpec, backbone: Any) -> None:
        neutral_needed(spec, 'baseline to "none"')

    def token_sets(self, edits: Sequence[tuple[int, EditSpec]], device: torch.device) -> TokenSets:
        return TokenSets(solved=solved_together(self, edits, device, chosen, tested=lambda o: o.evidence == "tokens"))

    def on_pooled(self, spec: EditSpec, device: torch.device) -> OnPooled | None:
        return pooled_edit(spec, device)

    def taken(self, found: Found, s: Tensor, options: Any, note: Any = None) -> Tensor:
        return projection(found, s, options, note)

    def peak(self, found: Found, options: Any) -> Tensor | None:
        return most_alike(found, options) if options.floor else None

    def to_document(self, spec: EditSpec, saver: Any, common: dict[str, Any]) -> CREEdit:
        concept = saver.concept(spec.source)
        return CREEdit(method="CRE", concept=concept, blocks=spec.blocks, **common, **vars(spec.options))

    def from_document(self, edit: CREEdit, maker: Any) -> dict[str, Any]:
        readings = {name: getattr(edit, name) for name in (*CHOICES, "floor")}
        return dict(source=maker.concept(edit.concept), options=CREOptions(**readings))

    def described(self, edit: CREEdit) -> str:
        kept = f", but not {'; '.join(edit.concept.keep)}" if edit.concept.keep else ""
        instead = (
            f", drawing {'; '.join(edit.concept.instead)} instead" if edit.concept.instead and edit.strength else ""
        )
        verb = "Erases" if edit.strength else "Leaves"
        return f"{verb} {edit.concept.said()}{instead}{kept} (CRE, strength {edit.strength:g})"


def chosen(options: CREOptions, phrase: Phrase) -> Tensor:
    """The tokens that stand for a phrase: [1, n, W]."""
    return phrase.tokens[:, list(phrase.own)] if options.tokens == "own" else phrase.tokens


def neutral_needed(spec: EditSpec, mend: str) -> None:
    """Raise if a concept is to be compared with what it has not."""
    if spec.options.baseline == "neutral" and spec.source.baseline is None:
        raise spec.error(
            f'concept "{spec.source.name}" has nothing neutral to be compared with; connect a CLIPTextEncode '
            f"with ordinary words, or none, to its `neutral` input, or set {mend}"
        )


METHOD = register(CRE())
