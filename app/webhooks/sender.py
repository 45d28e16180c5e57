"""Threads that send what is due, for as long as the process serves. Any number of processes may have them."""

from __future__ import annotations

import threading
import time

import structlog
from sqlalchemy.orm import Session

from app.infra.database import SyncDatabase
from app.infra.outbound import Outbound
from app.infra.sealing import CannotOpen, Sealer
from app.settings import Settings
from app.webhooks import attempts, repository

# A lease outlasts the slowest attempt, with the time that a name server may take.
LEASE_TIMEOUTS = 4.0
_STOP_PATIENCE_SECONDS = 3.0

log = structlog.get_logger(__name__)


class Sender:
    """Sends deliveries. One thread looks for work at a time; whoever has found some lets the next one look."""

    def __init__(
        self, database: SyncDatabase, sealer: Sealer | None, outbound: Outbound, settings: Settings
    ) -> None:
        self._database = database
        self._sealer = sealer
        self._outbound = outbound
        self._settings = settings
        self._lease_seconds = LEASE_TIMEOUTS * settings.webhook_timeout_seconds
        self._stop = threading.Event()
        self._turn = threading.Lock()
        self._next_tidying = time.monotonic()
        number = settings.webhook_senders if sealer is not None else 0
        self._threads = [
            threading.Thread(target=self._run, name=f"webhooks-{index}", daemon=True)
            for index in range(number)
        ]

    def start(self) -> None:
        """Nothing starts in a process without a key: it could not sign."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Claim nothing more. An attempt under way may end; if it takes long, it is sent again elsewhere."""
        self._stop.set()
        deadline = time.monotonic() + _STOP_PATIENCE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def send_next(self) -> bool:
        """Claim, send and record one delivery; False when none is due."""
        attempt = self._claim()
        if attempt is None:
            return False
        self._send(attempt)
        return True

    def tidy(self) -> None:
        """Forget secrets that have ended and deliveries that are old; seal anew what an older key has sealed."""
        assert self._sealer is not None, "only a process with a key tidies"
        keep = self._settings.webhook_keep_days * 86_400
        done = {
            "deliveries_forgotten": self._database.write(
                repository.forget_old_deliveries, older_than_seconds=keep
            ),
            "deliveries_ended": self._database.write(repository.end_pending_of_disabled),
            "secrets_forgotten": self._database.write(repository.forget_old_secrets),
            "secrets_sealed_anew": self._database.write(seal_anew, self._sealer),
        }
        if any(done.values()):
            log.info("webhooks.tidied", **done)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                attempt = self._wait_for_work()
                if attempt is not None:
                    self._send(attempt)
            except (
                Exception
            ):  # the lease runs out and the delivery is sent again; a dead thread sends nothing
                log.exception("webhooks.failed")
                self._stop.wait(self._settings.webhook_poll_seconds)

    def _wait_for_work(self) -> attempts.Attempt | None:
        with self._turn:
            while not self._stop.is_set():
                if time.monotonic() >= self._next_tidying:
                    self._next_tidying = time.monotonic() + self._settings.reaper_seconds
                    self.tidy()
                if (attempt := self._claim()) is not None:
                    return attempt
                self._stop.wait(self._settings.webhook_poll_seconds)
        return None

    def _claim(self) -> attempts.Attempt | None:
        if not self._database.read(repository.anything_due):
            return None
        return self._database.write(attempts.claim, lease_seconds=self._lease_seconds)

    def _send(self, attempt: attempts.Attempt) -> None:
        assert self._sealer is not None, "only a process with a key sends"
        outcome = attempts.send(attempt, sealer=self._sealer, outbound=self._outbound)
        self._database.write(attempts.record, attempt, outcome, schedule=self._settings.webhook_retry_seconds)


def seal_anew(session: Session, sealer: Sealer) -> int:
    """Seal with the first key what another one has sealed, so that the other can be given up. Returns how many."""
    count = 0
    for row in repository.lock_endpoints_sealed_otherwise(session, key_id=sealer.key_id):
        try:
            row.secret = sealer.seal(sealer.open(row.secret))
            if row.previous_secret is not None:
                row.previous_secret = sealer.seal(sealer.open(row.previous_secret))
        except CannotOpen:
            continue  # said with each attempt to send
        count += 1
    return count
