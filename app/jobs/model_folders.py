"""Which folders of the machine a job may name as its model.

Whoever asks over the network must not read, through the server, what he could not read himself. The server's owner may
name whatever the server can read; everybody else what the operator has listed in `ORTHOKV_MODEL_ROOTS`. Whether a folder
outside of them exists changes no answer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

OUTSIDE = "Of local folders this server takes those that ORTHOKV_MODEL_ROOTS lists; this is in none of them."
WEIGHTS = "A checkpoint of form full holds the model's own files: of a local model only the server's owner may have one."


class FolderRefused(Exception):
    """A job names a folder, or asks for its files, that whoever made the job may not have."""


def is_folder(model_id: str) -> bool:
    """Whether a job's model is a folder of the machine; else it is one of the hub, whatever lies in the working folder."""
    return model_id.startswith("/")


def require(model_id: str, *, form: str, by_owner: bool, roots: Sequence[Path]) -> None:
    """Raises `FolderRefused`, for folders of the machine only."""
    if by_owner or not is_folder(model_id):
        return
    real_roots = [Path(os.path.realpath(root)) for root in roots]
    # By the names that the operator gave them, or by those that clients find when they follow his links.
    if not (_is_listed(model_id, [*roots, *real_roots]) and _stays_inside(model_id, real_roots)):
        raise FolderRefused(OUTSIDE)
    if form == "full":
        raise FolderRefused(WEIGHTS)


def _is_listed(folder: str, roots: Sequence[Path]) -> bool:
    """By the path alone, before anything is looked at."""
    path = PurePosixPath(folder)
    return ".." not in path.parts and any(path.is_relative_to(root) for root in roots)


def _stays_inside(folder: str, real_roots: Sequence[Path]) -> bool:
    """With every link followed: the folder and each entry of it lie below one of the roots."""

    def inside(path: str) -> bool:
        real = PurePosixPath(os.path.realpath(path))
        return any(real.is_relative_to(root) for root in real_roots)

    if not inside(folder):
        return False
    try:
        entries = [entry.path for entry in os.scandir(folder)]
    except OSError:
        return True  # not there, or not on this machine: whoever loads the model says so
    return all(map(inside, entries))
