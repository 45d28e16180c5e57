"""What the service writes is its user's alone: database, objects, working folders, tokens."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import structlog
from sqlalchemy.engine import make_url

from app.settings import Settings

_SQLITE = b"SQLite format 3\0"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO

log = structlog.get_logger(__name__)


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Files and folders that this process, or one that it starts, makes meanwhile are its user's alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def make_private(settings: Settings) -> None:
    """Make the data folder, and close it and what an earlier version has left open to others, with one line in the log.

    Folders that are not this user's alone stay as they are, also with a line; whatever is new in them is private.
    """
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    open_to_others = [path for path in _kept_in(settings) if path.exists() and path.stat().st_mode & _OTHERS]
    shared = [path for path in open_to_others if _is_shared(path)]
    closed = [path for path in open_to_others if path not in shared]
    for path in closed:
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~_OTHERS)
    if closed:
        log.warning("files.closed", paths=list(map(str, closed)), meaning="other users could read them")
    if shared:
        log.warning(
            "files.shared", paths=list(map(str, shared)), meaning="not this user's alone: left as they are"
        )


def _kept_in(settings: Settings) -> Iterator[Path]:
    yield settings.data_dir.resolve()
    yield settings.work_dir
    objects = urlsplit(settings.resolved_storage_url)
    if objects.scheme == "file":
        yield Path(url2pathname(objects.path))
    database = make_url(settings.resolved_database_url)
    if database.get_backend_name() == "sqlite" and _is_sqlite(Path(database.database or "")):
        yield from (Path(f"{database.database}{suffix}") for suffix in ("", "-wal", "-shm"))


def _is_sqlite(file: Path) -> bool:
    """Whether there is a database in a file: what else may lie there is not ours to change."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(_SQLITE)) == _SQLITE
    except OSError:
        return False


def _is_shared(path: Path) -> bool:
    """Another user's, one that everybody may write to, the machine's root, a home, or a folder with files of others."""
    status, we = path.stat(), os.geteuid()
    if status.st_uid != we or status.st_mode & stat.S_ISVTX:
        return True
    if not path.is_dir():
        return False
    if path in (Path(path.anchor), Path(os.path.expanduser("~"))):
        return True
    return any(entry.stat(follow_symlinks=False).st_uid != we for entry in os.scandir(path))
