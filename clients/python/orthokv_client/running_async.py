"""What differs between the two clients: pausing, and reading a file while sending it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
CHUNK_BYTES = 1 << 20


async def sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def chunks(path: Path) -> AsyncIterator[bytes]:
    """The bytes of a file."""
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk


async def blocking(work: Callable[[threading.Event], T]) -> T:
    """Run work in a thread. It is given an event that is set when nobody waits for it any more."""
    stop = threading.Event()
    try:
        return await asyncio.to_thread(work, stop)
    finally:
        stop.set()
