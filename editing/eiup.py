"""EIUP's erasure prompt: its tokens enter the attention and the features that attend to them are re-weighted.

arXiv 2408.01014 and its successor GIE (ICLR 2025), whose code reads out = A_base V + sum_j w_j A_e[:, j] v_j.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .attention import attend

FORMS = ("separate", "joint")


@dataclass(frozen=True)
class EIUPOptions:
    """form: a softmax of its own, or the prompt's, for the erasure prompt. weights: one for all phrases, or each's."""

    form: str = "separate"
    weights: tuple[float, ...] = (-1.0,)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form is {self.form!r}; choose one of {', '.join(FORMS)}")

    @property
    def nothing(self) -> bool:
        """With a softmax of its own, a weight of 0 leaves the attention as it was; in a shared one it does not."""
        return self.form == "separate" and not any(self.weights)

    def weight(self, phrase: int) -> float:
        return self.weights[0] if len(self.weights) == 1 else self.weights[phrase]


def reweighted(q: Tensor, K: Tensor, wV: Tensor, s: Tensor) -> Tensor:
    """sum_j w_j A_e[:, j] v_j over the tokens j of M erasure prompts, A_e = softmax(q K^T / sqrt d); fp32 [R, N, H, d].

    q: [R, N, H, d]; K, wV: [M, T, H, d], the values already weighted (0 for the tokens that are not the concept's own,
    which still take part in the softmax); s: [M, R], each prompt's strength.
    """
    return (s[:, :, None, None, None] * attend(q, K, wV).float()).sum(0)
