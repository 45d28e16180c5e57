"""Submit, claim, heartbeat, commit, lose, fail, cancel, retry and reap in any order, beside a small model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.checker.checks import check_rows
from app.http.errors import Problem
from app.infra.database import SyncDatabase, now
from app.jobs import service
from app.jobs.commits import IncompleteResult
from app.jobs.lease import Failure, Lease, LeaseLost, acknowledge_cancel, beat, fail, release
from app.jobs.models import Event, Job, Layer, Step
from app.jobs.repairs import end_stuck_cancels, mend_times, return_lost
from app.jobs.vocabulary import TERMINAL, JobErrorCode, JobStatus, StepName, StepStatus
from app.models import metadata
from app.principal import local_principal
from app.settings import Settings
from tests.support.factories import (
    LAYERS,
    LEASE_SECONDS,
    POLICY,
    claim_next,
    expire,
    finish,
    hurry,
    put_layer,
    queue_job,
    read_job,
)

pytestmark = pytest.mark.slow

picks = st.integers(0, 1 << 16)


class Service(RuleBasedStateMachine):
    """The model is the set of leases that ought to be alive, and what was acknowledged to clients."""

    database: SyncDatabase

    def __init__(self) -> None:
        super().__init__()

        def wipe(session: Session) -> None:
            # The circle between jobs and profiles is cut first.
            session.execute(Job.__table__.update().values(profile_id=None))  # type: ignore[attr-defined]
            for table in reversed(metadata.sorted_tables):
                if table.name not in ("project", "audit_event"):  # the one stays, the other only grows
                    session.execute(table.delete())

        self.database.write(wipe)
        self.jobs: list[str] = []
        self.leases: list[Lease] = []  # every lease there ever was, most of them stale
        self.alive: dict[str, int] = {}  # step -> fence
        self.cancelled: set[str] = set()  # acknowledged cancels that were not retried
        self.fences: dict[str, int] = {}

    # What clients do.

    @initialize(priorities=st.lists(st.integers(-1, 1), min_size=1, max_size=3))
    def submit(self, priorities: list[int]) -> None:
        self.jobs = [queue_job(self.database, priority=priority).id for priority in priorities]

    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        # Seldom: few jobs would get anywhere else.
        if pick % 3 == 0:
            job_id = self.jobs[pick // 3 % len(self.jobs)]
            before = read_job(self.database, job_id).status
            try:
                self.database.write(service.cancel, job_id=job_id, principal=local_principal())
                self.cancelled.add(job_id)
            except Problem:
                assert before in (JobStatus.SUCCEEDED, JobStatus.FAILED)

    @rule(pick=picks)
    def retry(self, pick: int) -> None:
        job_id = self.jobs[pick % len(self.jobs)]
        if read_job(self.database, job_id).status in TERMINAL:
            before = read_job(self.database, job_id).status
            try:
                self.database.write(
                    service.retry, job_id=job_id, principal=local_principal(), settings=Settings()
                )
                self.cancelled.discard(job_id)
            except Problem:
                assert before not in (JobStatus.FAILED, JobStatus.CANCELLED)

    # What workers do.

    @rule()
    def claim(self) -> None:
        lease = claim_next(self.database)
        if lease is not None:
            assert lease.step_id not in self.alive, "two workers hold one step"
            assert lease.fence > self.fences.get(lease.step_id, 0)
            assert lease.job_id not in self.cancelled
            self.fences[lease.step_id] = self.alive[lease.step_id] = lease.fence
            self.leases.append(lease)

    @rule(times=st.integers(1, 8))
    def work_well(self, times: int) -> None:
        """What a worker does that meets no trouble; without it hardly a job would get far."""
        for _ in range(times):
            alive = [lease for lease in self.leases if self.alive.get(lease.step_id) == lease.fence]
            if not alive:
                self.claim()
                continue
            lease = alive[-1]
            missing = self.missing_layers(lease) if lease.step is StepName.FIT else []
            if missing and lease.job_id not in self.cancelled:
                put = partial(put_layer, self.database, layer=missing[0])
                self.apply(lease, put, ends=False)
            else:
                self.apply(lease, lambda one: finish(self.database, one), ends=True)

    def missing_layers(self, lease: Lease) -> list[int]:
        done = {
            one.layer
            for one in self.database.read(
                service.layers, job_id=lease.job_id, principal=local_principal()
            ).data
        }
        return [layer for layer in range(LAYERS) if layer not in done]

    @rule(pick=picks)
    def heartbeat(self, pick: int) -> None:
        self.use(
            pick, lambda lease: self.database.write(beat, lease, lease_seconds=LEASE_SECONDS), ends=False
        )

    @rule(pick=picks)
    def commit(self, pick: int) -> None:
        fits = [lease for lease in self.leases if lease.step is StepName.FIT]
        if fits:
            lease = fits[-1] if pick % 4 else fits[pick // 4 % len(fits)]
            missing = self.missing_layers(lease)
            if missing:
                self.apply(lease, lambda one: put_layer(self.database, one, missing[0]), ends=False)

    @rule(pick=picks)
    def succeed(self, pick: int) -> None:
        self.use(pick, lambda lease: finish(self.database, lease))

    @rule(pick=picks, retryable=st.booleans())
    def fail(self, pick: int, retryable: bool) -> None:
        # Mostly failures that pass: after the other kind little is left to happen.
        retryable = retryable or bool(pick % 4)
        failure = Failure(JobErrorCode.STORAGE_ERROR, "x", retryable=retryable)
        self.use(pick, lambda lease: self.database.write(fail, lease, failure, POLICY))

    @rule(pick=picks)
    def drain(self, pick: int) -> None:
        self.use(pick, lambda lease: self.database.write(release, lease))

    @rule(pick=picks)
    def stop_cancelled(self, pick: int) -> None:
        # A worker does this only after a heartbeat told it so.
        told = [lease for lease in self.leases if lease.job_id in self.cancelled]
        if told:
            lease = told[pick % len(told)]
            self.apply(lease, lambda one: self.database.write(acknowledge_cancel, one), ends=True)

    # What time does.

    @rule(pick=picks)
    def lose(self, pick: int) -> None:
        if self.alive:
            step_id = sorted(self.alive)[pick % len(self.alive)]
            lease = next(lease for lease in self.leases if lease.step_id == step_id)
            expire(self.database, lease)
            self.database.write(return_lost, POLICY)
            del self.alive[step_id]

    @rule(pick=picks)
    def put_the_clock_back(self, pick: int) -> None:
        """Times that were written while the clock was ahead are mended, and nobody loses a lease by it."""
        if pick % 4 == 0:
            later = now(90_000.0)
            ready, running = Step.status == StepStatus.READY, Step.status == StepStatus.RUNNING
            self.database.write(lambda s: s.execute(update(Step).where(ready).values(not_before=later)))
            self.database.write(
                lambda s: s.execute(update(Step).where(running).values(lease_expires_at=later))
            )
            self.database.write(mend_times, POLICY, lease_seconds=LEASE_SECONDS)
            claimable = select(func.count()).where(ready, Step.not_before > now())
            assert self.database.read(lambda s: s.execute(claimable).scalar_one()) == 0

    @rule()
    def reap(self) -> None:
        """A sweep finds only what is lost: living leases stand."""
        assert self.database.write(return_lost, POLICY) == 0

    def teardown(self) -> None:
        """The checker, which shares no code with this model, agrees."""
        assert self.database.read(check_rows).violations == []

    @rule()
    def reap_cancels(self) -> None:
        self.database.write(end_stuck_cancels, grace_seconds=-1)

    @rule()
    def wait(self) -> None:
        hurry(self.database)

    def use(self, pick: int, action: Callable[[Lease], object], *, ends: bool = True) -> None:
        """Mostly a living lease, so that jobs get somewhere, and now and then any that ever was."""
        alive = [lease for lease in self.leases if self.alive.get(lease.step_id) == lease.fence]
        candidates = alive if alive and pick % 4 else self.leases
        if candidates:
            self.apply(candidates[pick // 4 % len(candidates)], action, ends=ends)

    def apply(self, lease: Lease, action: Callable[[Lease], object], *, ends: bool) -> None:
        """Act under a lease; it must succeed exactly when the lease is alive."""
        held = self.alive.get(lease.step_id) == lease.fence
        try:
            action(lease)
        except IncompleteResult:
            assert held
            return
        except LeaseLost:
            assert not held, "a worker was refused although it held the lease"
            return
        assert held, "a worker wrote without holding the lease"
        if ends:
            del self.alive[lease.step_id]

    @invariant()
    def rows_agree(self) -> None:
        self.database.read(self.check)

    def check(self, session: Session) -> None:
        running = {
            step.id: step.fence
            for step in session.execute(select(Step).where(Step.status == StepStatus.RUNNING)).scalars()
        }
        # A failed or cancelled job ends the leases of its other steps.
        self.alive = {step: fence for step, fence in self.alive.items() if running.get(step) == fence}
        assert running == self.alive
        for job in session.execute(select(Job)).scalars():
            steps = list(session.execute(select(Step).where(Step.job_id == job.id)).scalars())
            statuses = {step.status for step in steps}
            numbers = session.execute(
                select(func.count(), func.max(Event.seq)).where(Event.job_id == job.id)
            ).one()
            assert numbers == (job.event_seq, job.event_seq), "event numbers have a gap"
            assert job.version >= job.event_seq
            if job.id in self.cancelled:
                assert job.status in (JobStatus.CANCELLING, JobStatus.CANCELLED)
            if job.status in TERMINAL:
                assert not statuses & {StepStatus.RUNNING, StepStatus.READY, StepStatus.PENDING}
                assert job.finished_at is not None
            if job.status == JobStatus.QUEUED:
                assert StepStatus.RUNNING not in statuses
                assert StepStatus.READY in statuses
            if job.status == JobStatus.SUCCEEDED:
                assert statuses == {StepStatus.SUCCEEDED}
                layers = session.execute(select(Layer.layer).where(Layer.job_id == job.id)).scalars().all()
                assert sorted(layers) == [0, 1, 2]


def test_no_order_of_events_breaks_a_job(database: SyncDatabase) -> None:
    Bound = type("Bound", (Service,), {"database": database})
    run_state_machine_as_test(
        Bound,
        settings=settings(
            max_examples=15,
            stateful_step_count=50,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
