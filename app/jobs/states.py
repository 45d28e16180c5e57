"""The only place where the status of a job or a step changes.

Callers hold the job's row lock (`repository.lock_job`) and pass rows of the current transaction, so that
status, version, event number, event and webhook deliveries are one change or none.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import structlog
from sqlalchemy.orm import Session

from app.infra import failpoints
from app.infra.counted import JOBS
from app.infra.database import after_commit, clock
from app.jobs.models import Event, Job, Step
from app.jobs.vocabulary import (
    ENDED_STEPS,
    JOB_EDGES,
    STEP_EDGES,
    TERMINAL,
    JobErrorCode,
    JobStatus,
    StepStatus,
)
from app.webhooks.outbox import enqueue

log = structlog.get_logger(__name__)

# From zero, so that the first one shows as a rise.
for _status in (JobStatus.SUCCEEDED, JobStatus.CANCELLED):
    JOBS.labels(_status, "")
for _code in JobErrorCode:
    JOBS.labels(JobStatus.FAILED, _code)


class IllegalTransition(Exception):
    """A change that the edge table does not have: a defect of the caller, never of the client."""

    def __init__(self, what: str, old: str, new: str) -> None:
        super().__init__(f"{what} cannot go from {old} to {new}")


def transition(
    session: Session, job: Job, to: JobStatus, *, event: str, data: dict[str, Any] | None = None
) -> None:
    """Move a job along an allowed edge and record why."""
    if to not in JOB_EDGES[JobStatus(job.status)]:
        raise IllegalTransition(job.id, job.status, to)
    failpoints.hit("transition.enter")
    failpoints.hit_after_commit(session, "transition.committed")
    job.status = to
    moment = clock(session)
    if to is JobStatus.RUNNING and job.started_at is None:
        job.started_at = moment
    if to is JobStatus.RUNNING and job.deadline_at is None and job.max_runtime_minutes is not None:
        job.deadline_at = moment + timedelta(minutes=job.max_runtime_minutes)
    if to is JobStatus.CANCELLING:
        job.cancel_requested_at = moment
    job.finished_at = moment if to in TERMINAL else None
    record(session, job, event, data)
    failpoints.hit("transition.recorded")
    after_commit(session, partial(log.info, event, job_id=job.id, status=to))
    if to in TERMINAL:
        code = (job.error or {}).get("code", "") if to is JobStatus.FAILED else ""
        after_commit(session, JOBS.labels(to, code).inc)


def record(session: Session, job: Job, event: str, data: dict[str, Any] | None = None) -> None:
    """Add an event; the job's version rises with it."""
    touch(job)
    job.event_seq += 1
    session.add(Event(job_id=job.id, seq=job.event_seq, type=event, data=data or {}))
    enqueue(session, job, event)


def touch(job: Job) -> None:
    """Note a visible change that deserves no event, such as progress."""
    job.version += 1


def move_step(session: Session, step: Step, to: StepStatus, *, error: dict[str, Any] | None = None) -> None:
    """Move a step along an allowed edge. Leaving `running` ends the lease and raises the fence.

    With the raised fence nobody who held the lease before can write again, whoever ended it.
    """
    old = StepStatus(step.status)
    if to not in STEP_EDGES[old]:
        raise IllegalTransition(step.id, old, to)
    step.status = to
    step.error = error
    if old is StepStatus.RUNNING:
        step.fence += 1
        step.lease_owner = None
        step.lease_expires_at = None
    step.finished_at = clock(session) if to in ENDED_STEPS else None
