"""Claims, heartbeats, fences and how attempts end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from app.infra.database import SyncDatabase
from app.jobs import service
from app.jobs.commits import IncompleteResult, commit_progress
from app.jobs.lease import Failure, LeaseLost, acknowledge_cancel, beat, fail, release
from app.jobs.repairs import end_stuck_cancels, return_lost
from app.jobs.schemas import Job
from app.jobs.vocabulary import JobErrorCode, JobStatus, StepName, StepStatus
from app.principal import local_principal
from app.settings import Settings
from tests.support.factories import (
    LAYERS,
    LEASE_SECONDS,
    POLICY,
    advance,
    claim_next,
    complete,
    expire,
    finish,
    hurry,
    must_claim,
    put_layer,
    queue_job,
    read_job,
)

TRANSIENT = Failure(JobErrorCode.STORAGE_ERROR, "The hub did not answer.", retryable=True)
FINAL = Failure(JobErrorCode.MODEL_UNSUPPORTED, "Architecture Foo.", retryable=False)


def step_of(job: Job, name: StepName) -> tuple[StepStatus, int, int]:
    step = next(step for step in job.steps if step.name == name)
    return step.status, step.attempts, step.failures


class TestClaim:
    def test_nothing_to_claim_is_none(self, database: SyncDatabase) -> None:
        assert claim_next(database) is None

    def test_the_greater_priority_goes_first_then_the_older_job(self, database: SyncDatabase) -> None:
        old, urgent, new = (queue_job(database, priority=priority).id for priority in (0, 5, 0))
        assert [must_claim(database).job_id for _ in range(3)] == [urgent, old, new]

    def test_a_claimed_step_is_not_claimed_again(self, database: SyncDatabase) -> None:
        queue_job(database)
        must_claim(database)
        assert claim_next(database) is None

    def test_the_first_claim_starts_the_job(self, database: SyncDatabase) -> None:
        queued = queue_job(database)
        assert (queued.status, queued.started_at, queued.phase) == (JobStatus.QUEUED, None, "resolving")
        must_claim(database)
        running = read_job(database, queued.id)
        assert running.status == JobStatus.RUNNING
        assert running.started_at is not None
        assert running.version > queued.version

    def test_claimers_at_the_same_time_share_without_overlap(self, database: SyncDatabase) -> None:
        wanted = {queue_job(database).id for _ in range(12)}

        def claim_all(worker: int) -> list[str]:
            claimed = []
            # On Postgres a step is passed over while another claimer looks at it: ask until all are gone.
            while database.read(lambda session: waiting(session)):
                if lease := claim_next(database, f"worker-{worker}"):
                    claimed.append(lease.job_id)
            return claimed

        with ThreadPoolExecutor(6) as pool:
            claimed = [one for many in pool.map(claim_all, range(6)) for one in many]
        assert sorted(claimed) == sorted(wanted)

    def test_each_claim_raises_the_fence(self, database: SyncDatabase) -> None:
        queue_job(database)
        fences = []
        for _ in range(3):
            lease = must_claim(database)
            fences.append(lease.fence)
            database.write(release, lease)
        assert fences == sorted(set(fences))


def waiting(session: object) -> bool:
    from sqlalchemy import func, select
    from sqlalchemy.orm import Session

    from app.jobs.models import Step

    assert isinstance(session, Session)
    return bool(session.execute(select(func.count()).where(Step.status == "ready")).scalar_one())


class TestHeartbeat:
    def test_it_keeps_the_lease_from_running_out(self, database: SyncDatabase) -> None:
        queue_job(database)
        lease = must_claim(database)
        expire(database, lease)
        assert database.write(beat, lease, lease_seconds=LEASE_SECONDS) is False
        assert database.write(return_lost, POLICY) == 0

    def test_it_brings_back_a_cancel(self, database: SyncDatabase) -> None:
        job = queue_job(database)
        lease = must_claim(database)
        database.write(service.cancel, job_id=job.id, principal=local_principal())
        assert database.write(beat, lease, lease_seconds=LEASE_SECONDS) is True

    def test_a_stale_fence_gets_none(self, database: SyncDatabase) -> None:
        queue_job(database)
        lease = must_claim(database)
        database.write(release, lease)
        must_claim(database)
        with pytest.raises(LeaseLost):
            database.write(beat, lease, lease_seconds=LEASE_SECONDS)


class TestStaleFence:
    """A worker that lost its lease, to the reaper and then to another worker, writes nothing."""

    def test_every_write_is_refused(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        stale = advance(database, job_id, StepName.FIT)
        put_layer(database, stale, 0)
        expire(database, stale)
        assert database.write(return_lost, POLICY) == 1
        hurry(database)
        fresh = must_claim(database, "worker-2")
        assert fresh.fence > stale.fence
        before = read_job(database, job_id)
        for write in (
            lambda: put_layer(database, stale, 1),
            lambda: finish(database, stale),
            lambda: database.write(commit_progress, stale, phase="x", done=1, total=2, unit="layer"),
            lambda: database.write(fail, stale, FINAL, POLICY),
            lambda: database.write(release, stale),
            lambda: database.write(acknowledge_cancel, stale),
        ):
            with pytest.raises(LeaseLost):
                write()
        assert read_job(database, job_id) == before
        for layer in range(1, LAYERS):
            put_layer(database, fresh, layer)
        finish(database, fresh)
        layers = database.read(service.layers, job_id=job_id, principal=local_principal()).data
        assert [(layer.layer, layer.attempt) for layer in layers] == [(0, 1), (1, 2), (2, 2)]


class TestLostWorker:
    def test_an_expired_lease_returns_the_step_and_counts(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        lease = must_claim(database)
        expire(database, lease)
        database.write(return_lost, POLICY)
        job = read_job(database, job_id)
        assert job.status == JobStatus.QUEUED
        assert step_of(job, StepName.RESOLVE) == (StepStatus.READY, 1, 1)

    def test_a_living_lease_is_left_alone(self, database: SyncDatabase) -> None:
        queue_job(database)
        must_claim(database)
        assert database.write(return_lost, POLICY) == 0

    def test_a_restarted_worker_takes_back_its_own_leases_only(self, database: SyncDatabase) -> None:
        mine, other = queue_job(database).id, queue_job(database).id
        must_claim(database, "me")
        must_claim(database, "somebody")
        assert database.write(return_lost, POLICY, owner="me") == 1
        assert read_job(database, mine).status == JobStatus.QUEUED
        assert read_job(database, other).status == JobStatus.RUNNING

    def test_too_many_losses_without_a_layer_fail_the_job(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        for _ in range(POLICY.max_failures):
            hurry(database)
            expire(database, must_claim(database))
            database.write(return_lost, POLICY)
        job = read_job(database, job_id)
        assert job.status == JobStatus.FAILED
        assert job.error is not None
        assert job.error.code == JobErrorCode.WORKER_LOST
        assert {step.status for step in job.steps} == {StepStatus.FAILED, StepStatus.CANCELLED}

    def test_a_committed_layer_forgives_earlier_losses(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        lease = advance(database, job_id, StepName.FIT)
        for layer in range(LAYERS):
            for _ in range(POLICY.max_failures - 1):
                expire(database, lease)
                database.write(return_lost, POLICY)
                hurry(database)
                lease = must_claim(database)
            put_layer(database, lease, layer)
        finish(database, lease)
        assert complete(database, job_id).status == JobStatus.SUCCEEDED


class TestFailure:
    def test_a_users_error_fails_at_once(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        assert database.write(fail, must_claim(database), FINAL, POLICY) is False
        job = read_job(database, job_id)
        assert job.status == JobStatus.FAILED
        assert job.error is not None
        assert (job.error.code, job.error.phase, job.error.attempt) == ("model_unsupported", "resolving", 1)

    def test_a_transient_error_waits_before_the_next_try(self, database: SyncDatabase) -> None:
        from app.jobs.lease import RetryPolicy

        job_id = queue_job(database).id
        slow = RetryPolicy(max_failures=3, backoff_seconds=3600)
        assert database.write(fail, must_claim(database), TRANSIENT, slow) is True
        assert read_job(database, job_id).status == JobStatus.QUEUED
        assert claim_next(database) is None
        hurry(database)
        assert must_claim(database).job_id == job_id

    def test_memory_runs_out_only_twice(self, database: SyncDatabase) -> None:
        queue_job(database)
        oom = Failure(JobErrorCode.OUT_OF_MEMORY, "CUDA out of memory.", retryable=True)
        assert database.write(fail, must_claim(database), oom, POLICY) is True
        hurry(database)
        assert database.write(fail, must_claim(database), oom, POLICY) is False

    def test_the_same_layer_failing_the_same_way_is_poison(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        poison = Failure(JobErrorCode.INTERNAL, "NaN.", retryable=True, layer=1)
        assert database.write(fail, advance(database, job_id, StepName.FIT), poison, POLICY) is True
        hurry(database)
        assert database.write(fail, must_claim(database), poison, POLICY) is False

    def test_another_layer_failing_is_not_poison(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        first = Failure(JobErrorCode.INTERNAL, "NaN.", retryable=True, layer=1)
        second = Failure(JobErrorCode.INTERNAL, "NaN.", retryable=True, layer=2)
        database.write(fail, advance(database, job_id, StepName.FIT), first, POLICY)
        hurry(database)
        assert database.write(fail, must_claim(database), second, POLICY) is True

    def test_a_release_costs_no_failure(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        for _ in range(POLICY.max_failures + 2):
            database.write(release, must_claim(database))
        job = read_job(database, job_id)
        assert job.status == JobStatus.QUEUED
        assert step_of(job, StepName.RESOLVE) == (StepStatus.READY, POLICY.max_failures + 2, 0)

    def test_one_failing_fit_step_stops_the_others(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        finish(database, advance(database, job_id, StepName.RESOLVE), layers_per_fit_step=1)
        finish(database, must_claim(database))
        first, second = must_claim(database, "a"), must_claim(database, "b")
        assert (first.step, second.step) == (StepName.FIT, StepName.FIT)
        database.write(fail, first, FINAL, POLICY)
        with pytest.raises(LeaseLost):
            database.write(beat, second, lease_seconds=LEASE_SECONDS)
        assert claim_next(database) is None


class TestResults:
    def test_fit_steps_split_the_layers_and_profile_waits_for_all(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        finish(database, advance(database, job_id, StepName.RESOLVE), layers_per_fit_step=2)
        finish(database, must_claim(database))
        fits = [must_claim(database, f"w{n}") for n in range(2)]
        assert [step.layers for step in read_job(database, job_id).steps if step.name == "fit"] == [
            [0, 1],
            [2],
        ]
        put_layer(database, fits[1], 2)
        finish(database, fits[1])
        assert claim_next(database) is None
        for layer in (0, 1):
            put_layer(database, fits[0], layer)
        finish(database, fits[0])
        assert must_claim(database).step is StepName.PROFILE

    def test_a_fit_step_that_owes_layers_is_not_done(self, database: SyncDatabase) -> None:
        lease = advance(database, queue_job(database).id, StepName.FIT)
        put_layer(database, lease, 0)
        with pytest.raises(IncompleteResult, match=r"\[1, 2\]"):
            finish(database, lease)

    def test_a_layer_of_another_step_is_refused(self, database: SyncDatabase) -> None:
        lease = advance(database, queue_job(database).id, StepName.FIT)
        with pytest.raises(IncompleteResult, match="layer 7"):
            put_layer(database, lease, 7)

    def test_nothing_of_an_unfinished_step_is_visible(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        advance(database, job_id, StepName.EVALUATE)
        result = read_job(database, job_id).result
        assert result is not None
        assert result.profile_id is not None
        assert result.checkpoint_id is None


class TestCancel:
    def test_a_queued_job_is_cancelled_at_once(self, database: SyncDatabase) -> None:
        job, pending = database.write(
            service.cancel, job_id=queue_job(database).id, principal=local_principal()
        )
        assert (job.status, pending) == (JobStatus.CANCELLED, False)
        assert claim_next(database) is None

    def test_a_running_job_ends_when_its_worker_says_so(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        lease = must_claim(database)
        job, pending = database.write(service.cancel, job_id=job_id, principal=local_principal())
        assert (job.status, pending) == (JobStatus.CANCELLING, True)
        database.write(acknowledge_cancel, lease)
        assert read_job(database, job_id).status == JobStatus.CANCELLED

    def test_a_cancel_that_was_acknowledged_beats_a_success(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        lease = advance(database, job_id, StepName.EVALUATE)
        database.write(service.cancel, job_id=job_id, principal=local_principal())
        finish(database, lease)
        job = read_job(database, job_id)
        assert job.status == JobStatus.CANCELLED
        assert job.result is not None
        assert job.result.checkpoint_id is None

    def test_a_lost_worker_of_a_cancelling_job_ends_it(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        expire(database, must_claim(database))
        database.write(service.cancel, job_id=job_id, principal=local_principal())
        database.write(return_lost, POLICY)
        assert read_job(database, job_id).status == JobStatus.CANCELLED

    def test_a_cancel_without_an_answer_is_forced(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        lease = must_claim(database)
        database.write(service.cancel, job_id=job_id, principal=local_principal())
        assert database.write(end_stuck_cancels, grace_seconds=3600) == 0
        assert database.write(end_stuck_cancels, grace_seconds=-1) == 1
        assert read_job(database, job_id).status == JobStatus.CANCELLED
        with pytest.raises(LeaseLost):
            finish(database, lease)


class TestRetry:
    def test_it_keeps_what_was_done(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        lease = advance(database, job_id, StepName.FIT)
        put_layer(database, lease, 1)
        database.write(fail, lease, FINAL, POLICY)
        job = database.write(service.retry, job_id=job_id, principal=local_principal(), settings=Settings())
        assert (job.status, job.attempt, job.error) == (JobStatus.QUEUED, 2, None)
        again = must_claim(database)
        assert again.step is StepName.FIT
        assert again.fence > lease.fence
        for layer in (0, 2):
            put_layer(database, again, layer)
        finish(database, again)
        assert complete(database, job_id).status == JobStatus.SUCCEEDED

    def test_a_cancelled_job_can_be_retried(self, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        database.write(service.cancel, job_id=job_id, principal=local_principal())
        database.write(service.retry, job_id=job_id, principal=local_principal(), settings=Settings())
        job = complete(database, job_id)
        assert (job.status, job.cancel_requested_at) == (JobStatus.SUCCEEDED, None)
