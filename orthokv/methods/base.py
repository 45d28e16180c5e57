"""The contract of a method: from a layer to two full-rank, ordered bases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from orthokv.attention import Bases
from orthokv.basis import Basis, Sharing, group_width
from orthokv.capture import LayerView


@dataclass(frozen=True)
class FittedBases:
    """A layer's key and value bases at full rank, float32; any smaller rank is a prefix of their columns.

    ``history`` holds what the fit observed (losses by step), for reports; ``spectrum_key`` and ``spectrum_value`` the
    singular values of the activations per group where the method computes them (``[groups, width]``, descending).
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

    A method is a small frozen dataclass whose fields are its hyper-parameters. ``fit`` must not depend on other layers or
    on global random state: the same view and seed give the same bases.
    """

    name: ClassVar[str]
    learned: ClassVar[bool]
    # Steps of :mod:`orthokv.refine` that belong to the method where nothing else is asked for.
    refine_steps: ClassVar[int]

    def fit(self, view: LayerView, sharing: Sharing, seed: int) -> FittedBases: ...


def grouped_moment(view: LayerView, sharing: Sharing, name: str) -> Tensor:
    """Second moment of the keys or values per stored group: ``[stored groups, width, width]``, float64."""
    geometry = view.geometry
    keys = name == "key"
    stored, width = group_width(sharing, geometry.kv_heads, geometry.head_dim, keys=keys)
    if width == geometry.kv_width and stored == 1 and sharing == "joint":
        return (view.moments.key if keys else view.moments.value).unsqueeze(0)
    blocks = view.moments.per_head(name)
    return blocks.sum(0, keepdim=True) if stored == 1 else blocks


def block_diagonal(blocks: Tensor) -> Tensor:
    """``[heads, d, d]`` -> ``[1, heads * d, heads * d]``."""
    heads, d, _ = blocks.shape
    joint = blocks.new_zeros(heads, d, heads, d)
    joint[range(heads), :, range(heads)] = blocks
    return joint.view(1, heads * d, heads * d)


def query_moment(view: LayerView, sharing: Sharing) -> Tensor:
    """Second moment of the queries that read each group's keys: how strongly each direction of the keys is read.

    ``[stored groups, width, width]``, float64. Queries of different KV heads never meet, so a joint group has one block a head.
    """
    query = view.moments.query
    if sharing == "joint":
        return block_diagonal(query)
    return query.sum(0, keepdim=True) if sharing == "tied" else query


def descending_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices, largest first, signs fixed (largest entry of a column positive)."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(-1), vectors.flip(-1)
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    return values.clamp_min(0), vectors * vectors.gather(-2, largest).sign()
