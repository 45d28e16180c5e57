"""Leases on steps: taken by a claim, kept by heartbeats, ended by exactly one of the functions below.

Every function runs in the caller's transaction. `hold` is the guard in front of each write of a worker: it
locks the job and finds the step only if the fence is still the worker's own, so a worker that lost its lease
writes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.infra.database import now
from app.jobs import repository
from app.jobs.models import Job, Step
from app.jobs.states import move_step, record, transition
from app.jobs.vocabulary import JobErrorCode, JobStatus, StepName, StepStatus
from app.settings import DEFAULT_GPU_CLASS


class LeaseLost(Exception):
    """The step is no longer this worker's: stop at once, write nothing."""


class TimeUp(Exception):
    """The job has used its time: stop, and fail it."""


@dataclass(frozen=True)
class Lease:
    """Proof of a claim."""

    job_id: str
    step_id: str
    step: StepName
    fence: int
    attempt: int
    gpu_class: str
    traceparent: str | None = None

    def about(self) -> dict[str, str | int]:
        """What every line of the log says about this attempt."""
        return {
            "job_id": self.job_id,
            "step_id": self.step_id,
            "step": self.step,
            "attempt": self.attempt,
            "fence": self.fence,
        }


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended without a result. `layer` and `best` are known only for some codes."""

    code: JobErrorCode
    message: str
    retryable: bool
    layer: int | None = None
    best: float | None = None


@dataclass(frozen=True)
class RetryPolicy:
    max_failures: int
    backoff_seconds: float


TIME_UP = Failure(
    JobErrorCode.TIME_LIMIT_EXCEEDED, "The job has used all of its max_runtime_minutes.", retryable=False
)
WORKER_LOST = Failure(JobErrorCode.WORKER_LOST, "The worker died or lost its connection.", retryable=True)


def claim(
    session: Session,
    *,
    owner: str,
    lease_seconds: float,
    max_running_steps: int | None,
    gpu_classes: Sequence[str] = (DEFAULT_GPU_CLASS,),
) -> Lease | None:
    """Take the next ready step of these classes, or None when there is none that its project may run now.

    `max_running_steps` is the limit of projects that have none of their own; None: no limit.
    """
    with session.begin_nested() as attempt:
        step = repository.claim_step(
            session,
            owner=owner,
            lease_seconds=lease_seconds,
            max_running_steps=max_running_steps,
            gpu_classes=gpu_classes,
        )
        if step is None:
            return None
        job = repository.lock_job(session, step.job_id)
        assert job is not None, "a step's foreign key keeps its job"
        # The claim saw room, and so may have another at the same time: the later one gives way.
        if repository.exceeds_running_limit(session, job.project_id, max_running_steps=max_running_steps):
            attempt.rollback()
            return None
    name = StepName(step.name)
    about = {
        "step": name,
        "ordinal": step.ordinal,
        "attempt": step.attempts,
        "fence": step.fence,
        "worker": owner,
    }
    if job.phase != name.phase:
        job.phase = name.phase
        job.progress = None
        record(session, job, "phase.changed", {"phase": job.phase})
    if job.status == JobStatus.QUEUED:
        transition(session, job, JobStatus.RUNNING, event="job.started", data=about)
    else:
        record(session, job, "step.started", about)
    return Lease(
        job.id,
        step.id,
        name,
        step.fence,
        attempt=step.attempts,
        gpu_class=step.gpu_class,
        traceparent=job.traceparent,
    )


def beat(session: Session, lease: Lease, *, lease_seconds: float) -> bool:
    """Extend the lease; True when the job is to be cancelled. Raises `LeaseLost` and `TimeUp`."""
    kept = repository.extend_lease(
        session, step_id=lease.step_id, fence=lease.fence, lease_seconds=lease_seconds
    )
    version = repository.get_version(session, lease.job_id)
    if not kept or version is None:
        raise LeaseLost
    if version[1] == JobStatus.CANCELLING:
        return True
    if repository.is_overdue(session, lease.job_id):
        raise TimeUp
    return False


def hold(session: Session, lease: Lease) -> tuple[Job, Step]:
    """The locked job and step of a lease that still stands."""
    job = repository.lock_job(session, lease.job_id)
    step = repository.lock_step(session, step_id=lease.step_id, fence=lease.fence)
    if job is None or step is None:
        raise LeaseLost
    return job, step


def release(session: Session, lease: Lease) -> None:
    """Give the step back at no cost: a planned shutdown."""
    job, step = hold(session, lease)
    if _ends_cancelled(session, job, step):
        return
    step.not_before = now()  # it waits from here on
    move_step(session, step, StepStatus.READY)
    _requeue(
        session,
        job,
        "attempt.released",
        {"step": step.name, "ordinal": step.ordinal, "attempt": step.attempts},
    )


def acknowledge_cancel(session: Session, lease: Lease) -> None:
    """The worker has stopped a cancelled step."""
    job, step = hold(session, lease)
    if not _ends_cancelled(session, job, step):
        raise LeaseLost


def fail(session: Session, lease: Lease, failure: Failure, policy: RetryPolicy) -> bool:
    """End an attempt that failed.

    Try the step again later, or fail the job. True when it will be tried again.
    """
    job, step = hold(session, lease)
    return end_attempt(session, job, step, failure, policy)


def end_attempt(session: Session, job: Job, step: Step, failure: Failure, policy: RetryPolicy) -> bool:
    """As `fail`, for a step already locked (the reaper has no lease of its own)."""
    if _ends_cancelled(session, job, step):
        return False
    error = {**asdict(failure), "attempt": step.attempts}
    step.failures += 1
    if failure.retryable and step.failures < _allowed(step, failure, policy):
        delay = policy.backoff_seconds * 2 ** (step.failures - 1) * random.uniform(0.5, 1.5)
        step.not_before = now(delay)  # an SQL expression until the flush
        move_step(session, step, StepStatus.READY, error=error)
        lost = {
            "step": step.name,
            "ordinal": step.ordinal,
            "failures": step.failures,
            "code": failure.code,
            "layer": failure.layer,
        }
        _requeue(session, job, "attempt.lost", lost)
        return True
    move_step(session, step, StepStatus.FAILED, error=error)
    stop_others(session, job)
    job.error = {**error, "phase": job.phase}
    transition(session, job, JobStatus.FAILED, event="job.failed", data={"error": job.error})
    return False


def _allowed(step: Step, failure: Failure, policy: RetryPolicy) -> int:
    """How many failures end the step: fewer where trying again cannot help."""
    before: dict[str, Any] = step.error or {}
    same_layer = failure.layer is not None and before.get("layer") == failure.layer
    if same_layer and before.get("code") == failure.code:
        return 0  # the same layer fails in the same way: poison
    if failure.code is JobErrorCode.OUT_OF_MEMORY:
        return min(2, policy.max_failures)
    return policy.max_failures


def _ends_cancelled(session: Session, job: Job, step: Step) -> bool:
    """End a running step of a cancelling job; whatever it was about to report no longer counts."""
    if job.status != JobStatus.CANCELLING:
        return False
    move_step(session, step, StepStatus.CANCELLED)
    if repository.count_running(session, job.id) == 0:
        transition(session, job, JobStatus.CANCELLED, event="job.cancelled")
    return True


def _requeue(session: Session, job: Job, event: str, data: dict[str, Any]) -> None:
    """Record the event; the job itself waits again when none of its steps runs."""
    if repository.count_running(session, job.id) == 0:
        transition(session, job, JobStatus.QUEUED, event=event, data=data)
    else:
        record(session, job, event, data)


def stop_others(session: Session, job: Job, *, running: bool = True) -> None:
    """Cancel every step that has not ended.

    The raised fence tells running ones at their next write or heartbeat.
    """
    for step in repository.steps_of(session, [job.id]):
        waiting = step.status in (StepStatus.PENDING, StepStatus.READY)
        if waiting or (running and step.status == StepStatus.RUNNING):
            move_step(session, step, StepStatus.CANCELLED)
