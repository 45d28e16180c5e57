"""Cache layers that store latents and nothing else.

:class:`LatentLayer` is mixed in front of a stock cache layer of ``transformers``: it encodes keys and values and hands the
stock class tensors that are merely narrower. The empty layer of whatever cache is passed in is exchanged at its first use,
so ``DynamicCache()``, beams, assisted decoding and static caches work unchanged.

Keys cached before RoPE need their positions again. They are kept once per kind of layer and cache (int32, 4 bytes a token
and sequence), not once per layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from orthokv.spec.errors import InvalidSetting

if TYPE_CHECKING:
    from orthokv.bases.basis import LayerBases

    _StockLayer = DynamicLayer
else:
    # The mixin itself has no stock base: which class is behind it depends on the cache that is adopted.
    _StockLayer = object


class PositionBook:
    """Positions of all cached tokens, shared by the layers of one cache that keep the same tokens.

    They are kept in a stock layer of the same kind, one number a token where keys have a head, so that windows, crops, beams
    and fixed buffers treat both alike. Only the ``owner`` (the first such layer) writes; the others read what it wrote in
    the same forward.
    """

    def __init__(self, owner: int, layer: _StockLayer) -> None:
        self.owner = owner
        self.layer = layer
        self.visible: Tensor | None = None  # int32 [B, tokens attended to in this forward]

    def push(self, new: Tensor, batch: int) -> None:
        """Append ``new`` ``[1 or B, T]``."""
        new = new.to(torch.int32).expand(batch, -1)[:, None, :, None]
        self.visible = self.layer.update(new, new[..., :0])[0][:, 0, :, 0]


class _BasesRef:
    """Holds a layer's bases so that a deep copy of a cache (prefix reuse) shares them instead of copying weights."""

    def __init__(self, bases: LayerBases) -> None:
        self.bases = bases

    def __deepcopy__(self, memo: dict[int, Any]) -> _BasesRef:
        return self


class LatentLayer(_StockLayer):
    """Put in front of a stock cache layer class, which then never sees the full head dimension."""

    _ref: _BasesRef
    _index: int
    book: PositionBook | None
    pending_positions: Tensor | None
    # Set by the seam before each update: a model without the seam must not take latents for keys.
    expected: bool

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.expected:
            raise InvalidSetting("this cache holds latents, but the model that uses it has no bases attached")
        self.expected = False
        dtype = self._ref.bases.store_dtype or key_states.dtype
        return self.store(key_states, value_states, dtype, *args, **kwargs)

    def store(
        self, key_states: Tensor, value_states: Tensor, dtype: torch.dtype, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Encode ``[B, kv_heads, T, head_dim]`` and keep the latents in ``dtype``; returns all latents attended to."""
        bases = self._ref.bases
        assert bases.key is not None
        assert bases.value is not None
        if (book := self._own_book) is not None:
            assert self.pending_positions is not None
            book.push(self.pending_positions, key_states.shape[0])
        self.pending_positions = None
        return super().update(
            bases.key.encode(key_states).to(dtype),
            bases.value.encode(value_states).to(dtype),
            *args,
            **kwargs,
        )

    @property
    def _own_book(self) -> PositionBook | None:
        return self.book if self.book is not None and self.book.owner == self._index else None

    def positions(self) -> Tensor:
        """Positions ``[B, S]`` of every attended token, int32."""
        assert self.book is not None
        assert self.book.visible is not None
        return self.book.visible

    def reset(self) -> None:
        super().reset()
        if (book := self._own_book) is not None:
            book.layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if (book := self._own_book) is not None:
            book.layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        if (book := self._own_book) is not None:
            book.layer.reorder_cache(cast(torch.LongTensor, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if (book := self._own_book) is not None:
            book.layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if (book := self._own_book) is not None:
            book.layer.batch_select_indices(indices)


class LatentDynamicLayer(LatentLayer, DynamicLayer):
    """Grows with every token."""


class LatentSlidingLayer(LatentLayer, DynamicSlidingWindowLayer):
    """Keeps the last ``sliding_window - 1`` tokens."""

    def activate_past_recording(self) -> None:
        self.record_past = True
        if (book := self._own_book) is not None:
            cast(DynamicSlidingWindowLayer, book.layer).record_past = True


class LatentStaticLayer(LatentLayer, StaticLayer):
    """Allocated once at full length."""


class LatentStaticSlidingLayer(LatentLayer, StaticSlidingWindowLayer):
    """Allocated once at the length of its window."""


_LATENT_CLASS: dict[type, type[LatentLayer]] = {
    DynamicLayer: LatentDynamicLayer,
    DynamicSlidingWindowLayer: LatentSlidingLayer,
    StaticLayer: LatentStaticLayer,
    StaticSlidingWindowLayer: LatentStaticSlidingLayer,
}


def adopt_layer(cache: Cache, index: int, bases: LayerBases, *, positions: bool) -> LatentLayer:
    """Exchange layer ``index`` of ``cache`` for a latent one of the same kind, if it still is empty.

    Raises:
        InvalidSetting: the layer holds uncompressed tokens, belongs to another compressed model, or is of a kind that
            latents cannot be stored in.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]
    if isinstance(layer, LatentLayer):
        if layer._ref.bases is not bases:
            raise InvalidSetting("this cache was filled by another compressed model or an earlier attachment")
        return layer
    kind = _LATENT_CLASS.get(type(layer))
    if kind is None:
        raise InvalidSetting(f"a cache layer of type {type(layer).__name__} cannot hold latents")
    if layer.get_seq_length() > 0:
        raise InvalidSetting("this cache already holds uncompressed keys and values")
    # `generate` may have sized a static layer ahead of time, for the full head dimension.
    layer.keys = layer.values = None
    layer.is_initialized = False
    latent = object.__new__(kind)
    latent.__dict__.update(layer.__dict__)
    latent._ref, latent._index = _BasesRef(bases), index
    latent.pending_positions, latent.expected = None, False
    latent.book = _book(cache, index, layer) if positions else None
    cache.layers[index] = latent
    return latent


def _book(cache: Cache, index: int, layer: Any) -> PositionBook:
    """The book that layers of this kind share: they keep the same tokens, so one copy of the positions serves all."""
    books: dict[tuple[Any, ...], PositionBook] = cache.__dict__.setdefault("_orthokv_books", {})
    kind = (type(layer), getattr(layer, "sliding_window", None), getattr(layer, "max_cache_len", None))
    if kind not in books:
        books[kind] = PositionBook(index, copy.deepcopy(layer))
    return books[kind]


def cached_tensors(cache: Cache) -> Iterator[Tensor]:
    """Every tensor that a cache keeps between two steps."""
    layers: list[Any] = cache.layers
    for layer in layers:
        for tensor in (layer.keys, layer.values):
            if tensor is not None:
                yield tensor
    for book in cache.__dict__.get("_orthokv_books", {}).values():
        if book.layer.keys is not None:
            yield book.layer.keys


def cache_bytes(cache: Cache) -> int:
    """Bytes that a live cache holds, latents and positions alike."""
    return sum(tensor.numel() * tensor.element_size() for tensor in cached_tensors(cache))
