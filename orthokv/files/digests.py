"""SHA-256 of files, and the list of them that every checkpoint carries."""

from __future__ import annotations

import hashlib
from pathlib import Path

from orthokv.spec.errors import InvalidCheckpoint

SUMS = "SHA256SUMS"


def file_digest(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(folder: Path) -> str:
    """The text of `SHA256SUMS` for everything else in a folder, sorted by name, as `sha256sum --check` reads it."""
    names = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != SUMS
    )
    return "".join(f"{file_digest(folder / name)}  {name}\n" for name in names)


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> sha256, from `SHA256SUMS`."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{folder} holds no {SUMS}: not a checkpoint") from None
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{SUMS} is not readable ({error})") from error
    if not sums:
        raise InvalidCheckpoint(f"{SUMS} is empty")
    return sums


def verify_files(folder: Path, names: list[str] | None = None) -> None:
    """Compare files with their digests: all that are listed, or those named.

    Raises:
        InvalidCheckpoint: a file is missing, truncated or altered, or a named one is not listed; names it.
    """
    sums = read_sums(folder)
    for name in sums if names is None else names:
        if name not in sums:
            raise InvalidCheckpoint(f"{name} is not listed in {SUMS}")
        path = folder / name
        if not path.is_file():
            raise InvalidCheckpoint(f"{name} is missing from {folder}")
        if file_digest(path) != sums[name]:
            raise InvalidCheckpoint(f"{name} was altered or truncated: its sha256 is not the one in {SUMS}")
