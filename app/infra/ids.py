"""Identifiers: a type prefix and a UUIDv7 in Crockford base32, so that ids sort by creation."""

from __future__ import annotations

import os
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_LENGTH = 26  # 128 bits at 5 bits a character
_COUNTER_BITS = 12

_lock = threading.Lock()
_last_millis = 0
_counter = 0


def _uuid7() -> int:
    """A UUIDv7 (RFC 9562).

    `rand_a` is a counter, so ids of one process rise strictly within a millisecond.
    """
    global _last_millis, _counter
    with _lock:
        millis = time.time_ns() // 1_000_000
        if millis > _last_millis:
            _last_millis, _counter = millis, 0
        else:
            _counter += 1
            if _counter >> _COUNTER_BITS:
                # More ids than the counter holds, or a clock that went back: run ahead of the clock instead.
                _last_millis, _counter = _last_millis + 1, 0
        millis, counter = _last_millis, _counter
    tail = int.from_bytes(os.urandom(8)) & ((1 << 62) - 1)
    return (millis << 80) | (0x7 << 76) | (counter << 64) | (0b10 << 62) | tail


def new_id(prefix: str) -> str:
    """`prefix_` and 26 characters; ids made later in this process compare greater."""
    value = _uuid7()
    return f"{prefix}_" + "".join(
        _ALPHABET[(value >> shift) & 31] for shift in range(5 * (_LENGTH - 1), -1, -5)
    )


def id_pattern(prefix: str) -> str:
    """Regular expression of an id with this prefix."""
    return f"^{prefix}_[{_ALPHABET}]{{{_LENGTH}}}$"
