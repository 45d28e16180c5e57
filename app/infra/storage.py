"""The object store.

Immutable objects under keys that the service chooses, on a local folder or a cloud bucket.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

import obstore
from anyio import to_thread
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store, from_url

from app.settings import Settings

CHUNK_BYTES = 1 << 20
_CHECK_SECONDS = 2.0
_SIGNING = (S3Store, GCSStore, AzureStore)
# What a local write leaves behind when its process is killed: `name#1`. Keys of ours have no '#'.
_STAGING = re.compile(r"#\d+$")


class StorageError(Exception):
    """The store refused or damaged an object: a full disk, missing rights, a lost connection."""


class WrongDigest(Exception):
    """A stream is not the one that was announced."""


@dataclass(frozen=True)
class Stored:
    """Size and digest of an object as it was written."""

    bytes: int
    sha256: str


class Opened:
    """An object while some of its bytes are read. `size` is that of the whole object."""

    def __init__(self, size: int, chunks: AsyncIterator[bytes], file: BinaryIO | None = None) -> None:
        self.size = size
        self.chunks = chunks
        self.file = file  # of a local store: it can be sent without reading it

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class Storage:
    """Objects by key. Writes are atomic: a reader sees a whole object or none."""

    def __init__(self, url: str, options: Mapping[str, str] | None = None) -> None:
        """`options` are obstore's for this kind of store; its provider's own variables fill the gaps.

        Raises `StorageError` when the configuration cannot be right.
        """
        parts = urlsplit(url)
        self._root = Path(url2pathname(parts.path)) if parts.scheme == "file" else None
        try:
            if self._root is not None:
                self._root.mkdir(parents=True, exist_ok=True)
            plain = any(value.startswith("http://") for value in (options or {}).values())
            # Typed loosely, because each kind of store has options of its own.
            more: dict[str, Any] = {"config": dict(options)} if options else {}
            if plain:
                more["client_options"] = {"allow_http": True}
            self._store = from_url(url, **more)
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot use {parts.scheme}://{parts.netloc}: {_first_line(error)}") from error

        self._sound_until = 0.0
        self._probe = f"readiness/{uuid.uuid4().hex}"  # of this process: others look at the same store

    @property
    def can_sign(self) -> bool:
        """Whether clients can be sent to the store itself."""
        return isinstance(self._store, _SIGNING)

    async def sign(self, key: str, *, seconds: float) -> str:
        """A URL that reads this one object, and no other, for this time. Whoever has it may use it."""
        if not isinstance(self._store, _SIGNING):
            raise StorageError("this store cannot sign URLs")
        try:
            return await obstore.sign_async(self._store, "GET", key, timedelta(seconds=seconds))
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot sign: {_first_line(error)}") from error

    def put_file(self, key: str, path: Path) -> Stored:
        """Store a file and read it back: the digest of what is in the store is the digest of the file."""
        try:
            written = digest_file(path)
            obstore.put(self._store, key, path)
            self._sync(key)
            stored = self._digest(key)
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot store {Path(key).name}: {_first_line(error)}") from error
        if stored != written:
            raise StorageError(f"{Path(key).name} is not in the store as it was written")
        return stored

    async def put_stream(
        self, key: str, chunks: AsyncIterator[bytes], *, sha256: str | None = None
    ) -> Stored:
        """Store a stream. What the stream raises passes through (but an `OSError`), and nothing is stored.

        Raises `WrongDigest` where the stream is not the one of `sha256`.
        """
        digest = hashlib.sha256()
        size = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                if chunk:
                    yield chunk
            if sha256 not in (None, digest.hexdigest()):
                raise WrongDigest

        try:
            await obstore.put_async(self._store, key, counted())
            self._sync(key)
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot store the upload: {_first_line(error)}") from error
        return Stored(size, digest.hexdigest())

    def fetch(self, key: str, path: Path, *, sha256: str) -> None:
        """Copy an object to a file and check its digest."""
        try:
            with path.open("xb") as file:
                for chunk in self._chunks(key):
                    file.write(chunk)
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot read {Path(key).name}: {_first_line(error)}") from error
        if digest_file(path).sha256 != sha256:
            raise StorageError(f"{Path(key).name} in the store is not the file that was committed")

    async def open(self, key: str, start: int, end: int) -> Opened | None:
        """An object for reading its bytes `start` to `end`, exclusive; None where there is no such object."""
        try:
            if self._root is not None:
                return await to_thread.run_sync(_open_local, self._root / key, start, end)
            if start == end:  # no bucket knows an empty range
                size = await self.size(key)
                return None if size is None else Opened(size, _nothing())
            result = await obstore.get_async(self._store, key, options={"range": (start, end)})
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise StorageError(_first_line(error)) from error
        return Opened(int(result.meta["size"]), _received(result))

    async def size(self, key: str) -> int | None:
        """Bytes of an object; None when there is none."""
        try:
            return int((await obstore.head_async(self._store, key))["size"])
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise StorageError(_first_line(error)) from error

    async def check(self) -> None:
        """Raise `StorageError` when nothing can be written to the store. Asked often, it looks every few seconds."""
        if time.monotonic() < self._sound_until:
            return
        try:
            if self._root is not None and not self._root.is_dir():
                raise StorageError("the folder is gone")
            await obstore.put_async(self._store, self._probe, b"readiness")
            await obstore.delete_async(self._store, self._probe)
        except (BaseError, OSError) as error:
            raise StorageError(_first_line(error)) from error
        self._sound_until = time.monotonic() + _CHECK_SECONDS

    def list_older(self, prefix: str, age: timedelta) -> Iterator[str]:
        """Keys under a prefix that were last written longer ago than `age`."""
        before = datetime.now(UTC) - age
        for batch in obstore.list(self._store, prefix):
            for meta in batch:
                if meta["last_modified"] < before:
                    yield meta["path"]

    def delete(self, keys: list[str]) -> None:
        """Delete objects; those that are gone already are not an error. Raises `StorageError`."""
        try:
            if self._root is None:
                obstore.delete(self._store, keys)
                return
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self._store, key)
                self._prune(self._root / key)
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot delete: {_first_line(error)}") from error

    def _prune(self, path: Path) -> None:
        """Remove the folders that the object leaves empty, but for those that every object shares."""
        assert self._root is not None
        for folder in path.relative_to(self._root).parents:
            if len(folder.parts) < 2:
                return
            try:
                (self._root / folder).rmdir()
            except OSError:
                return  # not empty, or another sweep was faster

    def delete_staging(self, age: timedelta) -> int:
        """Delete what killed writers left in a local store, where listings do not show it.

        Returns how many.
        """
        before = (datetime.now(UTC) - age).timestamp()
        count = 0
        # `os.walk` passes over folders that go while it walks, as they do here.
        for folder, _, names in os.walk(self._root) if self._root is not None else ():
            for path in (Path(folder, name) for name in names if _STAGING.search(name)):
                with contextlib.suppress(FileNotFoundError):  # its writer has finished since
                    if path.stat().st_mtime < before:
                        path.unlink()
                        count += 1
        return count

    def _chunks(self, key: str) -> Iterator[bytes]:
        for chunk in obstore.get(self._store, key).stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(chunk)

    def digest(self, key: str) -> Stored:
        """Read an object and say what it is. Raises `FileNotFoundError` and `StorageError`."""
        try:
            return self._digest(key)
        except FileNotFoundError:
            raise
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot read {Path(key).name}: {_first_line(error)}") from error

    def _digest(self, key: str) -> Stored:
        digest, size = hashlib.sha256(), 0
        for chunk in self._chunks(key):
            digest.update(chunk)
            size += len(chunk)
        return Stored(size, digest.hexdigest())

    def _sync(self, key: str) -> None:
        """Make a local object survive a power cut before a row refers to it; a bucket does so by contract."""
        if self._root is None:
            return
        path = self._root / key
        for name in (path, path.parent):
            descriptor = os.open(name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _open_local(path: Path, start: int, end: int) -> Opened:
    file = path.open("rb", buffering=0)
    return Opened(os.fstat(file.fileno()).st_size, _read_local(file, start, end), file)


async def _read_local(file: BinaryIO, start: int, end: int) -> AsyncIterator[bytes]:
    while start < end:
        chunk = await to_thread.run_sync(os.pread, file.fileno(), min(CHUNK_BYTES, end - start), start)
        if not chunk:
            raise StorageError("an object became shorter while it was read")
        start += len(chunk)
        yield chunk


async def _received(result: Any) -> AsyncIterator[bytes]:
    """Raises `StorageError`, also in the middle: an object may go while it is read."""
    try:
        async for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(chunk)
    except (BaseError, OSError) as error:
        raise StorageError(_first_line(error)) from error


async def _nothing() -> AsyncIterator[bytes]:
    empty: tuple[bytes, ...] = ()
    for chunk in empty:
        yield chunk


def open_storage(settings: Settings) -> Storage:
    """The store of these settings. Raises `StorageError`."""
    options = {name: value.get_secret_value() for name, value in settings.storage_options.items()}
    storage = Storage(settings.resolved_storage_url, options)
    if settings.signed_download_seconds is not None and not storage.can_sign:
        raise StorageError("ORTHOKV_SIGNED_DOWNLOAD_SECONDS needs a bucket: this store cannot sign URLs")
    return storage


def digest_file(path: Path) -> Stored:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Stored(file.tell(), digest.hexdigest())


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
