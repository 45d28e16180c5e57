"""How latents are packed. A codec has a name, which gives it for a model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from orthokv.spec.codec import CodecSpec, codec_spec
from orthokv.spec.errors import InvalidSetting


class Codec(Protocol):
    """Packs latents by blocks of tokens. A row holds `block` tokens of one group with all it takes to unpack them.

    Where `block` is 1, every token has its row, and whatever moves tokens moves rows. Where it is larger, tokens that do not
    fill a block yet are kept as they are (see `orthokv.runtime.blocks`).
    """

    @property
    def name(self) -> str: ...

    @property
    def block(self) -> int:
        """Tokens of a row."""

    def pack(self, z: Tensor) -> Tensor:
        """Latents `[..., T, rank]`, T a multiple of `block` -> rows `[..., T / block, n]` of `row_bytes(rank)` bytes."""

    def unpack(self, rows: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
        """Rows `[..., R, n]` -> latents `[..., R * block, rank]` in `dtype`."""

    def row_bytes(self, rank: int) -> int:
        """Bytes of a row."""


@dataclass(frozen=True)
class Numbers:
    """Latents as floating-point numbers of one dtype: a row is the numbers of a token."""

    spec: CodecSpec
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def block(self) -> int:
        return self.spec.block

    def pack(self, z: Tensor) -> Tensor:
        return z.to(self.dtype)

    def unpack(self, rows: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
        return rows.to(dtype)

    def row_bytes(self, rank: int) -> int:
        return self.spec.row_bytes(rank)


def sixteen_bit(model_dtype: torch.dtype) -> Codec:
    """16 bits a number, whatever the model computes in: a float32 model keeps bfloat16 latents."""
    dtype = model_dtype if model_dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    return Numbers(codec_spec("16-bit", model_dtype.itemsize), dtype)


def native(model_dtype: torch.dtype) -> Codec:
    """The model's own dtype: nothing is rounded, and a float32 model stores 4 bytes a number."""
    return Numbers(codec_spec("native", model_dtype.itemsize), model_dtype)


# One for each name of `orthokv.spec.vocabulary.CODECS`.
PACKING: dict[str, Callable[[torch.dtype], Codec]] = {"16-bit": sixteen_bit, "native": native}


def codec_of(name: str, model_dtype: torch.dtype) -> Codec:
    """The codec of a name, for a model's dtype.

    Raises:
        InvalidSetting: there is none.
    """
    if name not in PACKING:
        raise InvalidSetting(f"codec must be one of {', '.join(PACKING)}, not {name!r}")
    return PACKING[name](model_dtype)
