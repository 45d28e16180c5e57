"""What differs between the two clients: pausing, and reading a file while sending it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
CHUNK_BYTES = 1 << 20


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def blocking(work: Callable[[threading.Event], T]) -> T:
    """Run work, giving it an event that is set when nobody waits for it any more."""
    return work(threading.Event())
