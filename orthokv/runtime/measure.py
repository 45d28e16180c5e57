"""Bytes of a live cache, without running a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache

from orthokv.attention import LayerBases
from orthokv.basis import KeyMode
from orthokv.geometry import AttentionGeometry
from orthokv.runtime.cache import adopt_layer, cache_bytes


def live_bytes_per_token(
    geometry: AttentionGeometry, bases: Sequence[LayerBases], key_mode: KeyMode, *, tokens: int = 8
) -> int:
    """Fill a real cache with ``tokens`` tokens in 16 bits and count what it holds."""
    cache = DynamicCache()
    shape = (1, geometry.kv_heads, tokens, geometry.head_dim)
    positions = key_mode == "pre" and geometry.rope is not None
    for index, layer_bases in enumerate(bases):
        layer = adopt_layer(cache, index, layer_bases, positions=positions)
        layer.pending_positions = torch.arange(tokens).unsqueeze(0) if positions else None
        # Only sizes matter: a plain bfloat16 tensor stands for what a 16-bit model would hand over.
        layer.store(
            torch.zeros(shape, dtype=torch.float32), torch.zeros(shape, dtype=torch.float32), torch.bfloat16
        )
    return cache_bytes(cache) // tokens
