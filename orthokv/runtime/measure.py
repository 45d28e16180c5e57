"""Bytes of a live cache, without running a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from orthokv.bases.basis import Bases, LayerBases
from orthokv.runtime.cache import Storing, both_sides, cache_bytes
from orthokv.runtime.call import Call
from orthokv.spec.codec import SIXTEEN_BIT, CodecSpec
from orthokv.spec.geometry import Geometry
from orthokv.spec.vocabulary import KeyMode


def live_bytes_per_token(
    geometry: Geometry, bases: Sequence[LayerBases], key_mode: KeyMode, codec: CodecSpec = SIXTEEN_BIT
) -> int:
    """Put one token into a real cache under a codec and count what it holds."""
    # Only sizes matter: a plain dtype of the codec's width stands for the model's own.
    dtype = torch.bfloat16 if codec.bits == 16 else torch.float32
    cache = DynamicCache()
    for index, layer_bases in enumerate(bases):
        window = geometry.window(index)
        cache.layers.append(DynamicLayer() if window is None else DynamicSlidingWindowLayer(window))
        key, value = (basis.to(dtype=dtype) for basis in both_sides(layer_bases))
        positions = torch.zeros(1, 1) if key_mode == "pre" and geometry.uses_rope(index) else None
        call = Call(Bases(key, value, (codec.name, codec.name)), tables=None, positions=positions)
        token = torch.zeros((1, geometry.kv_heads, 1, geometry.head_dim), dtype=dtype)
        Storing(cache, call).update(token, token, index)
    return cache_bytes(cache)
