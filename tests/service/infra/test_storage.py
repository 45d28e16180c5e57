"""The object store on a local folder: whole objects or none."""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from app.infra.storage import Storage, StorageError, Stored

NOW = timedelta(seconds=-5)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def store(root: Path) -> Storage:
    return Storage(root.as_uri())


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """Writes of this process fail beyond so many bytes a file, as they do on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def source(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "source"
    path.write_bytes(content)
    return path


async def chunks(*parts: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    if error is not None:
        raise error


def test_a_file_comes_back_as_it_was(store: Storage, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    stored = store.put_file("jobs/a/1/x.bin", source(tmp_path, content))
    assert stored == Stored(len(content), hashlib.sha256(content).hexdigest())
    store.fetch("jobs/a/1/x.bin", tmp_path / "back", sha256=stored.sha256)
    assert (tmp_path / "back").read_bytes() == content


def test_an_altered_object_is_not_handed_out(store: Storage, root: Path, tmp_path: Path) -> None:
    stored = store.put_file("a/x", source(tmp_path, b"as committed"))
    (root / "a/x").write_bytes(b"as tampered!")
    with pytest.raises(StorageError, match="not the file that was committed"):
        store.fetch("a/x", tmp_path / "back", sha256=stored.sha256)


def test_a_missing_object_is_an_error_of_the_store(store: Storage, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read x"):
        store.fetch("a/x", tmp_path / "back", sha256="0" * 64)


def test_a_stream_is_stored_with_its_digest(store: Storage, root: Path) -> None:
    stored = asyncio.run(store.put_stream("d/up", chunks(b"one", b"", b"two")))
    assert stored == Stored(6, hashlib.sha256(b"onetwo").hexdigest())
    assert (root / "d/up").read_bytes() == b"onetwo"


def test_an_empty_stream_is_an_empty_object(store: Storage, root: Path) -> None:
    assert asyncio.run(store.put_stream("d/up", chunks())).bytes == 0
    assert (root / "d/up").read_bytes() == b""


def test_a_stream_that_breaks_leaves_nothing(store: Storage, root: Path) -> None:
    with pytest.raises(EOFError, match="gone"):
        asyncio.run(store.put_stream("d/up", chunks(b"x" * 9_000_000, error=EOFError("gone"))))
    assert files(root) == []


@pytest.mark.parametrize("size", [100_000, 9_000_000])
def test_a_full_disk_leaves_nothing(store: Storage, root: Path, tmp_path: Path, size: int) -> None:
    path = source(tmp_path, b"x" * size)
    with disk_full_after(50_000), pytest.raises(StorageError, match="cannot store"):
        store.put_file("a/x", path)
    with disk_full_after(50_000), pytest.raises(StorageError, match="cannot store"):
        asyncio.run(store.put_stream("a/y", chunks(b"x" * size)))
    assert files(root) == []
    assert store.put_file("a/x", path).bytes == size


def test_a_range_is_read_to_the_byte(store: Storage, tmp_path: Path) -> None:
    content = os.urandom(2_500_000)
    store.put_file("a/x", source(tmp_path, content))

    async def read(start: int, end: int) -> tuple[int, bytes]:
        opened = await store.open("a/x", start, end)
        assert opened is not None
        try:
            return opened.size, b"".join([chunk async for chunk in opened.chunks])
        finally:
            opened.close()

    for start, end in ((0, len(content)), (1, 2), (7, 2_000_001), (5, 5)):
        assert asyncio.run(read(start, end)) == (len(content), content[start:end])
    assert asyncio.run(store.open("a/y", 0, 1)) is None


def test_what_killed_writers_leave_is_found_and_deleted(store: Storage, root: Path, tmp_path: Path) -> None:
    store.put_file("a/x", source(tmp_path, b"whole"))
    (root / "a/y#1").write_bytes(b"half")
    assert store.delete_staging(timedelta(hours=1)) == 0
    assert store.delete_staging(NOW) == 1
    assert files(root) == ["a/x"]


def test_only_old_objects_are_listed_for_deletion(store: Storage, root: Path, tmp_path: Path) -> None:
    store.put_file("jobs/old", source(tmp_path, b"x"))
    store.put_file("jobs/new", source(tmp_path, b"x"))
    os.utime(root / "jobs/old", (0, 0))
    assert list(store.list_older("jobs", timedelta(hours=1))) == ["jobs/old"]
