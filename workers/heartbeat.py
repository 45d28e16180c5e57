"""Keeps a lease alive from a thread, and stops the work when it cannot or may not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum
from types import TracebackType
from typing import Self

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.hints.pipe import WakeListener
from app.infra import failpoints
from app.infra.counted import HEARTBEAT_FAILURES
from app.infra.database import SyncDatabase
from app.jobs.lease import Lease, LeaseLost, TimeUp, beat
from app.settings import Settings

log = structlog.get_logger(__name__)


class Stop(Enum):
    """Why the work was stopped from outside."""

    CANCELLED = "cancelled"
    LOST = "lost"
    DRAINED = "drained"
    TIME_UP = "time_up"


class Heartbeat:
    """A context that extends the lease while it is open.

    When the work must end before that, `reason` is set and `stop_work` called.

    No heartbeat for two thirds of the lease counts as a lost lease. The rest of it is the time to kill the
    child, so that the GPU is free before anybody else may claim the step.
    """

    def __init__(
        self,
        database: SyncDatabase,
        lease: Lease,
        settings: Settings,
        wake: WakeListener,
        *,
        stop_work: Callable[[], None],
    ) -> None:
        self._database = database
        self._lease = lease
        self._log = log.bind(**lease.about())  # threads have no context of their own
        self._settings = settings
        self._wake = wake
        self._stop_work = stop_work
        self._guard = threading.Lock()
        self._reason: Stop | None = None
        self._done = False
        self._drain_until: float | None = None
        self._last_success = time.monotonic()
        self._beater = threading.Thread(target=self._beat_until_done, name="heartbeat")
        # Apart from the beater, which may hang in the database for longer than the lease lasts.
        self._watch = threading.Thread(target=self._watch_deadline, name="lease-deadline")
        self._ended = threading.Event()

    @property
    def reason(self) -> Stop | None:
        return self._reason

    def __enter__(self) -> Self:
        self._beater.start()
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done = True
        self._ended.set()
        self._wake.wake()
        self._beater.join()
        self._watch.join()

    def stop(self, reason: Stop) -> None:
        """Stop the work, for the first reason given."""
        with self._guard:
            if self._reason is None and not self._done:
                self._reason = reason
                self._stop_work()

    def drain(self) -> None:
        """Stop the work after the time that a planned shutdown may take. Callable from a signal handler."""
        self._drain_until = time.monotonic() + self._settings.drain_seconds

    def _beat_until_done(self) -> None:
        while not self._done and self._reason is None:
            failpoints.hit("heartbeat.before")
            try:
                cancelled = self._database.write(
                    beat, self._lease, lease_seconds=self._settings.lease_seconds
                )
            except LeaseLost:
                self.stop(Stop.LOST)
                return
            except TimeUp:
                self.stop(Stop.TIME_UP)
                return
            except SQLAlchemyError as error:
                HEARTBEAT_FAILURES.inc()
                self._log.warning("heartbeat.failed", error=str(error).partition("\n")[0])
            else:
                self._last_success = time.monotonic()
                failpoints.hit("heartbeat.after")
                if cancelled:
                    self.stop(Stop.CANCELLED)
                    return
            # A hint may be a cancel: look at once instead of at the next beat.
            self._wake.wait(self._settings.heartbeat_seconds)

    def _watch_deadline(self) -> None:
        tick = min(0.25, self._settings.lease_seconds / 20)
        while not self._ended.wait(tick):
            moment = time.monotonic()
            if moment - self._last_success > self._settings.lease_seconds * 2 / 3:
                self._log.error("lease.self_fenced")
                self.stop(Stop.LOST)
            if self._drain_until is not None and moment > self._drain_until:
                self.stop(Stop.DRAINED)
