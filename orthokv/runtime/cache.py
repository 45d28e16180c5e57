"""Cache layers that hold latents and nothing else.

The empty layer of whatever cache is passed in is exchanged for a `LatentLayer` at its first use, so `DynamicCache()`, beams,
assisted decoding and static caches work unchanged. A latent layer holds four things: a stock layer, which keeps rows where
it would have kept heads; the codecs that pack them; the policy that says which tokens stay; and, for keys cached before
RoPE, the book of their positions. Bases are brought by each call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from orthokv.bases.basis import Basis, LayerBases
from orthokv.runtime.attend import Held
from orthokv.runtime.blocks import BlockLayer, block_of, refuse_cut
from orthokv.runtime.call import Call
from orthokv.runtime.codecs import Codec, codec_of
from orthokv.runtime.policy import Policy
from orthokv.runtime.positions import PositionBook, book_of, books_of
from orthokv.spec.errors import InvalidSetting


class LatentLayer(CacheLayerMixin):
    """One layer of a cache, holding latents.

    Attributes:
        identity: of the bases that it was filled with.
        widths: groups and rank of keys and of values.
        codecs: likewise.
        stock: holds their rows; a `BlockLayer` where a row is more than a token.
        book: the positions of its tokens; None where keys need none.
    """

    def __init__(self, index: int, bases: LayerBases, policy: Policy, dtype: torch.dtype) -> None:
        # Not the base class's own: it sets keys and values, which are the stock layer's.
        self.index = index
        self.identity = bases.identity
        self.widths = tuple((basis.groups, basis.rank) for basis in both_sides(bases))
        key, value = bases.codecs
        self.codecs: tuple[Codec, Codec] = (codec_of(key, dtype), codec_of(value, dtype))
        self.policy = policy
        self.block = block_of(*self.codecs)
        if policy != Policy():
            refuse_cut(self.block, "a cache with a window or of a fixed length")
        self.stock: Any = (
            policy.layer() if self.block == 1 else BlockLayer(*self.codecs, codec_of("16-bit", dtype))
        )
        self.book: PositionBook | None = None

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        call: Call | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Hold `[B, kv_heads, T, head_dim]` as latents and note on the call what is held now.

        Raises:
            InvalidSetting: nothing was handed over by a call: the model has no bases.
        """
        if call is None:
            raise InvalidSetting("this cache holds latents, but the model that uses it has no bases attached")
        key, value = both_sides(call.bases)
        if self.book is not None:
            if self.book.owner == self.index:
                assert call.positions is not None
                self.book.push(call.positions, key_states.shape[0])
            call.held_positions = self.book.visible
        call.keys, call.values = self._hold(key, value, key.encode(key_states), value.encode(value_states))
        # The attention function takes what the call holds. What the module hands on to it stands for as many tokens, with
        # nothing in it: whoever took it for keys would not go far.
        stand_in = key_states.new_empty((*key_states.shape[:2], call.keys.tokens, 0))
        return stand_in, stand_in

    def _hold(self, key: Basis, value: Basis, new_key: Tensor, new_value: Tensor) -> tuple[Held, Held]:
        if self.block == 1:
            packed = (self.codecs[0].pack(new_key), self.codecs[1].pack(new_value))
            rows, waiting = self.stock.update(*packed), (None, None)
        else:
            waiting = self.stock.update(new_key, new_value)
            rows = self.stock.packed or (None, None)
        return (
            Held(key, self.codecs[0], rows[0], waiting[0]),
            Held(value, self.codecs[1], rows[1], waiting[1]),
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for a batch of such keys and values ahead of time."""
        empty = (
            like.new_empty(like.shape[0], groups, 0, rank)
            for like, (groups, rank) in zip((key_states, value_states), self.widths, strict=True)
        )
        if self.block == 1:
            empty = (codec.pack(z) for codec, z in zip(self.codecs, empty, strict=True))
        self.stock.lazy_initialization(*empty)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is held between two steps, but for positions."""
        held = (self.keys, self.values, *(getattr(self.stock, "packed", None) or ()))
        return (tensor for tensor in held if tensor is not None)

    # What `transformers` reads is the stock layer's.

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return cast("Tensor | None", self.stock.keys)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return cast("Tensor | None", self.stock.values)

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return bool(self.stock.is_initialized)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return bool(self.stock.is_compileable)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return bool(self.stock.is_croppable) and self.block == 1

    @property
    def is_sliding(self) -> bool:
        return bool(self.stock.is_sliding)

    @property
    def record_past(self) -> bool:
        return bool(self.stock.record_past)

    @record_past.setter
    def record_past(self, recording: bool) -> None:
        for layer in self._layers():
            layer.record_past = recording

    def __getattr__(self, name: str) -> Any:
        # Reached for what is defined neither here nor above: `device`, `batch_size`, `max_cache_len` and their like exist
        # where the stock layer has them. While a copy is made there is no stock layer yet.
        if name == "stock":
            raise AttributeError(name)
        return getattr(self.stock, name)

    def _layers(self) -> tuple[Any, ...]:
        """The stock layers that this one looks after: its own, and its book's if it is the owner."""
        if self.book is not None and self.book.owner == self.index:
            return self.stock, self.book.layer
        return (self.stock,)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return cast("tuple[int, int]", self.stock.get_mask_sizes(query_length))

    def get_seq_length(self) -> int:
        return cast(int, self.stock.get_seq_length())

    def get_max_length(self) -> int:
        return cast(int, self.stock.get_max_length())

    def activate_past_recording(self) -> None:
        if hasattr(self, "record_past"):
            self.record_past = True

    def offload(self) -> None:
        for layer in self._layers():
            layer.offload()

    def prefetch(self) -> None:
        for layer in self._layers():
            layer.prefetch()

    def reset(self) -> None:
        for layer in self._layers():
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self._layers():
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for layer in self._layers():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self._layers():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self._layers():
            layer.batch_select_indices(indices)


def both_sides(bases: LayerBases | None) -> tuple[Basis, Basis]:
    """The bases of keys and of values.

    Raises:
        InvalidSetting: one of them is missing.
    """
    if bases is None or bases.key is None or bases.value is None:
        raise InvalidSetting("a cache is filled with latents of keys and of values: this layer lacks a basis")
    return bases.key, bases.value


def adopt_layer(cache: Cache, index: int, bases: LayerBases, dtype: torch.dtype, *, positions: bool) -> None:
    """Exchange layer `index` of `cache` for a latent one that holds the same tokens, if it still is empty.

    Args:
        dtype: of the keys and values that will be stored.
        positions: whether they are kept with them.

    Raises:
        InvalidSetting: the layer holds uncompressed tokens, belongs to another compressed model, or is of a kind that
            latents cannot be stored in.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]
    if isinstance(layer, LatentLayer):
        names = tuple(codec.name for codec in layer.codecs)
        if (layer.identity, names) != (bases.identity, bases.codecs):
            raise InvalidSetting("this cache was filled by another compressed model or an earlier attachment")
        return
    policy = Policy.of(layer)
    if layer.get_seq_length() > 0:
        raise InvalidSetting("this cache already holds uncompressed keys and values")
    # Built afresh, as `generate` may have sized the given layer ahead of time for the full head dimension.
    latent = LatentLayer(index, bases, policy, dtype)
    if positions:
        latent.book = book_of(cache, index, policy)
    if getattr(layer, "record_past", False):
        latent.record_past = True
    cache.layers[index] = latent


@dataclass
class Storing:
    """Stands in for a cache during one call of an attention module: what is stored goes with what the call brings."""

    cache: Cache
    call: Call

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        bases, positions = self.call.bases, self.call.positions is not None
        assert bases is not None
        adopt_layer(self.cache, layer_idx, bases, key_states.dtype, positions=positions)
        # Through the cache itself, which may offload its layers.
        return self.cache.update(key_states, value_states, layer_idx, *args, call=self.call, **kwargs)


def cached_tensors(cache: Cache) -> Iterator[Tensor]:
    """Every tensor that a cache keeps between two steps."""
    layers: list[Any] = [*cache.layers, *(book.layer for book in books_of(cache).values())]
    for layer in layers:
        if isinstance(layer, LatentLayer):
            yield from layer.tensors()
        else:
            yield from (tensor for tensor in (layer.keys, layer.values) if tensor is not None)


def cache_bytes(cache: Cache) -> int:
    """Bytes that a live cache holds, latents and positions alike."""
    return sum(tensor.numel() * tensor.element_size() for tensor in cached_tensors(cache))
