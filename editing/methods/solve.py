"""Small positive definite systems, one at each position."""

from __future__ import annotations

import torch
from torch import Tensor

# Devices without `torch.cholesky_solve`: Apple's has it from a later torch on than the one that hosts come with.
WITHOUT_CHOLESKY = {"mps"}


def solve(gram: Tensor, b: Tensor) -> Tensor:
    """c with gram c = b. gram: [..., K, K], positive definite; b: [..., K, 1]."""
    if gram.device.type in WITHOUT_CHOLESKY:
        return eliminated(gram, b)
    L, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(b, L)


def eliminated(gram: Tensor, b: Tensor) -> Tensor:
    """The same by Gauss-Jordan elimination, with what every device has; positive definite systems need no pivoting.

    gram: [..., K, K]; b and what is returned: [..., K, 1].
    """
    M = torch.cat([gram, b], -1)  # [..., K, K + 1]
    for k in range(M.shape[-2]):
        row = M[..., k : k + 1, :] / M[..., k : k + 1, k : k + 1]
        rest = M - M[..., k : k + 1] * row
        M = torch.cat([rest[..., :k, :], row, rest[..., k + 1 :, :]], -2)
    return M[..., -1:]
