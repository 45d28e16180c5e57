"""Bases for keys and values: what is stored per layer, and the manifold they live on.

A basis maps the heads of one *group* to a latent and back. With ``x`` a row of ``width`` numbers (the concatenated heads
of the group), ``z = x E`` is cached and ``x' = z D^T`` stands in for ``x``. A point of the Stiefel manifold has ``E = D``
with orthonormal columns; an *oblique* pair has two matrices (the closed-form optimum under a weighting is one).
Columns are ordered: the first ``r`` columns are the basis of rank ``r``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from orthokv.errors import InvalidSetting

KeyMode = Literal["pre", "post"]
# Which heads of a layer share a basis.
Sharing = Literal["head", "tied", "pair", "quad", "joint"]
# What a fit is asked for: ``auto`` chooses layer by layer (:mod:`orthokv.grouping`).
SharingChoice = Literal["head", "tied", "pair", "quad", "joint", "auto"]
KEY_MODES: tuple[KeyMode, ...] = ("pre", "post")
SHARINGS: tuple[Sharing, ...] = ("head", "tied", "pair", "quad", "joint")
SHARING_CHOICES: tuple[SharingChoice, ...] = (*SHARINGS, "auto")
# KV heads in a group, where that is not all of them.
GROUP_HEADS = {"head": 1, "tied": 1, "pair": 2, "quad": 4}


@dataclass(frozen=True)
class Basis:
    """Encoder and decoder of the keys, or of the values, of one layer.

    Attributes:
        encoder: ``[stored groups, width, rank]``, floating point.
        decoder: same shape; the same tensor object as ``encoder`` for an orthonormal basis.
        kv_heads: KV heads of the layer. ``width / head_dim`` of them share a group.
        head_dim: numbers per head.

    ``stored groups`` is 1 where every group uses the same matrices (``tied``) or there is one (``joint``), else the number of
    groups.
    """

    encoder: Tensor
    decoder: Tensor
    kv_heads: int
    head_dim: int

    @property
    def orthonormal(self) -> bool:
        return self.encoder is self.decoder

    @property
    def width(self) -> int:
        return self.encoder.shape[-2]

    @property
    def rank(self) -> int:
        """Latent numbers per token and group."""
        return self.encoder.shape[-1]

    @property
    def groups(self) -> int:
        return self.kv_heads * self.head_dim // self.width

    @property
    def latents_per_token(self) -> int:
        """Latent numbers per token of the whole layer (the *layer total* of the rank)."""
        return self.groups * self.rank

    def encode(self, x: Tensor) -> Tensor:
        """``[B, kv_heads, T, head_dim]`` -> ``[B, groups, T, rank]``."""
        batch, _, tokens, _ = x.shape
        heads = self.width // self.head_dim
        if heads > 1:
            x = x.view(batch, self.groups, heads, tokens, self.head_dim).transpose(2, 3)
            x = x.reshape(batch, self.groups, tokens, self.width)
        return x @ self.encoder

    def decode(self, z: Tensor) -> Tensor:
        """``[B, groups, T, rank]`` -> ``[B, kv_heads, T, head_dim]``."""
        batch, _, tokens, _ = z.shape
        x = z @ self.decoder.transpose(-1, -2)
        heads = self.width // self.head_dim
        if heads > 1:
            x = x.view(batch, self.groups, tokens, heads, self.head_dim).transpose(2, 3)
            x = x.reshape(batch, self.kv_heads, tokens, self.head_dim)
        return x

    def decoder_per_head(self) -> Tensor:
        """The rows of the decoder that belong to each KV head: ``[kv_heads, head_dim, rank]``."""
        if self.width == self.head_dim:
            return self.decoder.expand(self.kv_heads, -1, -1)
        return self.decoder.reshape(self.kv_heads, self.head_dim, self.rank)

    def query_to_latent(self, query: Tensor) -> Tensor:
        """``[B, H, T, head_dim]`` -> ``[B, H, T, rank]``, so that ``query . decode(z) = result . z``."""
        batch, heads, tokens, _ = query.shape
        grouped = query.reshape(batch, self.kv_heads, -1, self.head_dim)
        return (grouped @ self.decoder_per_head()).view(batch, heads, tokens, self.rank)

    def output_from_latent(self, output: Tensor) -> Tensor:
        """``[B, T, H, rank]`` -> ``[B, T, H, head_dim]``: attention over latents, lifted by the value basis."""
        batch, tokens, heads, _ = output.shape
        grouped = output.view(batch, tokens, self.kv_heads, heads // self.kv_heads, self.rank)
        lifted = grouped @ self.decoder_per_head().transpose(-1, -2)
        return lifted.reshape(batch, tokens, heads, self.head_dim)

    def truncate(self, rank: int) -> Basis:
        """The basis of the first ``rank`` columns.

        Raises:
            InvalidSetting: ``rank`` is not between 1 and the present rank.
        """
        if not 1 <= rank <= self.rank:
            raise InvalidSetting(f"rank {rank} is outside 1..{self.rank} (width {self.width})")
        encoder = self.encoder[..., :rank]
        return Basis(
            encoder, encoder if self.orthonormal else self.decoder[..., :rank], self.kv_heads, self.head_dim
        )

    def contiguous(self) -> Basis:
        """The same basis in plain memory order: what a file gives back, so that results do not depend on where it came from."""
        encoder = self.encoder.contiguous()
        decoder = encoder if self.orthonormal else self.decoder.contiguous()
        return Basis(encoder, decoder, self.kv_heads, self.head_dim)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Basis:
        encoder = self.encoder.to(device=device, dtype=dtype)
        decoder = encoder if self.orthonormal else self.decoder.to(device=device, dtype=dtype)
        return Basis(encoder, decoder, self.kv_heads, self.head_dim)


def orthonormal(encoder: Tensor, kv_heads: int, head_dim: int) -> Basis:
    """A point of the Stiefel manifold per stored group: encoder and decoder are one tensor."""
    return Basis(encoder, encoder, kv_heads, head_dim)


def orthonormality_error(matrix: Tensor) -> float:
    """Largest entry of ``|P^T P - I|`` over a stack of matrices ``[..., width, rank]``, in float64."""
    p = matrix.double()
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    return float((p.transpose(-1, -2) @ p - eye).abs().max())


def group_width(sharing: Sharing, kv_heads: int, head_dim: int, *, keys: bool) -> tuple[int, int]:
    """``(stored groups, width)`` of a basis.

    ``tied`` is the papers' form: one basis for the keys of all heads of a layer, one per head for the values
    (EigenAttention as released, StiefAttention v1 section 3). ``pair`` and ``quad`` are groups of 2 and 4 neighbouring heads.

    Raises:
        InvalidSetting: the KV heads do not divide into such groups.
    """
    heads = kv_heads if sharing == "joint" else GROUP_HEADS[sharing]
    if kv_heads % heads:
        raise InvalidSetting(
            f"sharing {sharing!r} makes groups of {heads} KV heads, which do not divide this model's {kv_heads}"
        )
    stored = 1 if sharing == "tied" and keys else kv_heads // heads
    return stored, heads * head_dim


# ------------------------------------------------------------------------------------------- the manifold


def cholesky_qr(a: Tensor) -> Tensor:
    """Orthonormal columns with the same nested spans as ``a`` ``[..., width, rank]`` (CholeskyQR2).

    Two rounds of ``A R^-1`` with ``R`` from the Cholesky factor of ``A^T A``: batched matrix products and small triangular
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
    """Q of the QR decomposition with a positive diagonal of R, which makes it a continuous function of ``a``."""
    q, r = torch.linalg.qr(a)
    diagonal: Tensor = torch.diagonal(r, dim1=-2, dim2=-1)
    return cast(Tensor, q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2))


def polar(a: Tensor, iterations: int = 12) -> Tensor:
    """The nearest point of the manifold to ``a`` (its polar factor), by Newton-Schulz; needs ``|A^T A - I| < 1``."""
    for _ in range(iterations):
        a = 1.5 * a - 0.5 * a @ (a.transpose(-1, -2) @ a)
    return a


RETRACTIONS: dict[str, Callable[[Tensor], Tensor]] = {"cholesky": cholesky_qr, "qr": qr, "polar": polar}


def duals(matrices: Sequence[Tensor]) -> list[Tensor]:
    """``A^-T`` of square matrices ``[n, width, width]``; not finite where there is none, see :func:`cholesky_qr`.

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
    """Project a Euclidean gradient on the tangent space at ``point``: ``G - P sym(P^T G)`` (Absil et al. 2008, 3.6.1)."""
    inner = point.transpose(-1, -2) @ gradient
    return gradient - point @ (0.5 * (inner + inner.transpose(-1, -2)))
