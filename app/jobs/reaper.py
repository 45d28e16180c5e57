"""The reaper.

Puts right what crashes leave behind. Any number may run; each repair checks again under the job's lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import structlog
from sqlalchemy.orm import Session

from app.deletion.repository import known_keys
from app.deletion.sweeps import expire_jobs, forget_uploads, free_bytes, grace_seconds
from app.hints.dispatch import Dispatcher
from app.idempotency import repository as idempotency
from app.infra import failpoints
from app.infra.database import SyncDatabase, after_commit
from app.infra.storage import Storage
from app.jobs import repository
from app.jobs.lease import WORKER_LOST, RetryPolicy, end_attempt, stop_others
from app.jobs.states import transition
from app.jobs.vocabulary import JobStatus
from app.metrics.counted import LEASE_EXPIRIES, REAPER_RESCUED, REAPER_SWEEPS
from app.settings import Settings

_BATCH = 500

log = structlog.get_logger(__name__)


class Reaper:
    """All sweeps in a thread of their own, for as long as the process serves."""

    def __init__(
        self, database: SyncDatabase, storage: Storage, dispatcher: Dispatcher, settings: Settings
    ) -> None:
        self._database = database
        self._storage = storage
        self._dispatcher = dispatcher
        self._settings = settings
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def sweep(self) -> None:
        """Every repair but the orphans', once."""
        settings = self._settings
        policy = RetryPolicy(settings.max_failures, settings.retry_backoff_seconds)
        lost = self._database.write(return_lost, policy)
        failpoints.hit("reaper.mid_sweep")
        done = {
            "attempts_lost": lost,
            "cancels_forced": self._database.write(
                end_stuck_cancels, grace_seconds=settings.cancel_grace_seconds
            ),
            "times_mended": self._database.write(mend_times, policy, lease_seconds=settings.lease_seconds),
            "keys_expired": self._database.write(forget_idempotency_keys),
            "jobs_expired": expire_jobs(self._database),
            "objects_freed": free_bytes(self._database, self._storage, age_seconds=grace_seconds(settings)),
            "hints_resent": self._database.read(
                resend_hints, self._dispatcher, after_seconds=settings.hint_after_seconds
            ),
        }
        for what, count in done.items():
            REAPER_RESCUED.labels(what).inc(count)
        if any(done.values()):
            log.info("reaper.swept", **done)

    def sweep_orphans(self) -> None:
        age = timedelta(hours=self._settings.orphan_hours)
        if forgotten := forget_uploads(self._database, age_seconds=age.total_seconds()):
            log.info("reaper.uploads_forgotten", count=forgotten)
        if deleted := sweep_orphans(self._database, self._storage, age=age):
            REAPER_RESCUED.labels("orphans_deleted").inc(deleted)
            log.info("reaper.orphans_deleted", count=deleted)

    def _run(self) -> None:
        next_orphans = time.monotonic()
        while not self._stop.is_set():
            try:
                self.sweep()
                if time.monotonic() >= next_orphans:
                    next_orphans = time.monotonic() + self._settings.orphan_sweep_seconds
                    self.sweep_orphans()
            except Exception:  # the next round tries again; a dead reaper would strand every lost lease
                REAPER_SWEEPS.labels("failed").inc()
                log.exception("reaper.failed")
            else:
                REAPER_SWEEPS.labels("done").inc()
            self._stop.wait(self._settings.reaper_seconds)


def return_lost(session: Session, policy: RetryPolicy, *, owner: str | None = None) -> int:
    """End attempts whose lease ran out, or all attempts of a worker that is known to be dead.

    Returns how many.
    """
    count = 0
    for job_id, step_id, fence in repository.lost_steps(session, owner=owner):
        job = repository.lock_job(session, job_id)
        step = repository.lock_step(session, step_id=step_id, fence=fence, overdue=owner is None)
        if job is None or step is None:
            continue  # a late heartbeat extended the lease, or another reaper was here first
        end_attempt(session, job, step, WORKER_LOST, policy)
        failpoints.hit("reaper.returning")
        after_commit(session, LEASE_EXPIRIES.inc)
        count += 1
    return count


def end_stuck_cancels(session: Session, *, grace_seconds: float) -> int:
    """Cancel jobs whose worker never acknowledged.

    Its fence is raised, so it cannot write when it wakes up.
    """
    count = 0
    for job_id in repository.stuck_cancels(session, grace_seconds=grace_seconds):
        job = repository.lock_job(session, job_id)
        if job is None or job.status != JobStatus.CANCELLING:
            continue
        stop_others(session, job)
        transition(session, job, JobStatus.CANCELLED, event="job.cancelled", data={"forced": True})
        count += 1
    return count


def mend_times(session: Session, policy: RetryPolicy, *, lease_seconds: float) -> int:
    """Undo what a clock that was put back leaves behind: steps and leases of a time that is long to come.

    Returns how many. Other processes may have longer leases, so only ten times our own is beyond any.
    """
    longest_wait = policy.backoff_seconds * 2**policy.max_failures
    return repository.hurry_late_steps(session, delay_seconds=longest_wait) + repository.shorten_long_leases(
        session, limit_seconds=10 * lease_seconds, lease_seconds=lease_seconds
    )


def resend_hints(session: Session, dispatcher: Dispatcher, *, after_seconds: float) -> int:
    """Wake workers when ready steps have waited for too long."""
    waiting = repository.count_waiting(session, older_than_seconds=after_seconds)
    for gpu_class in waiting:
        dispatcher.hint(gpu_class)
    return sum(waiting.values())


def forget_idempotency_keys(session: Session) -> int:
    return idempotency.delete_expired(session)


def sweep_orphans(database: SyncDatabase, storage: Storage, *, age: timedelta) -> int:
    """Delete objects that no row refers to: what a worker uploaded and then could not commit."""
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
    """Keys that no row refers to.

    An object younger than `age`, or under the fence of a running step, may still get its row.
    """
    batch: list[str] = []

    def unknown() -> list[str]:
        # Fences first: a step that is no longer running by then has all the rows that it will ever have. So
        # a clock that jumps, and makes young objects old, costs no object that is about to be committed.
        live = database.read(repository.live_fences)
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
