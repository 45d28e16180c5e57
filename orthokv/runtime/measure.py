"""Bytes of a live cache, without running a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from orthokv.bases.basis import LayerBases
from orthokv.runtime.cache import adopt_layer, cache_bytes
from orthokv.spec.codec import SIXTEEN_BIT, CodecSpec
from orthokv.spec.geometry import Geometry
from orthokv.spec.vocabulary import KeyMode


def live_bytes_per_token(
    geometry: Geometry, bases: Sequence[LayerBases], key_mode: KeyMode, codec: CodecSpec = SIXTEEN_BIT
) -> int:
    """Put one token into a real cache under a codec and count what it holds."""
    # Only sizes matter: a plain dtype of the codec's width stands for what a model would hand over.
    stored = torch.bfloat16 if codec.bits == 16 else torch.float32
    cache = DynamicCache()
    shape = (1, geometry.kv_heads, 1, geometry.head_dim)
    for index, layer_bases in enumerate(bases):
        window = geometry.window(index)
        cache.layers.append(DynamicLayer() if window is None else DynamicSlidingWindowLayer(window))
        positions = key_mode == "pre" and geometry.uses_rope(index)
        layer = adopt_layer(cache, index, layer_bases, positions=positions)
        layer.pending_positions = torch.zeros(1, 1) if positions else None
        layer.store(torch.zeros(shape), torch.zeros(shape), stored)
    return cache_bytes(cache)
