"""The reaper.

Puts right what crashes leave behind. Any number may run; each repair checks again under the job's lock.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import structlog

from app.deletion.orphans import sweep_orphans
from app.deletion.sweeps import expire_jobs, forget_uploads, free_bytes, grace_seconds
from app.hints.dispatch import Dispatcher
from app.idempotency.repository import delete_expired
from app.infra import failpoints
from app.infra.counted import REAPER_RESCUED, REAPER_SWEEPS
from app.infra.database import SyncDatabase
from app.infra.storage import Storage
from app.jobs.lease import RetryPolicy
from app.jobs.repairs import end_stuck_cancels, mend_times, resend_hints, return_lost
from app.settings import Settings

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
            "keys_expired": self._database.write(delete_expired),
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
