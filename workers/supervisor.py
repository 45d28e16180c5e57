"""The claim loop of a worker: claim a step, run it in a child process, again.

Start it with `orthokv worker` or `python -m workers.supervisor`; settings come from the environment. The database alone decides
what runs: the loop may be killed at any point and loses at most the layer in hand. SIGTERM drains: the layer
in hand is finished if time allows, the lease is released, and the step waits for the next worker at no cost.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.hints.dispatch import Dispatcher, make_dispatcher
from app.hints.pipe import WakeListener
from app.infra import failpoints, tracing
from app.infra.counted import WORKER_IDLE
from app.infra.database import SyncDatabase, Timeouts
from app.infra.logs import configure
from app.infra.private import make_private, private_files
from app.infra.storage import open_storage
from app.jobs import repository
from app.jobs.lease import Lease, RetryPolicy, claim
from app.jobs.repairs import return_lost
from app.metrics.port import worker_metrics
from app.settings import Settings
from workers.attempt import Attempt
from workers.limits import CannotIsolate, require_isolation

if TYPE_CHECKING:
    from app.hints.listener import HintListener

log = structlog.get_logger(__name__)


class Supervisor:
    """One worker: at most one step, and so one child, at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"
        self._work_dir = settings.work_dir / self._name
        timeouts = Timeouts(settings.statement_timeout_seconds, settings.lock_timeout_seconds)
        self._database = SyncDatabase(settings.resolved_database_url, timeouts)
        self._storage = open_storage(settings)
        self._wake = WakeListener(settings.wake_file)
        self._stopping = False
        self._reap_at = time.monotonic() + settings.reaper_seconds
        self._idle = threading.Event()
        self._attempt: Attempt | None = None
        self._listener = self._make_listener()
        # Passes hints on: one hint wakes one worker, and a job may have work for many.
        self._relay: Dispatcher | None = make_dispatcher(settings) if settings.broker_url else None

    def run(self) -> None:
        """Work until `stop`; then `close`."""
        self._take_back_own_leases()
        log.info("worker.started", worker=self._name, gpu_classes=self._settings.gpu_classes)
        self._show_idle(True)
        if self._listener is not None:
            self._listener.start()
        while not self._stopping:
            lease = self._claim()
            if lease is None:
                self._reap()
                self._idle.set()
                if not self._stopping:
                    self._wake.wait(self._settings.idle_poll_seconds)
                continue
            self._idle.clear()
            self._pass_hint_on()
            self._run(lease)
        self._idle.set()
        self._show_idle(False)
        log.info("worker.stopped", worker=self._name)

    def look(self) -> None:
        """Look for work now, and return when there is none left: what a hint makes another thread do."""
        if self._stopping:
            return
        self._idle.clear()
        self._wake.wake()
        self._idle.wait()

    def close(self) -> None:
        """Give back what the supervisor holds open. Nobody may call `stop` any more."""
        self._idle.set()
        if self._listener is not None:
            self._listener.stop()
        if self._relay is not None:
            self._relay.close()
        self._wake.close()
        self._database.close()

    def stop(self) -> None:
        """Drain and end. Callable from a signal handler."""
        self._stopping = True
        if self._attempt is not None:
            self._attempt.drain()
        self._wake.wake()

    def _take_back_own_leases(self) -> None:
        """A worker name has one living owner, so leases and folders under it are a dead predecessor's."""
        if self._settings.worker_name:
            policy = RetryPolicy(self._settings.max_failures, self._settings.retry_backoff_seconds)
            returned = self._database.write(return_lost, policy, owner=self._name)
            if returned:
                log.warning("worker.took_back_leases", count=returned)
            shutil.rmtree(self._work_dir, ignore_errors=True)

    def _claim(self) -> Lease | None:
        try:
            lease = self._database.write(
                claim,
                owner=self._name,
                lease_seconds=self._settings.lease_seconds,
                gpu_classes=self._settings.gpu_classes,
                max_running_steps=self._settings.max_running_steps,
            )
        except SQLAlchemyError as error:
            log.warning("claim.failed", error=str(error).partition("\n")[0])
            return None
        if lease is not None:
            failpoints.hit("claim.committed")
        return lease

    def _reap(self) -> None:
        """Now and then return lost leases: the fleet goes on while no API, with its reaper, is up."""
        if time.monotonic() < self._reap_at:
            return
        self._reap_at = time.monotonic() + self._settings.reaper_seconds
        policy = RetryPolicy(self._settings.max_failures, self._settings.retry_backoff_seconds)
        with contextlib.suppress(SQLAlchemyError):  # the next round tries again
            if count := self._database.write(return_lost, policy):
                log.info("worker.returned_leases", count=count)

    def _pass_hint_on(self) -> None:
        if self._relay is None:
            return
        try:
            waiting = self._database.read(repository.count_waiting)
        except SQLAlchemyError:
            return  # the others find the work by themselves
        for gpu_class in waiting:
            self._relay.hint(gpu_class)

    def _make_listener(self) -> HintListener | None:
        if not self._settings.broker_url:
            return None
        from app.hints.listener import HintListener  # Celery is installed only where there is a broker

        return HintListener(
            self._settings.broker_url,
            name=self._name,
            gpu_classes=self._settings.gpu_classes,
            work=self.look,
        )

    def _run(self, lease: Lease) -> None:
        self._attempt = Attempt(
            lease,
            database=self._database,
            storage=self._storage,
            settings=self._settings,
            wake=self._wake,
            work_dir=self._work_dir,
        )
        if self._stopping:  # the signal came between the claim and here
            self._attempt.drain()
        with structlog.contextvars.bound_contextvars(worker=self._name, **lease.about()):
            self._show_idle(False)
            try:
                self._attempt.run()
            except SQLAlchemyError as error:
                # Nothing can be reported; the lease runs out and the reaper returns the step.
                log.error("attempt.abandoned", error=str(error).partition("\n")[0])
            finally:
                self._attempt = None
                self._show_idle(True)

    def _show_idle(self, idle: bool) -> None:
        for gpu_class in self._settings.gpu_classes:
            WORKER_IDLE.labels(gpu_class).set(idle)


def main() -> None:
    try:
        with private_files():
            run(Settings())
    except CannotIsolate as error:
        sys.exit(f"orthokv: {error}")


def run(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT. Raises `CannotIsolate`."""
    if settings.isolate_steps:
        require_isolation()
    configure()
    make_private(settings)
    failpoints.arm(settings.failpoint, settings.failpoint_dir)
    tracing.configure("orthokv-worker")
    with worker_metrics(settings):
        _run(Supervisor(settings))


def _run(supervisor: Supervisor) -> None:

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        supervisor.stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    supervisor.run()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    supervisor.close()


if __name__ == "__main__":
    main()
