"""Second moments of a layer's queries, keys and values over the calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orthokv.fit.walk import LayerWalk
from orthokv.runtime.seam import Seam
from orthokv.spec.geometry import Geometry


@dataclass(frozen=True)
class LayerMoments:
    """Second moments of one layer over the calibration tokens, float64, on the model's device.

    Attributes:
        tokens: calibration tokens seen.
        key: `[kv_width, kv_width]`, all KV heads concatenated; before or after RoPE as the seam's key mode says.
        value: `[kv_width, kv_width]`.
        query: `[kv_heads, head_dim, head_dim]`, summed over the query heads that read a KV head.
        key_mean, value_mean: `[kv_width]`.
    """

    tokens: int
    key: Tensor
    value: Tensor
    query: Tensor
    key_mean: Tensor
    value_mean: Tensor


@torch.no_grad()
def run_and_measure(walk: LayerWalk, seam: Seam, layer: int, blocks: int) -> LayerMoments:
    """Run one layer uncompressed and collect its moments over the first `blocks` blocks on the way."""
    collector = _Collector(seam.geometry, walk.device)
    seam.observe(layer, collector)
    try:
        walk.through(layer, walk.inputs[:blocks], walk.outputs[:blocks], range(blocks))
    finally:
        seam.observe(layer, None)
    if blocks < len(walk.inputs):
        others = range(blocks, len(walk.inputs))
        walk.through(layer, walk.inputs[blocks:], walk.outputs[blocks:], others)
    return collector.moments()


class _Collector:
    """Sums outer products in float64, batch by batch, on the model's device."""

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        width, heads, head_dim = geometry.kv_width, geometry.kv_heads, geometry.head_dim
        self.tokens = 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.sums = {name: zeros(width, width) for name in ("key", "value")}
        self.query = zeros(heads, head_dim, head_dim)
        self.means = {name: zeros(width) for name in ("key", "value")}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        batch, heads, tokens, head_dim = key.shape
        self.tokens += batch * tokens
        for name, x in (("key", key), ("value", value)):
            rows = x.transpose(1, 2).reshape(batch * tokens, heads * head_dim).double()
            self.sums[name] += rows.T @ rows
            self.means[name] += rows.sum(0)
        rows = query.transpose(0, 1).reshape(heads, -1, head_dim).double()
        self.query += rows.transpose(1, 2) @ rows

    def moments(self) -> LayerMoments:
        def mean(total: Tensor) -> Tensor:
            return total / max(self.tokens, 1)

        return LayerMoments(
            tokens=self.tokens,
            key=mean(self.sums["key"]),
            value=mean(self.sums["value"]),
            query=mean(self.query),
            key_mean=mean(self.means["key"]),
            value_mean=mean(self.means["value"]),
        )
