"""Rotary embedding as data: which numbers of a head turn together, and by which angles.

Models write the same rotation in several ways. The numbers `i` and `i + width / 2` of a head turn together, or `2 i` and
`2 i + 1`; their tables repeat each angle once for each half, or once for each pair, or hold it once. Here a table holds each
angle once, `[B, T, width / 2]`, whatever the model's own looks like, and one function turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor]
# How a model's tables repeat an angle: `a b a b`, `a a b b`, or not at all.
Layout = Literal["halves", "pairs", "once"]


@dataclass(frozen=True)
class Rotation:
    """How a model writes its rotary embedding.

    Attributes:
        interleaved: the numbers `2 i` and `2 i + 1` turn together; elsewhere `i` and `i + width / 2`.
        layout: of the model's tables.
        in_float32: queries and keys are turned in float32, whatever the model's dtype.
    """

    interleaved: bool = False
    layout: Layout = "halves"
    in_float32: bool = False

    def once(self, tables: Tables) -> Tables:
        """A model's tables with each angle once."""
        cos, sin = tables
        if self.layout == "halves":
            half = cos.shape[-1] // 2
            return cos[..., :half], sin[..., :half]
        if self.layout == "pairs":
            return cos[..., ::2], sin[..., ::2]
        return cos, sin

    def turn(self, x: Tensor, tables: Tables) -> Tensor:
        """`x` `[B, heads, T, head_dim]` with the first `width` numbers of each head turned; tables as of `once`."""
        cos, sin = (table.unsqueeze(1) for table in tables)
        width = 2 * cos.shape[-1]
        turned, rest = x[..., :width], x[..., width:]
        if self.in_float32:
            turned = turned.float()
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        else:
            first, second = turned[..., : width // 2], turned[..., width // 2 :]
        both = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(both, dim=-1).flatten(-2) if self.interleaved else torch.cat(both, dim=-1)
        turned = turned.to(x.dtype)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


PLAIN = Rotation()


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of one layer: how it turns, and the angles of any positions.

    Attributes:
        module: the model's rotary module, which makes its tables.
        arguments: what it wants besides positions: the layer's type, in models with tables for each.
    """

    rotation: Rotation
    module: Any
    arguments: tuple[str, ...]

    def tables(self, positions: Tensor, like: Tensor) -> Tables:
        """Cosines and sines `[B, S, width / 2]` of `positions` `[B, S]`, on the device of `like`."""
        made = self.module(like, positions.to(like.device).long(), *self.arguments)
        return self.rotation.once(cast(Tables, made))
