"""Folders that appear whole or not at all, and what a full disk looks like."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from orthokv.spec.errors import InvalidSetting, StorageError


def refuse_taken(out: Path) -> None:
    """Raises `InvalidSetting` where a new folder cannot be: something is there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidSetting(f"{out} exists and is not an empty folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: written beside `out` and renamed at the end.

    Raises:
        InvalidSetting: `out` exists and is not an empty folder.
        StorageError: writing failed, a full disk for example; everything written is removed.
    """
    refuse_taken(out)
    out = out.resolve()
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        _remove_empty(missing)
        raise StorageError(f"cannot write {out}: {error.strerror}") from error
    try:
        yield partial
        partial.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(missing)
        if is_storage_failure(error):
            raise StorageError(f"cannot write {out}: {error}; nothing was left behind") from error
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders made on the way, innermost first, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def is_storage_failure(error: BaseException) -> bool:
    """Whether an exception means that a disk is full, read-only or over quota (safetensors wraps the OSError in text)."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
    return type(error).__name__ == "SafetensorError" and (
        "os error" in str(error) or "I/O error" in str(error)
    )


def swap_files(written: Path, folder: Path, names: Sequence[str]) -> None:
    """Put files in the place of others of the same names: all of them, or where one cannot be moved none."""
    for name in names:
        os.link(folder / name, written / f"old-{name}")  # takes no room on a disk that is full
    moved: list[str] = []
    try:
        for name in names:
            os.replace(written / name, folder / name)
            moved.append(name)
    except OSError:
        for name in moved:
            os.replace(written / f"old-{name}", folder / name)
        raise
