"""Objects that no row refers to: what a worker uploaded and then could not commit."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from app.deletion.repository import known_keys
from app.infra import failpoints
from app.infra.database import SyncDatabase
from app.infra.storage import Storage
from app.jobs.repository import live_fences

_BATCH = 500


def sweep_orphans(database: SyncDatabase, storage: Storage, *, age: timedelta) -> int:
    """Delete them; returns how many."""
    count = storage.delete_staging(age)
    batch: list[str] = []

    def flush() -> int:
        failpoints.hit("reaper.orphans")
        storage.delete(batch)
        deleted = len(batch)
        batch.clear()
        return deleted

    for key in find_orphans(database, storage, age=age):
        batch.append(key)
        if len(batch) == _BATCH:
            count += flush()
    return count + (flush() if batch else 0)


def find_orphans(database: SyncDatabase, storage: Storage, *, age: timedelta) -> Iterator[str]:
    """Their keys.

    An object younger than `age`, or under the fence of a running step, may still get its row.
    """
    batch: list[str] = []

    def unknown() -> list[str]:
        # Fences first: a step that is no longer running by then has all the rows that it will ever have. So
        # a clock that jumps, and makes young objects old, costs no object that is about to be committed.
        live = database.read(live_fences)
        known = database.read(known_keys, batch)
        return [key for key in batch if key not in known and _fence_of(key) not in live]

    for prefix in ("jobs", "datasets", "readiness"):
        for key in storage.list_older(prefix, age):
            batch.append(key)
            if len(batch) == _BATCH:
                yield from unknown()
                batch.clear()
    yield from unknown()


def _fence_of(key: str) -> tuple[str, int] | None:
    """(step, fence) of `jobs/JOB/STEP/FENCE/NAME`."""
    parts = key.split("/")
    return (parts[2], int(parts[3])) if parts[0] == "jobs" else None
