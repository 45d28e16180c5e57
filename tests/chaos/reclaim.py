"""How long it takes from a kill until somebody has the step again."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from app.infra.database import SyncDatabase
from app.jobs.models import Step
from app.jobs.vocabulary import StepStatus


@dataclass(frozen=True)
class _Killed:
    kind: str
    step_id: str
    attempts: int
    at: float


class Watch:
    """Looks at the steps of killed workers until they are claimed again. By this process's own clock."""

    def __init__(self, database: SyncDatabase) -> None:
        self._database = database
        self._waiting: list[_Killed] = []
        self._seconds: dict[str, list[float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def expect(self, kind: str, owner: str) -> None:
        """The worker of this name, or its child, is about to be killed."""
        held = select(Step.id, Step.attempts).where(
            Step.status == StepStatus.RUNNING, Step.lease_owner == owner
        )
        with contextlib.suppress(SQLAlchemyError):  # the database is away, too: no measure of this kill
            found = self._database.read(lambda session: session.execute(held).all())
            self._waiting += [_Killed(kind, row[0], row[1], time.monotonic()) for row in found]

    def close(self) -> dict[str, dict[str, float]]:
        """Count, median and maximum of each kind."""
        self._ended.set()
        self._thread.join()
        return {
            kind: {
                "count": len(seconds),
                "p50": round(statistics.median(seconds), 2),
                "max": round(max(seconds), 2),
            }
            for kind, seconds in sorted(self._seconds.items())
        }

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            waiting = list(self._waiting)
            if not waiting:
                continue
            ids = [one.step_id for one in waiting]
            statement = select(Step.id, Step.status, Step.attempts).where(Step.id.in_(ids))
            try:
                rows = self._database.read(lambda session, s=statement: session.execute(s).all())
            except SQLAlchemyError:
                continue
            now = {row[0]: (row[1], row[2]) for row in rows}
            for one in waiting:
                status, attempts = now[one.step_id]
                if attempts > one.attempts:
                    self._seconds.setdefault(one.kind, []).append(time.monotonic() - one.at)
                elif status in (StepStatus.RUNNING, StepStatus.READY):
                    continue
                self._waiting.remove(one)  # claimed again, or it had ended before the kill, or was cancelled
