"""Closed-form bases that weigh an error by what reads it: queries for keys, the output projection for values.

For keys `sum ||q (k - k')||^2 = tr(S_q (I - P)^T C_k (I - P))` with `S_q` the second moment of the queries that read a
head: the optimum is found in the whitened space `y = k S_q^(1/2)`, where it is a plain PCA (KQ-SVD, arXiv 2512.05916, in
covariance form). For values the weighting is `W_O W_O^T` per KV head. The result is an oblique pair:
`E = M^(1/2) U`, `D = M^(-1/2) U`.

With `sharing="head"` this *is* KQ-SVD: `K E D^T Q^T` is the best approximation of `K Q^T` of its rank, and likewise for
`V W_O`, up to the damping below. Where several query heads read one KV head, all of them count, stacked; KQ-SVD's released
code averages their `W_O` instead. It works after RoPE (`key_mode="post"`).

Where several heads share one basis for their keys (`tied`), moments and weightings are pooled over the heads before: an
approximation, since the exact objective would keep each head's keys with its own queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orthokv.bases.basis import Basis
from orthokv.fit.methods.base import (
    FittedBases,
    block_diagonal,
    descending_eigh,
    grouped_moment,
    query_moment,
)
from orthokv.fit.task import LayerView
from orthokv.spec.methods import WeightedSettings
from orthokv.spec.sharing import group_width
from orthokv.spec.vocabulary import Sharing

# Directions that nothing reads would make the square root singular; they keep this share of the mean weight.
_DAMPING = 1e-4


@dataclass(frozen=True)
class Whitened:
    """The closed form of one side, with the square roots that lead to and from the whitened space (float64)."""

    root: Tensor  # M^(1/2) [stored groups, width, width]
    inverse_root: Tensor
    vectors: Tensor  # U [stored groups, width, width], best directions first


def value_weighting(view: LayerView, sharing: Sharing) -> Tensor:
    """How strongly the output projection reads each direction of the values: `[stored groups, width, width]`."""
    geometry = view.geometry
    heads, head_dim = geometry.kv_heads, geometry.head_dim
    per_query_head = view.output_weight.T.reshape(heads, geometry.heads // heads, head_dim, -1)
    blocks = (per_query_head @ per_query_head.transpose(-1, -2)).sum(1)
    _, width = group_width(sharing, heads, head_dim, keys=False)
    return block_diagonal(blocks, width // head_dim)


def whiten(moment: Tensor, weighting: Tensor) -> Whitened:
    """PCA of `x M^(1/2)` for `x` with the given second moment."""
    values, vectors = torch.linalg.eigh(weighting)
    values = values.clamp_min(0)
    mean = values.mean(-1, keepdim=True)
    # A head that nothing reads has no weights at all: its errors then count alike.
    values = torch.where(mean > 0, values + _DAMPING * mean, 1.0)
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)
    inverse_root = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)
    _, best = descending_eigh(root @ moment @ root)
    return Whitened(root, inverse_root, best)


def whitened_layer(view: LayerView, sharing: Sharing) -> tuple[Whitened, Whitened]:
    """The closed forms of a layer's keys and values."""
    return (
        whiten(grouped_moment(view, sharing, "key"), query_moment(view, sharing)),
        whiten(grouped_moment(view, sharing, "value"), value_weighting(view, sharing)),
    )


@dataclass(frozen=True)
class Weighted(WeightedSettings):
    """Query- and output-weighted closed form: seconds a model, no learning, an oblique pair."""

    def fit(self, view: LayerView, sharing: Sharing, seed: int) -> FittedBases:
        geometry = view.geometry

        def basis(side: Whitened) -> Basis:
            encoder, decoder = side.root @ side.vectors, side.inverse_root @ side.vectors
            # Only the product matters; equal column norms keep latents within the range of 16-bit formats.
            scale = (decoder.norm(dim=-2, keepdim=True) / encoder.norm(dim=-2, keepdim=True)).sqrt()
            return Basis(
                (encoder * scale).float(), (decoder / scale).float(), geometry.kv_heads, geometry.head_dim
            )

        key, value = whitened_layer(view, sharing)
        return FittedBases(basis(key), basis(value), {})
