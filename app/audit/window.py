"""Noting an act once where it comes in many requests: the ranges of one download, above all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from time import monotonic as now
from typing import TypeVar

Found = TypeVar("Found")

WINDOW_SECONDS = 600.0
MAX_REMEMBERED = 10_000


class NotedOnce:
    """Which acts this process has noted in the last minutes.

    Nothing is done without a note: who repeats an act goes on only when the first one's note is committed, and what
    is forgotten is noted again.
    """

    def __init__(self, *, seconds: float = WINDOW_SECONDS, limit: int = MAX_REMEMBERED) -> None:
        self._seconds, self._limit = seconds, limit
        self._noted: dict[Hashable, float] = {}
        self._locks: dict[Hashable, asyncio.Lock] = {}

    async def run(
        self, act: Hashable, *, first: Callable[[], Awaitable[Found]], again: Callable[[], Awaitable[Found]]
    ) -> Found:
        """`first()`, which notes the act, or within the window `again()`, which does not."""
        if not self._is_noted(act):
            lock = self._locks.setdefault(act, asyncio.Lock())
            try:
                async with lock:
                    if not self._is_noted(act):
                        found = await first()
                        self._remember(act)
                        return found
            finally:
                if not lock.locked():
                    self._locks.pop(act, None)
        return await again()

    def _is_noted(self, act: Hashable) -> bool:
        at = self._noted.get(act)
        return at is not None and now() - at < self._seconds

    def _remember(self, act: Hashable) -> None:
        self._noted.pop(act, None)  # the order of the dictionary is that of the notes
        self._noted[act] = now()
        if len(self._noted) > self._limit:
            del self._noted[next(iter(self._noted))]
