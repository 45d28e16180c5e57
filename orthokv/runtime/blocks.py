"""Codecs that pack several tokens together.

Tokens wait in an ordinary growing layer, in 16 bits, until they fill a block; whole blocks are packed and stay packed. What
moves sequences (beams, batches) moves blocks and waiting tokens alike. What takes single tokens away can only do so where no
block is cut; `refuse_cut` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from orthokv.runtime.codecs import Codec
from orthokv.spec.errors import InvalidSetting


def block_of(*codecs: Codec) -> int:
    """Tokens after which every one of the codecs has filled its blocks."""
    return math.lcm(*(codec.block for codec in codecs))


def refuse_cut(block: int, what: str) -> None:
    """Refuse what would take single tokens out of packed blocks.

    Raises:
        InvalidSetting: tokens are packed in blocks of several.
    """
    if block > 1:
        raise InvalidSetting(f"{what} would cut inside a packed block of {block} tokens")


def pack_blocks(codec: Codec, z: Tensor, block: int) -> tuple[Tensor | None, Tensor | None]:
    """Latents `[..., T, rank]` -> rows of all whole blocks, and the latents left over; None where there are none."""
    tokens = z.shape[-2]
    whole = tokens // block * block
    if whole == tokens:
        return codec.pack(z), None
    return codec.pack(z[..., :whole, :]) if whole else None, z[..., whole:, :]


class BlockLayer(DynamicLayer):
    """A growing layer of latents: whole blocks `packed`, and behind them `keys` and `values` that wait, in 16 bits."""

    def __init__(self, key: Codec, value: Codec, exact: Codec) -> None:
        """`exact` stores the tokens that wait."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.exact = exact
        self.codecs = (key, value)
        self.block = block_of(key, value)
        self.packed: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take in latents; returns those that wait."""
        keys, values = super().update(self.exact.pack(key_states), self.exact.pack(value_states))
        whole = keys.shape[-2] // self.block * self.block
        if whole:
            new = tuple(
                codec.pack(z[..., :whole, :]) for codec, z in zip(self.codecs, (keys, values), strict=True)
            )
            old = (None, None) if self.packed is None else self.packed
            self.packed = (_join(old[0], new[0]), _join(old[1], new[1]))
            # Copies: a view would keep the packed tokens' numbers alive.
            self.keys, self.values = keys[..., whole:, :].clone(), values[..., whole:, :].clone()
        return cast("tuple[Tensor, Tensor]", (self.keys, self.values))

    def _packed_tokens(self) -> int:
        return 0 if self.packed is None else self.packed[0].shape[-2] * self.codecs[0].block

    def get_seq_length(self) -> int:
        waiting = self.keys.shape[-2] if self.is_initialized and self.keys is not None else 0
        return self._packed_tokens() + waiting

    def crop(self, tokens_to_remove: int) -> None:
        waiting = self.get_seq_length() - self._packed_tokens()
        beyond = max(0, -tokens_to_remove - waiting)
        if beyond % self.block:
            refuse_cut(self.block, f"taking back {-tokens_to_remove} tokens")
        super().crop(tokens_to_remove if beyond == 0 else -waiting)
        if beyond:
            kept = self._packed_tokens() - beyond
            cut = self._each(lambda rows, codec: rows[..., : kept // codec.block, :])
            self.packed = cut if kept else None

    def reset(self) -> None:
        super().reset()
        self.packed = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.packed = self._each(lambda rows, _: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.packed = self._each(lambda rows, _: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.packed = self._each(lambda rows, _: rows[indices, ...])

    def offload(self) -> None:
        super().offload()  # type: ignore[no-untyped-call]
        self.packed = self._each(lambda rows, _: rows.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()  # type: ignore[no-untyped-call]
        self.packed = self._each(lambda rows, _: rows.to(self.device, non_blocking=True))

    def _each(self, change: Callable[[Tensor, Codec], Tensor]) -> tuple[Tensor, Tensor] | None:
        if self.packed is None:
            return None
        key, value = self.packed
        return change(key, self.codecs[0]), change(value, self.codecs[1])


def _join(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old, new], dim=-2)
