"""Statements over jobs, steps and layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, aliased

from app.database import now
from app.jobs.models import Job, Layer, Step
from app.jobs.vocabulary import JobStatus, StepStatus
from app.pagination import Cursor, cut


def get_job(session: Session, job_id: str) -> Job | None:
    return session.get(Job, job_id)


def jobs_by_ids(session: Session, job_ids: Iterable[str]) -> dict[str, Job]:
    statement = select(Job).where(Job.id.in_(list(job_ids)))
    return {job.id: job for job in session.execute(statement).scalars()}


def get_version(session: Session, job_id: str) -> tuple[int, str] | None:
    """Version and status alone: what a waiting client asks for again and again."""
    row = session.execute(select(Job.version, Job.status).where(Job.id == job_id)).one_or_none()
    return None if row is None else (row[0], row[1])


def lock_job(session: Session, job_id: str) -> Job | None:
    """The job, locked until the transaction ends.

    Locks are taken job first, then step: never the other way.
    """
    statement = select(Job).where(Job.id == job_id).with_for_update()
    return session.execute(statement, execution_options={"populate_existing": True}).scalar_one_or_none()


def list_jobs(
    session: Session,
    cursor: Cursor,
    *,
    status: JobStatus | None = None,
    model: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> tuple[list[Job], bool]:
    """One page of jobs and whether more follow."""
    statement = select(Job)
    if status is not None:
        statement = statement.where(Job.status == status)
    if model is not None:
        statement = statement.where(Job.model_id == model)
    for key, value in (labels or {}).items():
        statement = statement.where(Job.labels[key].as_string() == value)
    return cut(session, statement, Job.id, cursor)


def steps_of(session: Session, job_ids: Iterable[str]) -> list[Step]:
    """Steps of these jobs in the order in which they run."""
    statement = (
        select(Step).where(Step.job_id.in_(list(job_ids))).order_by(Step.job_id, Step.stage, Step.ordinal)
    )
    return list(session.execute(statement).scalars())


def count_running(session: Session, job_id: str) -> int:
    statement = select(func.count()).where(Step.job_id == job_id, Step.status == StepStatus.RUNNING)
    return session.execute(statement).scalar_one()


def claim_step(
    session: Session, *, owner: str, lease_seconds: float, gpu_classes: Sequence[str]
) -> Step | None:
    """Take the first ready step of these classes in one statement and raise its fence.

    `SKIP LOCKED` on the step and on its job: claimers never wait for each other, nor for a commit of the same
    job, and with no waiting there is no deadlock with those who lock the job first.
    """
    ready = aliased(Step)
    first = (
        select(ready.id)
        .join(Job, Job.id == ready.job_id)
        .where(
            ready.status == StepStatus.READY,
            ready.gpu_class.in_(gpu_classes),
            ready.not_before <= now(),
            Job.status.in_((JobStatus.QUEUED, JobStatus.RUNNING)),
        )
        .order_by(ready.precedence, ready.job_id, ready.stage, ready.ordinal)
        .limit(1)
        .with_for_update(of=(ready, Job), skip_locked=True)
        .scalar_subquery()
    )
    statement = (
        update(Step)
        .where(Step.id == first)
        .values(
            status=StepStatus.RUNNING,
            fence=Step.fence + 1,
            attempts=Step.attempts + 1,
            lease_owner=owner,
            lease_expires_at=now(lease_seconds),
            started_at=now(),
            finished_at=None,
        )
        .returning(Step)
    )
    return session.execute(statement, execution_options={"synchronize_session": False}).scalar_one_or_none()


def extend_lease(session: Session, *, step_id: str, fence: int, lease_seconds: float) -> bool:
    statement = (
        update(Step)
        .where(Step.id == step_id, Step.fence == fence, Step.status == StepStatus.RUNNING)
        .values(lease_expires_at=now(lease_seconds))
        .returning(Step.id)
    )
    result = session.execute(statement, execution_options={"synchronize_session": False})
    return result.scalar_one_or_none() is not None


def lock_step(session: Session, *, step_id: str, fence: int, overdue: bool = False) -> Step | None:
    """The running step of exactly this fence, locked.

    None when the lease is over (or, asked so, is not yet).
    """
    statement = select(Step).where(Step.id == step_id, Step.fence == fence, Step.status == StepStatus.RUNNING)
    if overdue:
        statement = statement.where(Step.lease_expires_at < now())
    return session.execute(
        statement.with_for_update(), execution_options={"populate_existing": True}
    ).scalar_one_or_none()


def lost_steps(session: Session, *, owner: str | None = None) -> list[tuple[str, str, int]]:
    """(job, step, fence) of leases that ran out, or of every lease of a worker known to be dead."""
    overdue = Step.lease_expires_at < now() if owner is None else Step.lease_owner == owner
    statement = (
        select(Step.job_id, Step.id, Step.fence)
        .where(Step.status == StepStatus.RUNNING, overdue)
        .order_by(Step.job_id)
    )
    return [(row[0], row[1], row[2]) for row in session.execute(statement)]


def stuck_cancels(session: Session, *, grace_seconds: float) -> list[str]:
    statement = (
        select(Job.id)
        .where(Job.status == JobStatus.CANCELLING, Job.cancel_requested_at < now(-grace_seconds))
        .order_by(Job.id)
    )
    return list(session.execute(statement).scalars())


def count_waiting(session: Session, *, older_than_seconds: float = 0.0) -> dict[str, int]:
    """Ready steps that nobody has claimed for this long, by GPU class."""
    statement = (
        select(Step.gpu_class, func.count())
        .where(Step.status == StepStatus.READY, Step.not_before <= now(-older_than_seconds))
        .group_by(Step.gpu_class)
        .order_by(Step.gpu_class)
    )
    return {row[0]: row[1] for row in session.execute(statement)}


def live_fences(session: Session) -> set[tuple[str, int]]:
    """(step, fence) of every running step: its objects may still await their rows."""
    statement = select(Step.id, Step.fence).where(Step.status == StepStatus.RUNNING)
    return {(row[0], row[1]) for row in session.execute(statement)}


def committed_layers(session: Session, job_id: str) -> list[Layer]:
    return list(session.execute(select(Layer).where(Layer.job_id == job_id).order_by(Layer.layer)).scalars())


def count_layers(session: Session, job_id: str) -> int:
    return session.execute(select(func.count()).where(Layer.job_id == job_id)).scalar_one()
