"""What one call of an attention module carries from its hook to its attention function."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from orthokv.bases.basis import LayerBases
from orthokv.models.rotary import Tables
from orthokv.runtime.attend import Held


@dataclass
class Call:
    """One call of one attention module. Made by its pre-hook, and known to nobody but this call.

    Attributes:
        bases: as they are at the call; None leaves the layer uncompressed.
        tables: the rotary tables that were kept from the module, each angle once; None where it turns its own.
        positions: `[1 or B, T]` of the new tokens, where keys are held before RoPE.
        keys: all keys attended to, once the cache has taken in the new ones; None without a cache.
        values: likewise.
        held_positions: `[B, S]` of those keys.
        attended: whether the attention function has been reached.
    """

    bases: LayerBases | None
    tables: Tables | None
    positions: Tensor | None
    keys: Held | None = None
    values: Held | None = None
    held_positions: Tensor | None = None
    attended: bool = False
