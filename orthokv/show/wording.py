"""Figures and names as people read them, in tables, cards and plots alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

KEY_MODES_IN_WORDS = {"pre": "keys before RoPE", "post": "keys after RoPE"}


def number(value: float, digits: int = 4) -> str:
    """A figure with at least `digits` significant digits, plain where that is readable: 31.83, 12345, 1.200e-06."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 10**digits <= abs(value) < 1e9:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def percent(share: float) -> str:
    """A share of bytes or of a width, in per cent with one decimal."""
    return f"{100 * share:.1f} %"


def begin_at(starts: Sequence[int]) -> str:
    """Where measured blocks begin, as the end of a sentence; empty where all begin at 0."""
    places = ", ".join(map(str, starts))
    return "" if not any(starts) else f"blocks that begin at position{'s' * (len(starts) > 1)} {places}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A GitHub table whose first `left` columns are text and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])
