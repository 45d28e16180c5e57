"""Hints through a named pipe in the data folder: both of its ends. No broker, and the pipe outlives both."""

from __future__ import annotations

import contextlib
import os
import select
from pathlib import Path

from app.settings import DEFAULT_GPU_CLASS


class LocalDispatcher:
    """Wakes the worker of the same data folder."""

    def __init__(self, wake_file: Path) -> None:
        self._wake_file = wake_file

    def hint(self, gpu_class: str = DEFAULT_GPU_CLASS) -> None:
        try:
            descriptor = os.open(self._wake_file, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return  # no pipe yet, or nobody reads: a worker that starts later looks at the database first
        try:
            # Full of hints already, or the reader has just left: either way there is nothing to add.
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(descriptor, b"\n")
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Nothing is ever left to send."""


class WakeListener:
    """The worker's end of the pipe."""

    def __init__(self, wake_file: Path) -> None:
        wake_file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkfifo(wake_file, 0o600)
        # Opened for writing too: a pipe whose last writer left is "readable" for ever.
        self._descriptor = os.open(wake_file, os.O_RDWR | os.O_NONBLOCK)

    def wait(self, seconds: float) -> bool:
        """Sleep until a hint or the timeout; True for a hint. All hints so far count as one."""
        readable, _, _ = select.select([self._descriptor], [], [], seconds)
        if not readable:
            return False
        with contextlib.suppress(BlockingIOError):  # another worker of the folder took the same hint
            os.read(self._descriptor, 65536)
        return True

    def wake(self) -> None:
        """End a `wait` of another thread, or the next one."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._descriptor, b"\n")

    def close(self) -> None:
        os.close(self._descriptor)
