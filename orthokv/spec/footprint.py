"""Bytes of a cache: the one owner of them. Integers only; everybody who needs a size asks here."""

from __future__ import annotations

# Keys cached before RoPE need their position again: an int32 a token and sequence, once for each kind of layer.
POSITION_BYTES = 4


def held_tokens(window: int | None, tokens: int) -> int:
    """How many of `tokens` a layer's cache still holds; a window of W keeps W - 1, as the next token completes it."""
    return tokens if window is None else min(tokens, window - 1)
