"""Statements over jobs, steps, layers and events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from sqlalchemy import Float, Integer, Select, bindparam, func, or_, select, update
from sqlalchemy.orm import Session, aliased
from sqlalchemy.sql.dml import ReturningUpdate

from app.auth.models import Project
from app.auth.repository import lock_project
from app.http.pagination import Cursor, cut
from app.infra.database import clock, now
from app.jobs.models import Event, Job, Layer, Step
from app.jobs.vocabulary import JobStatus, StepStatus

# What every poll of a client asks: made once, since that costs as much as running it.
_FIND_JOB = select(Job).where(Job.id == bindparam("id"), Job.project_id == bindparam("project"))
_STEPS_OF = (
    select(Step)
    .where(Step.job_id.in_(bindparam("jobs", expanding=True)))
    .order_by(Step.job_id, Step.stage, Step.ordinal)
)


def get_job(session: Session, job_id: str) -> Job | None:
    """A job of any project: for workers."""
    return session.get(Job, job_id)


def find_job(session: Session, job_id: str, *, project_id: str) -> Job | None:
    return session.execute(_FIND_JOB, {"id": job_id, "project": project_id}).scalar_one_or_none()


def jobs_by_ids(session: Session, job_ids: Iterable[str]) -> dict[str, Job]:
    statement = select(Job).where(Job.id.in_(list(job_ids)))
    return {job.id: job for job in session.execute(statement).scalars()}


def get_version(session: Session, job_id: str) -> tuple[int, str] | None:
    """Version and status alone, of a job of any project: what a heartbeat asks for."""
    row = session.execute(select(Job.version, Job.status).where(Job.id == job_id)).one_or_none()
    return None if row is None else (row[0], row[1])


@dataclass(frozen=True)
class Moment:
    """How far a job is: what those who wait for it compare."""

    version: int
    event_seq: int
    status: str


def moments(session: Session, job_ids: Sequence[str]) -> dict[str, Moment]:
    """Of jobs of any project: for those that a route has already found in the client's own."""
    statement = select(Job.id, Job.version, Job.event_seq, Job.status).where(Job.id.in_(job_ids))
    return {row[0]: Moment(*row[1:]) for row in session.execute(statement)}


def find_version(session: Session, job_id: str, *, project_id: str) -> tuple[int, str] | None:
    """Version and status alone."""
    statement = select(Job.version, Job.status).where(Job.id == job_id, Job.project_id == project_id)
    row = session.execute(statement).one_or_none()
    return None if row is None else (row[0], row[1])


def lock_job(session: Session, job_id: str) -> Job | None:
    """The job, of any project, locked until the transaction ends.

    Locks are taken job first, then step, then project: never the other way.
    """
    return _locked(session, select(Job).where(Job.id == job_id))


def find_locked_job(session: Session, job_id: str, *, project_id: str) -> Job | None:
    """As `lock_job`, for a client."""
    return _locked(session, select(Job).where(Job.id == job_id, Job.project_id == project_id))


def _locked(session: Session, statement: Select[Job]) -> Job | None:
    options = {"populate_existing": True}
    return session.execute(statement.with_for_update(), execution_options=options).scalar_one_or_none()


def list_jobs(
    session: Session,
    cursor: Cursor,
    *,
    project_id: str,
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
    return cut(session, statement, Job.id, cursor, within=Job.project_id == project_id)


def steps_of(session: Session, job_ids: Iterable[str]) -> list[Step]:
    """Steps of these jobs in the order in which they run."""
    return list(session.execute(_STEPS_OF, {"jobs": list(job_ids)}).scalars())


def count_running(session: Session, job_id: str) -> int:
    statement = select(func.count()).where(Step.job_id == job_id, Step.status == StepStatus.RUNNING)
    return session.execute(statement).scalar_one()


def claim_step(
    session: Session,
    *,
    owner: str,
    lease_seconds: float,
    max_running_steps: int | None,
    gpu_classes: Sequence[str],
) -> Step | None:
    """Take the first ready step of these classes in one statement and raise its fence.

    `SKIP LOCKED` on the step and on its job: claimers never wait for each other, nor for a commit of the same
    job, and with no waiting there is no deadlock with those who lock the job first.
    """
    values = {
        "owner": owner,
        "lease_seconds": lease_seconds,
        "running_limit": max_running_steps,
        "classes": list(gpu_classes),
    }
    options = {"synchronize_session": False}
    return session.execute(_claim_statement(), values, execution_options=options).scalar_one_or_none()


@cache
def _claim_statement() -> ReturningUpdate[Step]:
    """Built once: making it costs more than running it, and idle workers ask all the time."""
    ready = aliased(Step)
    first = (
        select(ready.id)
        .join(Job, Job.id == ready.job_id)
        .where(
            ready.status == StepStatus.READY,
            ready.gpu_class.in_(bindparam("classes", expanding=True)),
            ready.not_before <= now(),
            Job.status.in_((JobStatus.QUEUED, JobStatus.RUNNING)),
            Job.project_id.not_in(_busy_projects()),
        )
        .order_by(ready.precedence, ready.job_id, ready.stage, ready.ordinal)
        .limit(1)
        .with_for_update(of=(ready, Job), skip_locked=True)
        .scalar_subquery()
    )
    return (
        update(Step)
        .where(Step.id == first)
        .values(
            status=StepStatus.RUNNING,
            fence=Step.fence + 1,
            attempts=Step.attempts + 1,
            lease_owner=bindparam("owner"),
            lease_expires_at=now(bindparam("lease_seconds", type_=Float)),
            started_at=now(),
            finished_at=None,
        )
        .returning(Step)
    )


def _busy_projects() -> Select[str]:
    """Projects whose limit of running steps is reached. Found once a claim: few steps run at a time."""
    running, owner = aliased(Step), aliased(Job)
    limit = func.coalesce(Project.max_running_steps, bindparam("running_limit", type_=Integer))
    return (
        select(Project.id)
        .join(owner, owner.project_id == Project.id)
        .join(running, running.job_id == owner.id)
        .where(running.status == StepStatus.RUNNING)
        .group_by(Project.id, Project.max_running_steps)
        .having(func.count() >= limit)
    )


def exceeds_running_limit(session: Session, project_id: str, *, max_running_steps: int | None) -> bool:
    """Whether a project runs more steps than it may, asked one claim at a time."""
    own = select(Project.max_running_steps).where(Project.id == project_id)
    limit = session.execute(own).scalar_one()
    limit = max_running_steps if limit is None else limit
    if limit is None:
        return False
    lock_project(session, project_id)
    statement = select(func.count()).where(
        Step.status == StepStatus.RUNNING, Step.job_id == Job.id, Job.project_id == project_id
    )
    return session.execute(statement).scalar_one() > limit


def extend_lease(session: Session, *, step_id: str, fence: int, lease_seconds: float) -> bool:
    statement = (
        update(Step)
        .where(Step.id == step_id, Step.fence == fence, Step.status == StepStatus.RUNNING)
        .values(lease_expires_at=now(lease_seconds))
        .returning(Step.id)
    )
    result = session.execute(statement, execution_options={"synchronize_session": False})
    return result.scalar_one_or_none() is not None


def is_overdue(session: Session, job_id: str) -> bool:
    """Whether the job's own time is up."""
    statement = select(Job.id).where(Job.id == job_id, Job.deadline_at < now())
    return session.execute(statement).scalar_one_or_none() is not None


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
    """(job, step, fence) of leases that ran out, or of every lease of a worker known to be dead; by job."""
    lost = Step.lease_expires_at < now() if owner is None else Step.lease_owner == owner
    statement = select(Step.job_id, Step.id, Step.fence).where(
        Step.status == StepStatus.RUNNING,
        # Always so; it leads to `ix_step_lease`, the index over running steps.
        Step.lease_expires_at.is_not(None),
        lost,
    )
    # Sorted here: for an ORDER BY, SQLite would walk every step that there ever was in its order, under the write lock.
    return sorted((row[0], row[1], row[2]) for row in session.execute(statement))


def stuck_cancels(session: Session, *, grace_seconds: float) -> list[str]:
    statement = (
        select(Job.id)
        .where(
            Job.status == JobStatus.CANCELLING,
            # A request in the future was made before the clock was put back: nobody will answer it.
            or_(Job.cancel_requested_at < now(-grace_seconds), Job.cancel_requested_at > now(grace_seconds)),
        )
        .order_by(Job.id)
    )
    return list(session.execute(statement).scalars())


def hurry_late_steps(session: Session, *, delay_seconds: float) -> int:
    """Make steps ready that would wait longer than anything waits: the clock was put back. Returns how many."""
    statement = (
        update(Step)
        .where(Step.status == StepStatus.READY, Step.not_before > now(delay_seconds))
        .values(not_before=now())
        .returning(Step.id)
    )
    return _count(session, statement)


def shorten_long_leases(session: Session, *, limit_seconds: float, lease_seconds: float) -> int:
    """End leases soon that run longer than any lease does, for the same reason. Returns how many.

    One that is still held is extended by its next heartbeat.
    """
    statement = (
        update(Step)
        .where(Step.status == StepStatus.RUNNING, Step.lease_expires_at > now(limit_seconds))
        .values(lease_expires_at=now(lease_seconds))
        .returning(Step.id)
    )
    return _count(session, statement)


def _count(session: Session, statement: ReturningUpdate[str]) -> int:
    result = session.execute(statement, execution_options={"synchronize_session": False})
    return len(result.scalars().all())


def count_waiting(session: Session, *, older_than_seconds: float = 0.0) -> dict[str, int]:
    """Ready steps that nobody has claimed for this long, by GPU class."""
    statement = (
        select(Step.gpu_class, func.count())
        .where(Step.status == StepStatus.READY, Step.not_before <= now(-older_than_seconds))
        .group_by(Step.gpu_class)
        .order_by(Step.gpu_class)
    )
    return {row[0]: row[1] for row in session.execute(statement)}


def count_jobs(session: Session) -> dict[tuple[str, str], int]:
    """How many jobs there are by (status, code); the code of jobs that did not fail is empty.

    Counted along an index; only failed jobs are read themselves.
    """
    by_status = select(Job.status, func.count()).group_by(Job.status)
    found = {(row[0], ""): row[1] for row in session.execute(by_status) if row[0] != JobStatus.FAILED}
    code = Job.error["code"].as_string()
    failed = select(code, func.count()).where(Job.status == JobStatus.FAILED).group_by(code)
    return found | {(JobStatus.FAILED, row[0] or ""): row[1] for row in session.execute(failed)}


def waiting_by_class(session: Session) -> dict[str, tuple[int, float]]:
    """Steps that could run now, by GPU class: how many, and for how many seconds the oldest has waited."""
    statement = (
        select(Step.gpu_class, func.count(), func.min(Step.not_before))
        .where(Step.status == StepStatus.READY, Step.not_before <= now())
        .group_by(Step.gpu_class)
    )
    rows = session.execute(statement).all()
    moment = clock(session)
    return {row[0]: (row[1], max(0.0, (moment - row[2]).total_seconds())) for row in rows}


def running_by_class(session: Session) -> dict[str, int]:
    statement = (
        select(Step.gpu_class, func.count()).where(Step.status == StepStatus.RUNNING).group_by(Step.gpu_class)
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


def events_after(session: Session, job_id: str, *, after: int, limit: int) -> list[Event]:
    statement = (
        select(Event).where(Event.job_id == job_id, Event.seq > after).order_by(Event.seq).limit(limit)
    )
    return list(session.execute(statement).scalars())
