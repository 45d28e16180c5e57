"""What a clock that jumps does to leases, back-offs and cancels: on SQLite it is the machine's, on Postgres the server's."""

from __future__ import annotations

from sqlalchemy import select, update

from app.infra.database import SyncDatabase, now
from app.jobs import service
from app.jobs.lease import RetryPolicy, beat
from app.jobs.models import Job, Step
from app.jobs.repairs import end_stuck_cancels, mend_times
from app.principal import local_principal
from tests.support.factories import LEASE_SECONDS, POLICY, claim_next, must_claim, queue_job


class TestAClockThatWasPutBack:
    """What was written while the clock was ahead names times that are long to come."""

    def test_a_step_does_not_wait_for_them(self, database: SyncDatabase) -> None:
        queue_job(database)
        database.write(lambda session: session.execute(update(Step).values(not_before=now(90_000.0))))
        assert claim_next(database) is None
        assert database.write(mend_times, POLICY, lease_seconds=LEASE_SECONDS) >= 1
        assert claim_next(database) is not None

    def test_a_back_off_is_waited_for(self, database: SyncDatabase) -> None:
        queue_job(database)
        patient = RetryPolicy(max_failures=3, backoff_seconds=60)
        database.write(lambda session: session.execute(update(Step).values(not_before=now(300.0))))
        assert database.write(mend_times, patient, lease_seconds=LEASE_SECONDS) == 0
        assert claim_next(database) is None

    def test_a_lease_ends_within_its_length(self, database: SyncDatabase) -> None:
        queue_job(database)
        lease = must_claim(database)
        ahead = update(Step).where(Step.id == lease.step_id).values(lease_expires_at=now(90_000.0))
        database.write(lambda session: session.execute(ahead))
        assert database.write(mend_times, POLICY, lease_seconds=LEASE_SECONDS) == 1
        remaining = select(Step.id).where(
            Step.id == lease.step_id, Step.lease_expires_at <= now(LEASE_SECONDS)
        )
        assert database.read(lambda session: session.execute(remaining).scalar_one()) == lease.step_id
        assert not database.write(beat, lease, lease_seconds=LEASE_SECONDS)

    def test_a_cancel_that_nobody_answers_is_ended(self, database: SyncDatabase) -> None:
        job = queue_job(database)
        must_claim(database)
        database.write(service.cancel, job_id=job.id, principal=local_principal())
        database.write(lambda session: session.execute(update(Job).values(cancel_requested_at=now(90_000.0))))
        assert database.write(end_stuck_cancels, grace_seconds=300) == 1
