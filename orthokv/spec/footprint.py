"""Bytes of a cache: the one owner of them. Integers only; everybody who needs a size asks here.

A live cache is counted tensor by tensor (`orthokv.runtime.cache.cache_bytes`), which is the test of these formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orthokv.spec.codec import EXACT_BYTES, SIXTEEN_BIT, CodecSpec
from orthokv.spec.geometry import Geometry
from orthokv.spec.vocabulary import KeyMode

# Keys cached before RoPE need their position again: an int32 a token and sequence, once for each kind of layer.
POSITION_BYTES = 4


def held_tokens(window: int | None, tokens: int) -> int:
    """How many of `tokens` a layer's cache still holds; a window of W keeps W - 1, as the next token completes it."""
    return tokens if window is None else min(tokens, window - 1)


@dataclass(frozen=True)
class SidePlan:
    """What is stored of the keys, or of the values, of one layer: `rank` numbers a token in each of `groups`."""

    rank: int
    groups: int
    codec: CodecSpec = SIXTEEN_BIT

    @property
    def token_bytes(self) -> int:
        """Bytes that one more packed token takes; of a codec with larger blocks, its share of one, rounded up."""
        return self.groups * -(-self.codec.row_bytes(self.rank) // self.codec.block)


@dataclass(frozen=True)
class LayerPlan:
    """What is stored of one layer."""

    key: SidePlan
    value: SidePlan

    @property
    def ranks(self) -> tuple[int, int]:
        return self.key.rank, self.value.rank

    @property
    def token_bytes(self) -> int:
        return self.key.token_bytes + self.value.token_bytes


@dataclass(frozen=True)
class Footprint:
    """Bytes of the cache of one sequence."""

    geometry: Geometry
    key_mode: KeyMode

    def layer_bytes(self, index: int, layer: LayerPlan, tokens: int = 1) -> int:
        """Keys and values of one layer after `tokens`, of which a sliding window holds the last ones."""
        held = held_tokens(self.geometry.window(index), tokens)
        width = self.geometry.kv_width
        return sum(
            side.groups * side.codec.stored_bytes(side.rank, held, width // side.groups)
            for side in (layer.key, layer.value)
        )

    def fixed(self, tokens: int = 1) -> int:
        """Positions of `tokens` tokens, which keys cached before RoPE need: one copy for each window."""
        if self.key_mode != "pre":
            return 0
        held = (held_tokens(window, tokens) for window in self.geometry.rotated_windows())
        return POSITION_BYTES * sum(held)

    def cache_bytes(self, layers: Sequence[LayerPlan], tokens: int = 1) -> int:
        """The whole cache after `tokens`."""
        return self.fixed(tokens) + sum(
            self.layer_bytes(index, layer, tokens) for index, layer in enumerate(layers)
        )

    def dense(self, tokens: int = 1) -> int:
        """The uncompressed 16-bit cache after `tokens`."""
        held = sum(held_tokens(self.geometry.window(index), tokens) for index in range(self.geometry.layers))
        return held * 2 * self.geometry.kv_width * EXACT_BYTES


def dense_bytes(geometry: Geometry) -> int:
    """Bytes that one token adds to the uncompressed 16-bit cache of the whole model, while no window is full."""
    return geometry.layers * 2 * geometry.kv_width * EXACT_BYTES
