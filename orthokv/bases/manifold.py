"""The Stiefel manifold: retractions, tangents, and the duals of oblique bases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor


def orthonormality_error(matrix: Tensor) -> float:
    """Largest entry of `|P^T P - I|` over a stack of matrices `[..., width, rank]`, in float64."""
    p = matrix.double()
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    return float((p.transpose(-1, -2) @ p - eye).abs().max())


def cholesky_qr(a: Tensor) -> Tensor:
    """Orthonormal columns with the same nested spans as `a` `[..., width, rank]` (CholeskyQR2).

    Two rounds of `A R^-1` with `R` from the Cholesky factor of `A^T A`: batched matrix products and small triangular
    solves only, where batched QR on CUDA loops over the matrices. Accurate while cond(A) is below 1/sqrt(eps), which
    always holds for a point of the manifold plus a step. Where it does not hold the result is not finite, which the loss
    shows: asking each time would stop a GPU's queue.
    """
    for _ in range(2):
        lower: Tensor = torch.linalg.cholesky_ex(a.transpose(-1, -2) @ a).L
        solved: Tensor = torch.linalg.solve_triangular(lower, a.transpose(-1, -2), upper=False)
        a = solved.transpose(-1, -2)
    return a


def qr(a: Tensor) -> Tensor:
    """Q of the QR decomposition with a positive diagonal of R, which makes it a continuous function of `a`."""
    q, r = torch.linalg.qr(a)
    diagonal: Tensor = torch.diagonal(r, dim1=-2, dim2=-1)
    return cast(Tensor, q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2))


def polar(a: Tensor, iterations: int = 12) -> Tensor:
    """The nearest point of the manifold to `a` (its polar factor), by Newton-Schulz; needs `|A^T A - I| < 1`."""
    for _ in range(iterations):
        a = 1.5 * a - 0.5 * a @ (a.transpose(-1, -2) @ a)
    return a


RETRACTIONS: dict[str, Callable[[Tensor], Tensor]] = {"cholesky": cholesky_qr, "qr": qr, "polar": polar}


def duals(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`A^-T` of square matrices `[n, width, width]`; not finite where there is none, see `cholesky_qr`.

    Those of one width are inverted together, which on a GPU costs hardly more than one of them.
    """
    by_width: dict[int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_width.setdefault(matrix.shape[-1], []).append(i)
    found: dict[int, Tensor] = {}
    for indices in by_width.values():
        stacked = torch.cat([matrices[i] for i in indices])
        inverses: Tensor = torch.linalg.inv_ex(stacked).inverse
        parts = inverses.transpose(-1, -2).split([len(matrices[i]) for i in indices])
        found |= dict(zip(indices, parts, strict=True))
    return [found[i] for i in range(len(matrices))]


def tangent(point: Tensor, gradient: Tensor) -> Tensor:
    """Project a Euclidean gradient on the tangent space at `point`: `G - P sym(P^T G)` (Absil et al. 2008, 3.6.1)."""
    inner = point.transpose(-1, -2) @ gradient
    return gradient - point @ (0.5 * (inner + inner.transpose(-1, -2)))
