"""What idle workers and logs do when others are gone or the disk is full."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
import structlog
from sqlalchemy import event

from app.hints.pipe import LocalDispatcher
from app.infra.database import SyncDatabase
from app.infra.logs import configure
from app.infra.storage import Storage
from app.jobs.vocabulary import JobStatus
from app.reaper import Reaper
from app.settings import Settings
from tests.service.workers.test_supervisor import running, until
from tests.support.factories import expire, must_claim, queue_job, read_job


def test_an_idle_worker_returns_lost_leases_without_any_api(
    database: SyncDatabase, settings: Settings
) -> None:
    job = queue_job(database)
    expire(database, must_claim(database, "a worker that is gone"))
    with running(settings.model_copy(update={"reaper_seconds": 0.1})):
        until(lambda: read_job(database, job.id).status == JobStatus.SUCCEEDED, "the job ends")


class _FullDisk(io.StringIO):
    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_log_on_a_full_disk_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    before = structlog.get_config()
    monkeypatch.setattr(sys, "stderr", _FullDisk())
    try:
        configure()
        structlog.get_logger("test").error("something.happened")
    finally:
        structlog.configure(**before)


# These hold running and ready steps only.
_OF_OPEN_STEPS = ("ix_step_lease", "ix_step_ready")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_no_repair_walks_the_jobs_that_ended(
    database: SyncDatabase, settings: Settings, storage: Storage
) -> None:
    plans: list[str] = []

    def explain(connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        found = connection.connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)
        plans.extend(row[3] for row in found)

    sweep = Reaper(database, storage, LocalDispatcher(settings.wake_file), settings).sweep
    sweep()  # what only the first one does
    event.listen(database.engine, "before_cursor_execute", explain)
    sweep()
    walks = [plan for plan in plans if re.match(r"SCAN (job|step|event|artifact)\b", plan)]
    assert plans
    assert [plan for plan in walks if not plan.endswith(_OF_OPEN_STEPS)] == []
