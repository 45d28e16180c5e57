"""What the reaper deletes by itself: what has expired, what was never finished, and the bytes of what is gone."""

from __future__ import annotations

import contextlib

from sqlalchemy.orm import Session

from app.datasets import repository as datasets
from app.deletion import repository, service
from app.http.errors import Problem
from app.infra.database import SyncDatabase
from app.infra.storage import Storage
from app.principal import Principal
from app.settings import Settings

_BATCH = 500
RETENTION = "retention"
"""Who deletes by itself, in audit events."""


def expire_jobs(database: SyncDatabase) -> int:
    """Delete jobs that ended longer ago than their project keeps them; returns how many.

    One transaction each. One whose profile an open job needs waits for the sweep after that job's end.
    """
    count = 0
    for project_id, days in database.read(repository.retentions).items():
        principal = Principal(project_id, RETENTION, frozenset())
        for job_id in database.read(repository.expired_jobs, project_id, days=days, limit=_BATCH):
            with contextlib.suppress(
                Problem
            ):  # a job needs it, it was retried, or another reaper was here first
                database.write(service.delete_job, job_id=job_id, principal=principal)
                count += 1
    return count


def forget_uploads(database: SyncDatabase, *, age_seconds: float) -> int:
    """Delete datasets that were announced and never confirmed."""
    found = database.read(repository.unfinished_uploads, age_seconds=age_seconds, limit=_BATCH)
    return sum(database.write(_forget_upload, dataset_id, project_id) for dataset_id, project_id in found)


def _forget_upload(session: Session, dataset_id: str, project_id: str) -> bool:
    row = datasets.lock_dataset(session, dataset_id, project_id=project_id)
    if row is None or row.completed_at is not None:
        return False
    principal = Principal(project_id, RETENTION, frozenset())
    service.delete_dataset(session, dataset_id=dataset_id, principal=principal)
    return True


def free_bytes(database: SyncDatabase, storage: Storage, *, age_seconds: float) -> int:
    """Delete the objects of rows that were deleted this long ago; returns how many.

    The tombstone goes after the object: a crash in between costs another try. An object that some row refers to
    after all stays.
    """
    count = 0
    while keys := database.read(repository.garbage, age_seconds=age_seconds, limit=_BATCH):
        known = database.read(repository.known_keys, keys)
        dead = [key for key in keys if key not in known]
        storage.delete(dead)
        database.write(repository.forget_garbage, keys)
        count += len(dead)
    return count


def grace_seconds(settings: Settings) -> float:
    """How long bytes outlive their row: a download may be under way, or a signed URL be out."""
    return max(settings.garbage_seconds, settings.signed_download_seconds or 0.0)
