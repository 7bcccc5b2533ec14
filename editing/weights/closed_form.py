"""UCE, TIME, RECE, SPEED: edits in closed form of the projections W [D, d] that make keys and values of a text's rows.

What all of them compute is W* - W = W R with an R [d, d] that is the same for every projection of a model, so it is
solved once (RECE looks at the projections as well, at their Gram matrix alone). R = A B has as few columns of A as
there are rows of text, and is kept so: a `Change`.

C [n, d] are a concept's rows, G [n, d] what each is to become, P [m, d] what is to stay. All of it in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 1e-6  # a singular value of A B, of the largest or of W's own share of 1: what lies below is rounding


@dataclass(frozen=True)
class Change:
    """W* - W = W A B. A: [d, n]; B: [n, d]."""

    A: Tensor
    B: Tensor

    def then(self, more: Change) -> Change:
        """Both, one after the other: (I + A B)(I + A' B') - I."""
        return Change(torch.cat([self.A, more.A + self.A @ (self.B @ more.A)], 1), torch.cat([self.B, more.B]))

    def applied(self, S: Tensor) -> Tensor:
        """S (I + A B)."""
        return S + S @ self.A @ self.B

    def compact(self) -> Change:
        """The same in as few columns as it needs, A's as large as B's rows."""
        (Qa, Ra), (Qb, Rb) = torch.linalg.qr(self.A), torch.linalg.qr(self.B.T)
        U, s, V = torch.linalg.svd(Ra @ Rb.T)
        r = int((s > LEAST * s[0].clamp_min(1)).sum())
        root = s[:r].sqrt()
        return Change(Qa @ U[:, :r] * root, root[:, None] * V[:r] @ Qb.T)


def uce(C: Tensor, G: Tensor, P: Tensor, lam: float = 0.5, preserve: float = 1.0) -> Change:
    """Unified concept editing (Gandikota et al., WACV 2024), w_p being `preserve`:

    W* = (lam W + W G^T C + w_p W P^T P)(lam I + C^T C + w_p P^T P)^-1
    """
    return Change((G - C).T, solved(lam * eye(C) + C.T @ C + preserve * P.T @ P, C))


def time(C: Tensor, G: Tensor, lam: float = 0.1) -> Change:
    """TIME (Orgad et al., ICCV 2023): the same with nothing to preserve."""
    return uce(C, G, C[:0], lam)


def rece(
    C: Tensor,
    G: Tensor,
    P: Tensor,
    S: Tensor,
    rounds: int = 1,
    lam: float = 0.1,
    preserve: float = 0.1,
    ridge: float = 0.1,
) -> Change:
    """RECE (Gong et al., ECCV 2024): UCE, and then in each round the rows that still say the concept are erased too,

    c' = (ridge I + sum W^T W)^-1 (sum W^T W_old) c,   W edited, W_old as they were; S: sum of W_old^T W_old, [d, d].

    Each round edits the weights as the last one left them, with UCE's formula (INF: the paper does not say which
    weights its regulariser holds on to).
    """
    change = uce(C, G, P, lam, preserve)
    for _ in range(rounds):
        half = change.applied(S).T  # sum W^T W_old: S is symmetric
        again = solved(ridge * eye(C) + change.applied(half), C @ half.T)
        change = change.then(uce(again, G, P, lam, preserve))
    return change


def speed(C: Tensor, G: Tensor, P: Tensor, fixed: Tensor, least: float = 1e-4) -> Change:
    """SPEED (ICLR 2026): in the null space N of what is to stay, and exactly nothing at the rows `fixed`, [f, d].

    W* - W = W (G - C)^T C N Q M,   M = (C^T C N + I)^-1,   Q = I - M F^T (F N M F^T)^-1 F N

    N: onto the eigenvectors of P^T P of an eigenvalue below `least` of their sum (INF, the paper's own bound was not
    read; one that no encoder's scale changes). Its choice among what is to stay, and the made-up rows beside it, are
    left out.
    """
    _, s, V = torch.linalg.svd(P, full_matrices=False)
    V = V[s.square() >= least * s.square().sum()]
    N = eye(C) - V.T @ V
    CNM, FNM = solved(N @ C.T @ C + eye(C), torch.cat([C, fixed]) @ N).tensor_split([len(C)])  # M^T: (N C^T C + I)^-1
    lost = CNM @ fixed.T @ torch.linalg.pinv(FNM @ fixed.T, rtol=1e-10)
    return Change((G - C).T, CNM - lost @ FNM)


def solved(K: Tensor, X: Tensor) -> Tensor:
    """X K^-T. K: [d, d]; X: [n, d]; returns [n, d]."""
    return torch.linalg.solve(K, X.T).T


def eye(C: Tensor) -> Tensor:
    return torch.eye(C.shape[-1], dtype=C.dtype)


METHODS: dict[str, Callable[..., Change]] = {"UCE": uce, "RECE": rece, "TIME": time, "SPEED": speed}
