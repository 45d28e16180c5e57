"""What idle workers and logs do when others are gone or the disk is full."""

from __future__ import annotations

import io
import sys

import pytest
import structlog

from app.database import SyncDatabase
from app.jobs.vocabulary import JobStatus
from app.logs import configure
from app.settings import Settings
from tests.service.factories import expire, must_claim, queue_job, read_job
from tests.service.test_supervisor import running, until


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
