"""A file while it is downloaded: its bytes in place, and behind them how far each segment is.

The bytes of a segment are written before the count of them, both by system calls of their own. A killed process loses what it
had not counted yet. After a power cut a count may be ahead of its bytes; the digest of the whole finds that out.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

from orthokv_client.errors import DigestMismatch, DownloadInUse, NotEnoughSpace

SEGMENT_BYTES = 64 << 20
COUNT_EVERY_BYTES = 1 << 20
_COUNT = struct.Struct("<Q")
_READ_BYTES = 1 << 20


class PartFile:
    """The unfinished file of `target`. Segments are written by a thread each; the rest is for one thread."""

    def __init__(self, target: Path, *, size: int, sha256: str, segment_bytes: int | None = None) -> None:
        self.target, self.size, self._sha256 = target, size, sha256
        self._segment_bytes = segment_bytes = segment_bytes or SEGMENT_BYTES
        # Another file, or one cut otherwise, has another name.
        self.path = target.with_name(f".{target.name}.{sha256[:16]}.{segment_bytes}.part")
        self.segments = -(-size // segment_bytes)
        self._done = [0] * self.segments
        self._counted = [0] * self.segments

    def __enter__(self) -> Self:
        """Open or make it. Raises `DownloadInUse`."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            self._lock()
            length = os.fstat(self._file).st_size
            if length == self.size:  # everything came, and only its name is missing
                self._done = [self._length(segment) for segment in range(self.segments)]
            elif length == self.size + self.segments * _COUNT.size:
                self._done = [self._read_count(segment) for segment in range(self.segments)]
            else:
                os.ftruncate(self._file, 0)
        except BaseException:
            os.close(self._file)
            raise
        self._counted = list(self._done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    @property
    def missing(self) -> int:
        """Bytes that are still to come."""
        return self.size - sum(self._done)

    def rest(self, segment: int) -> tuple[int, int]:
        """(start, end), end exclusive, of what a segment lacks."""
        start = segment * self._segment_bytes
        return start + self._done[segment], start + self._length(segment)

    def reserve(self) -> None:
        """Make room for the counts. Raises `NotEnoughSpace` when the disk cannot hold what is missing."""
        free = shutil.disk_usage(self.path.parent).free
        if free < self.missing:
            raise NotEnoughSpace(
                f"{self.target.name} needs {self.missing} more bytes on the disk, and {free} are free"
            )
        os.ftruncate(self._file, self.size + self.segments * _COUNT.size)

    def write(self, segment: int, chunk: bytes) -> None:
        start, _ = self.rest(segment)
        written = 0
        while written < len(chunk):
            written += os.pwrite(self._file, chunk[written:], start + written)
        self._done[segment] += len(chunk)
        if self._done[segment] - self._counted[segment] >= COUNT_EVERY_BYTES:
            self.count(segment)

    def count(self, segment: int) -> None:
        """Note how far a segment is."""
        if self._counted[segment] != self._done[segment]:
            place = self.size + segment * _COUNT.size
            os.pwrite(self._file, _COUNT.pack(self._done[segment]), place)
            self._counted[segment] = self._done[segment]

    def finish(self) -> None:
        """Check the digest and give the file its name. Raises `DigestMismatch`, and then the file is gone."""
        if self._digest() != self._sha256:
            self.path.unlink()
            raise DigestMismatch(f"{self.target.name} arrived damaged; download it again")
        os.ftruncate(self._file, self.size)
        os.fsync(self._file)
        os.replace(self.path, self.target)
        folder = os.open(self.target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _digest(self) -> str:
        digest, at = hashlib.sha256(), 0
        while chunk := os.pread(self._file, min(_READ_BYTES, self.size - at), at):
            digest.update(chunk)
            at += len(chunk)
        return digest.hexdigest()

    def _length(self, segment: int) -> int:
        return min(self._segment_bytes, self.size - segment * self._segment_bytes)

    def _read_count(self, segment: int) -> int:
        (count,) = _COUNT.unpack(os.pread(self._file, _COUNT.size, self.size + segment * _COUNT.size))
        return min(int(count), self._length(segment))

    def _lock(self) -> None:
        """Until the file is closed, by whatever end of this process."""
        import fcntl  # downloads need POSIX; the rest of the client does not

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadInUse(f"another process downloads {self.target.name} to this folder") from error
