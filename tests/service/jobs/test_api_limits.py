"""Limits that end what takes too long or too much: statements, jobs, event streams of one key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError

from app.auth.models import Project
from app.http.errors import Problem
from app.infra.database import SyncDatabase, Timeouts, now
from app.jobs.event_routes import StreamSlots
from app.jobs.lease import TIME_UP, TimeUp, beat, fail
from app.jobs.models import Job
from app.main import create_app
from app.settings import Settings
from tests.support.factories import POLICY, Script, job_body, must_claim, queue_job, read_job
from tests.support.tenants import OWNER
from workers.supervisor import Supervisor


class TestTimeBudget:
    def test_the_time_runs_from_the_first_step(self, client: TestClient, database: SyncDatabase) -> None:
        job = client.post("/v1/jobs", json=job_body(max_runtime_minutes=5)).json()
        assert (job["max_runtime_minutes"], job["deadline_at"]) == (5, None)
        lease = must_claim(database)
        begun = read_job(database, job["id"])
        assert begun.deadline_at is not None
        assert begun.started_at is not None
        assert (begun.deadline_at - begun.started_at).total_seconds() == 300
        assert database.write(beat, lease, lease_seconds=30.0) is False

    def test_a_job_whose_time_is_up_fails_and_a_retry_has_it_anew(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        job = queue_job(database, max_runtime_minutes=1)
        lease = must_claim(database)
        database.write(lambda session: session.execute(update(Job).values(deadline_at=now(-1.0))))
        with pytest.raises(TimeUp):
            database.write(beat, lease, lease_seconds=30.0)
        assert database.write(fail, lease, TIME_UP, POLICY) is False
        failed = read_job(database, job.id)
        assert failed.error is not None
        assert (failed.status, failed.error.code) == ("failed", "time_limit_exceeded")
        assert client.post(f"/v1/jobs/{job.id}/retry").json()["deadline_at"] is None
        must_claim(database)
        again = read_job(database, job.id)
        assert again.deadline_at is not None
        assert database.read(lambda s: s.execute(select(Job.deadline_at > now())).scalar_one())

    def test_the_supervisor_stops_the_child(
        self, database: SyncDatabase, settings: Settings, script: Script
    ) -> None:
        script.write({"step": "resolve", "run": 0, "do": "hang"})
        job = queue_job(database, max_runtime_minutes=1)
        supervisor = Supervisor(settings)
        lease = supervisor._claim()
        assert lease is not None
        database.write(lambda session: session.execute(update(Job).values(deadline_at=now(0.5))))
        supervisor._run(lease)
        supervisor.close()
        failed = read_job(database, job.id)
        assert failed.error is not None
        assert failed.error.code == "time_limit_exceeded"
        assert failed.error.message == "The job has used all of its max_runtime_minutes."

    def test_the_server_has_a_limit_for_jobs_that_name_none(self, settings: Settings) -> None:
        with TestClient(
            create_app(settings.model_copy(update={"max_runtime_minutes": 7})), headers=OWNER
        ) as client:
            made = [
                client.post("/v1/jobs", json=job_body(**asked)).json()["max_runtime_minutes"]
                for asked in ({}, {"max_runtime_minutes": 90})
            ]
        assert made == [7, 90]


class TestStatements:
    @pytest.fixture
    def hasty(self, postgres: str) -> SyncDatabase:
        return SyncDatabase(postgres, Timeouts(statement_seconds=0.2, lock_seconds=0.1))

    def test_postgres_ends_a_long_statement(self, hasty: SyncDatabase) -> None:
        with pytest.raises(OperationalError, match="statement timeout"):
            hasty.read(lambda session: session.execute(text("SELECT pg_sleep(20)")))
        hasty.close()

    @pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
    def test_a_request_that_waits_for_a_lock_is_503(self, database: SyncDatabase, settings: Settings) -> None:
        hasty = settings.model_copy(update={"lock_timeout_seconds": 0.1})
        with TestClient(create_app(hasty), headers=OWNER, raise_server_exceptions=False) as client:

            def while_locked(session: object) -> tuple[int, str]:
                database_session = session
                database_session.execute(select(Project).with_for_update())  # type: ignore[attr-defined]
                answer = client.post("/v1/jobs", json=job_body())
                return answer.status_code, answer.headers["retry-after"]

            assert database.write(while_locked) == (503, "5")
            assert client.post("/v1/jobs", json=job_body()).status_code == 201


class TestStreams:
    def test_one_key_has_its_share_and_others_theirs(self) -> None:
        slots = StreamSlots(limit=4, per_key=2)

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b""

        async def follow() -> None:
            streams = [slots.use(key, endless()) for key in ("a", "a", "b")]
            for stream in streams:
                await anext(stream)
            with pytest.raises(Problem, match="This key has 2 event streams open") as refused:
                slots.require_free("a")
            assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "30"})
            slots.require_free("b")
            await streams[0].aclose()  # type: ignore[attr-defined]
            slots.require_free("a")

        asyncio.run(follow())
