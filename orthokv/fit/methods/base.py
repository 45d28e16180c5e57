"""The contract of a method: from a layer to two full-rank, ordered bases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from orthokv.bases.basis import Bases, Basis
from orthokv.fit.task import LayerView
from orthokv.spec.sharing import group_width
from orthokv.spec.vocabulary import Sharing


@dataclass(frozen=True)
class FittedBases:
    """A layer's key and value bases at full rank, float32; any smaller rank is a prefix of their columns.

    `history` holds what the fit observed (losses by step), for reports; `spectrum_key` and `spectrum_value` the
    singular values of the activations per group where the method computes them (`[groups, width]`, descending).
    """

    key: Basis
    value: Basis
    history: dict[str, Any]
    spectrum_key: Tensor | None = None
    spectrum_value: Tensor | None = None

    def stored(self) -> FittedBases:
        """As a profile keeps them: on the CPU, in plain memory order, wherever the method computed them."""
        spectra = (None if s is None else s.cpu() for s in (self.spectrum_key, self.spectrum_value))
        return FittedBases(
            self.key.to("cpu").contiguous(), self.value.to("cpu").contiguous(), self.history, *spectra
        )

    def bases(self, rank_key: int, rank_value: int) -> Bases:
        return Bases(self.key.truncate(rank_key), self.value.truncate(rank_value))


class Method(Protocol):
    """Fits one layer.

    A method is a frozen dataclass: its settings (`orthokv.spec.methods`) with a fit. `fit` must not depend on other layers or
    on global random state: the same view and seed give the same bases.
    """

    name: ClassVar[str]

    def fit(self, view: LayerView, sharing: Sharing, seed: int) -> FittedBases: ...


def grouped_moment(view: LayerView, sharing: Sharing, name: str) -> Tensor:
    """Second moment of the keys or values per stored group: `[stored groups, width, width]`, float64."""
    geometry = view.geometry
    keys = name == "key"
    stored, width = group_width(sharing, geometry.kv_heads, geometry.head_dim, keys=keys)
    groups = diagonal_groups(view.moments.key if keys else view.moments.value, width)
    return groups if len(groups) == stored else groups.sum(0, keepdim=True)


def diagonal_groups(joint: Tensor, width: int) -> Tensor:
    """The blocks on the diagonal of a joint moment `[n, n]`, one a group: `[n // width, width, width]`."""
    groups = len(joint) // width
    blocks = joint.view(groups, width, groups, width).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).contiguous()


def block_diagonal(blocks: Tensor, heads: int | None = None) -> Tensor:
    """`[kv_heads, d, d]` -> `[groups, heads * d, heads * d]`: `heads` neighbours are a group (None: all of them)."""
    count, d, _ = blocks.shape
    heads = count if heads is None else heads
    every = range(heads)
    groups = blocks.new_zeros(heads, heads, count // heads, d, d)
    groups[every, every] = blocks.view(-1, heads, d, d).transpose(0, 1)
    return groups.permute(2, 0, 3, 1, 4).reshape(-1, heads * d, heads * d)


def query_moment(view: LayerView, sharing: Sharing) -> Tensor:
    """Second moment of the queries that read each group's keys: how strongly each direction of the keys is read.

    `[stored groups, width, width]`, float64. Queries of different KV heads never meet, so a group has one block a head.
    """
    geometry, query = view.geometry, view.moments.query
    stored, width = group_width(sharing, geometry.kv_heads, geometry.head_dim, keys=True)
    groups = block_diagonal(query, width // geometry.head_dim)
    return groups if len(groups) == stored else groups.sum(0, keepdim=True)


def descending_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices, largest first, signs fixed (largest entry of a column positive)."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(-1), vectors.flip(-1)
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    return values.clamp_min(0), vectors * vectors.gather(-2, largest).sign()
