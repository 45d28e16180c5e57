"""Which tokens a cache layer holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from orthokv.spec.errors import InvalidSetting
from orthokv.spec.footprint import held_tokens


@dataclass(frozen=True)
class Policy:
    """Holds the last tokens of a window (None: all), in a buffer of a fixed length (None: in one that grows).

    Layers of one policy hold the same tokens: they share their positions.
    """

    window: int | None = None
    capacity: int | None = None

    @staticmethod
    def of(layer: Any) -> Policy:
        """The policy of a stock layer.

        Raises:
            InvalidSetting: the layer is of a kind that latents cannot be stored in.
        """
        # Not isinstance: quantised and indexed layers are subclasses that keep more than keys and values.
        kind = type(layer)
        if kind is DynamicLayer:
            return Policy()
        if kind is DynamicSlidingWindowLayer:
            return Policy(window=layer.sliding_window)
        if kind is StaticLayer:
            return Policy(capacity=layer.max_cache_len)
        if kind is StaticSlidingWindowLayer:
            return Policy(window=layer.max_cache_len, capacity=layer.max_cache_len)
        raise InvalidSetting(f"a cache layer of type {kind.__name__} cannot hold latents")

    def layer(self) -> CacheLayerMixin:
        """An empty stock layer that holds these tokens."""
        if self.capacity is None:
            return DynamicLayer() if self.window is None else DynamicSlidingWindowLayer(self.window)
        if self.window is None:
            return StaticLayer(self.capacity)
        return StaticSlidingWindowLayer(self.capacity, self.window)

    def held(self, tokens: int) -> int:
        """For how many tokens there is room in a cache that has seen `tokens`: what its size depends on."""
        return held_tokens(self.window, tokens) if self.capacity is None else self.capacity
