"""Bases for keys and values: what is stored per layer, and the manifold they live on.

A basis maps the heads of one *group* to a latent and back. With `x` a row of `width` numbers (the concatenated heads
of the group), `z = x E` is cached and `x' = z D^T` stands in for `x`. A point of the Stiefel manifold has `E = D`
with orthonormal columns; an *oblique* pair has two matrices (the closed-form optimum under a weighting is one).
Columns are ordered: the first `r` columns are the basis of rank `r`.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from orthokv.spec.errors import InvalidSetting


@dataclass(frozen=True)
class Basis:
    """Encoder and decoder of the keys, or of the values, of one layer.

    Attributes:
        encoder: `[stored groups, width, rank]`, floating point.
        decoder: same shape; the same tensor object as `encoder` for an orthonormal basis.
        kv_heads: KV heads of the layer. `width / head_dim` of them share a group.
        head_dim: numbers per head.

    `stored groups` is 1 where every group uses the same matrices (`tied`) or there is one (`joint`), else the number of
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
        """`[B, kv_heads, T, head_dim]` -> `[B, groups, T, rank]`."""
        batch, _, tokens, _ = x.shape
        heads = self.width // self.head_dim
        if heads > 1:
            x = x.view(batch, self.groups, heads, tokens, self.head_dim).transpose(2, 3)
            x = x.reshape(batch, self.groups, tokens, self.width)
        return x @ self.encoder

    def decode(self, z: Tensor) -> Tensor:
        """`[B, groups, T, rank]` -> `[B, kv_heads, T, head_dim]`."""
        batch, _, tokens, _ = z.shape
        x = z @ self.decoder.transpose(-1, -2)
        heads = self.width // self.head_dim
        if heads > 1:
            x = x.view(batch, self.groups, tokens, heads, self.head_dim).transpose(2, 3)
            x = x.reshape(batch, self.kv_heads, tokens, self.head_dim)
        return x

    def decoder_per_head(self) -> Tensor:
        """The rows of the decoder that belong to each KV head: `[kv_heads, head_dim, rank]`."""
        if self.width == self.head_dim:
            return self.decoder.expand(self.kv_heads, -1, -1)
        return self.decoder.reshape(self.kv_heads, self.head_dim, self.rank)

    def query_to_latent(self, query: Tensor) -> Tensor:
        """`[B, H, T, head_dim]` -> `[B, H, T, rank]`, so that `query . decode(z) = result . z`."""
        batch, heads, tokens, _ = query.shape
        grouped = query.reshape(batch, self.kv_heads, -1, self.head_dim)
        return (grouped @ self.decoder_per_head()).view(batch, heads, tokens, self.rank)

    def output_from_latent(self, output: Tensor) -> Tensor:
        """`[B, T, H, rank]` -> `[B, T, H, head_dim]`: attention over latents, lifted by the value basis."""
        batch, tokens, heads, _ = output.shape
        grouped = output.view(batch, tokens, self.kv_heads, heads // self.kv_heads, self.rank)
        lifted = grouped @ self.decoder_per_head().transpose(-1, -2)
        return lifted.reshape(batch, tokens, heads, self.head_dim)

    def truncate(self, rank: int) -> Basis:
        """The basis of the first `rank` columns.

        Raises:
            InvalidSetting: `rank` is not between 1 and the present rank.
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


class LayerBases(Protocol):
    """What the seam reads of a layer's bases. `None` leaves the keys, or the values, as they are."""

    @property
    def key(self) -> Basis | None: ...

    @property
    def value(self) -> Basis | None: ...

    @property
    def codecs(self) -> tuple[str, str]:
        """The names of the codecs by which latents of keys and of values are stored."""

    @property
    def identity(self) -> str:
        """What a cache knows the bases by that it was filled with: equal for bases of one checkpoint, in every process."""


NATIVE = ("native", "native")


def _own_identity() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Bases:
    """The bases of a layer, keys and values both. Without a checkpoint, each has an identity of its own."""

    key: Basis
    value: Basis
    codecs: tuple[str, str] = NATIVE
    identity: str = field(default_factory=_own_identity, compare=False, repr=False)


@dataclass(frozen=True)
class PartialBases:
    """One side of a layer or none, while fitting; what is None stays as it is. No cache is filled by them."""

    key: Basis | None
    value: Basis | None
    codecs: tuple[str, str] = NATIVE
    identity: str = field(default_factory=_own_identity, compare=False, repr=False)
