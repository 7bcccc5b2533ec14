"""The papers' equations in a few slow and obvious lines, one head, row and position at a time, in double precision.

Nothing here may use the code under test.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import nnls
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt d) V of one row. q: [N, C]; k, v: [L, C]; returns [N, C]."""
    out = []
    for Q, K, V in zip(*(x.double().chunk(heads, -1) for x in (q, k, v)), strict=True):
        out.append(torch.softmax(Q @ K.T / Q.shape[-1] ** 0.5, -1) @ V)
    return torch.cat(out, -1)


def cre(
    A: Tensor,
    At: Sequence[Tensor],
    s: Sequence[float],
    heads: int,
    clip: bool,
    joint: bool,
    A0: Tensor | None = None,
    floor: float | Sequence[float] = 0.0,
    keep: Sequence[Sequence[Tensor]] = (),
    instead: Sequence[Tensor | None] = (),
    taken: list[Tensor] | None = None,
    beyond: Sequence[bool] = (),
) -> Tensor:
    """Eq. 4 of the CRE paper for one row, and our readings of it. A, At_k, A0: [N, C]; heads: 1 for the full width.

    floor: of all concepts, or one each; keep: for each concept what is found in its neighbours' prompts, [N, C] each;
    instead: for each what is found in what takes its place, [N, C], if anything.
    taken: is given how much of each concept was taken away, [N, len(At)], for heads = 1; beyond: for each whether that
    is no more than what A - instead has of At - instead.
    """
    shares = torch.zeros(A.shape[0], len(At), dtype=torch.double)
    least = [floor] * len(At) if isinstance(floor, float) else floor
    out = A.double().clone()
    for position in range(A.shape[0]):
        for head in range(heads):
            d = A.shape[1] // heads
            part = slice(head * d, (head + 1) * d)
            base = torch.zeros(d, dtype=torch.double) if A0 is None else A0[position, part].double()
            a = A[position, part].double() - base
            steer = [each[position, part].double() - base for each in At]
            cosines = [a @ t / (a.norm() * t.norm()) for t in steer]
            near = [k for k, cosine in enumerate(cosines) if not least[k] or cosine >= least[k]]
            for k, neighbours in enumerate(keep):
                for y in (each[position, part].double() - base for each in neighbours):
                    if k in near and a @ y / (a.norm() * y.norm()) > cosines[k]:
                        near.remove(k)
            steer = [steer[k] for k in near]
            if not steer:
                continue
            if joint and clip:
                c = torch.from_numpy(nnls(torch.stack(steer, 1).detach().numpy(), a.detach().numpy())[0])
            elif joint:
                c = torch.linalg.lstsq(torch.stack(steer, 1), a[:, None], driver="gelsd").solution[:, 0]
            else:
                c = torch.stack([a @ t / (t @ t) for t in steer])
            for k, c_k, t in zip(near, c, steer, strict=True):
                if instead and (drawn := instead[k]) is not None:
                    t = At[k][position, part].double() - drawn[position, part].double()
                    if beyond and beyond[k]:
                        c_k = min(
                            c_k, max((A[position, part].double() - drawn[position, part].double()) @ t / (t @ t), 0)
                        )
                shares[position, k] = s[k] * (max(c_k, torch.zeros(())) if clip else c_k)
                out[position, part] -= shares[position, k] * t
    if taken is not None:
        taken.append(shares)
    return out


def eiup(
    A: Tensor, q: Tensor, k_e: Tensor, v_e: Tensor, w: Sequence[float], heads: int, evidence: Tensor | None = None
) -> Tensor:
    """A V + sum_j w_j A_e[:, j] v_j of one row. A, q: [N, C]; k_e, v_e: [T, C]; w: [T]; evidence: [N, heads]."""
    out = A.double().clone()
    d = q.shape[-1] // heads
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        A_e = torch.softmax(q[:, part].double() @ k_e[:, part].double().T / d**0.5, -1)
        if evidence is not None:
            A_e = A_e * evidence[:, head, None]
        for j, w_j in enumerate(w):
            out[:, part] += w_j * A_e[:, j, None] * v_e[j, part].double()
    return out


def eiup_alike(
    A: Tensor,
    At: Sequence[Tensor],
    w: Sequence[float],
    A0: Tensor,
    floor: float,
    keep: Sequence[Sequence[Tensor]] = (),
    instead: Tensor | None = None,
) -> Tensor:
    """A + sum_p w_p E_p (At_p - A0) of one row, where cos(A - A0, At_p - A0) >= floor and no neighbour's is larger;
    with `instead` for the A0 that is added. E_p is 1, or where w_p < 0 and c_p > 1 is how many times At_p - A0 is in
    A - A0, and no more than At_p - instead is in A - instead, 1 + (c_p - 1) / n with n the phrases that are there.

    A, At_p, A0, instead: [N, C]; keep: for each phrase what is found in its neighbours' prompts."""
    out = A.double().clone()
    for position in range(len(A)):
        base = A0[position].double()
        a = A[position].double() - base
        there = []
        for p, each in enumerate(At):
            t = each[position].double() - base
            cosine = a @ t / (a.norm() * t.norm())
            others = [y[position].double() - base for y in (keep[p] if keep else ())]
            if cosine >= floor and all(a @ y / (a.norm() * y.norm()) <= cosine for y in others):
                there.append(p)
        for p in there:
            t, remains = At[p][position].double() - base, base
            c = a @ t / (t @ t)
            if instead is not None:
                remains = instead[position].double()
                d = At[p][position].double() - remains
                c = min(c, (A[position].double() - remains) @ d / (d @ d))
            more = max(0.0, c.item() - 1) / len(there) if w[p] < 0 else 0.0
            out[position] += w[p] * (1 + more) * (At[p][position].double() - remains)
    return out


def share(q: Tensor, k: Tensor, k_own: Tensor, heads: int, pieces: int) -> Tensor:
    """What part of one softmax over one copy of the prompt and a concept's own tokens the latter get: [N, heads]."""
    out = torch.zeros(len(q), heads, dtype=torch.double)
    d = q.shape[-1] // heads
    q, k, k_own = (x.detach().double() for x in (q, k, k_own))
    for position in range(len(q)):
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            Z_prompt = torch.exp(k[:, part] @ q[position, part] / d**0.5).sum() / pieces
            Z_own = torch.exp(k_own[:, part] @ q[position, part] / d**0.5).sum()
            out[position, head] = Z_own / (Z_own + Z_prompt)
    return out


def appended(q: Tensor, k: Tensor, v: Tensor, k_e: Tensor, v_e: Tensor, times: int, heads: int) -> Tensor:
    """One softmax over the prompt's tokens and `times` copies of the appended ones."""
    return attention(q, torch.cat([k, *[k_e] * times]), torch.cat([v, *[v_e] * times]), heads)


def said(
    v: Tensor,
    own: Tensor,
    like: Sequence[Tensor],
    ordinary: Sequence[Tensor],
    common: float | None = None,
    sure: tuple[float, float] = (0.0, 1.0),
    spread: float = 0.0,
) -> float:
    """How surely the values v [L, C] of a prompt say a phrase whose own rows' values are own [r, C].

    like, ordinary: the values of prompts that say it, and of ordinary ones, [n, C] each; common: of the latter's mean
    variance, what lies above which counts less, by the inverse root of their covariance; sure: none and all of it;
    spread: of the cosines that are none and all of it, at least."""
    X = torch.cat([x.double() for x in ordinary])
    v0, M = X.mean(0), torch.eye(X.shape[1], dtype=torch.double)
    if common is not None:
        covariance = (X - v0).T @ (X - v0)
        least = common * covariance.trace() / min(X.shape)
        e, u = torch.linalg.eigh(covariance + least * M)
        M = u @ torch.diag(e**-0.5) @ u.T

    def most(values: Tensor, row: Tensor) -> float:
        t = M @ (row.double() - v0)
        return max(float(M @ (x.double() - v0) @ t / ((M @ (x.double() - v0)).norm() * t.norm())) for x in values)

    told = [(min(most(x, row) for x in like), max(most(x, row) for x in ordinary), row) for row in own]
    high, low, row = max(told, key=lambda each: each[0] - each[1])
    share = (most(v, row) - low) / max(high - low, spread) if high > low else 0.0
    return min(max((share - sure[0]) / (sure[1] - sure[0]), 0.0), 1.0)


def reread(
    k: Tensor,
    v: Tensor,
    T: tuple[Tensor, Tensor],
    G: tuple[Tensor, Tensor],
    P: Tensor,
    tau: float = 0.07,
    none: float = 0.5,
    common: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """What the keys and values of a prompt gain by being read anew, token by token: the sum over T's rows of w_i (G_k -
    T_k) and w_i (G_v - T_v), w being a softmax over T's and P's rows, and one of cosine `none`, of the cosines without
    what P's rows vary in. k, v: [L, C]; T, G: keys and values [n, C]; P: values [m, C]."""
    (Tk, Tv), (Gk, Gv) = ([x.double() for x in pair] for pair in (T, G))
    P, v0 = P.double(), P.double().mean(0)
    covariance = (P - v0).T @ (P - v0)
    least = common * covariance.trace() / min(P.shape)
    e, u = torch.linalg.eigh(covariance + least * torch.eye(len(v0), dtype=torch.double))
    M = u @ torch.diag(e**-0.5) @ u.T
    more_k, more_v = torch.zeros_like(k.double()), torch.zeros_like(v.double())
    for j, value in enumerate(v.double()):
        own = M @ (value - v0)
        w = []
        for row in (*Tv, *P):
            other = M @ (row - v0)
            w.append(torch.exp(own @ other / (own.norm() * other.norm()) / tau))
        w.append(torch.exp(torch.tensor(none / tau, dtype=torch.double)))
        for i in range(len(Tv)):
            more_k[j] += w[i] / sum(w) * (Gk[i] - Tk[i])
            more_v[j] += w[i] / sum(w) * (Gv[i] - Tv[i])
    return more_k, more_v
