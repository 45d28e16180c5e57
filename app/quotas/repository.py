"""Statements that count what a project uses. Always of the rows themselves: a sum cannot drift."""

from __future__ import annotations

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from app.artifacts.models import Artifact
from app.datasets.models import Dataset
from app.jobs.models import Job, Step
from app.jobs.vocabulary import JobStatus, StepStatus


def count_queued_jobs(session: Session, project_id: str) -> int:
    return _one(session, func.count(Job.id), Job.project_id == project_id, Job.status == JobStatus.QUEUED)


def count_running_jobs(session: Session, project_id: str) -> int:
    running = (JobStatus.RUNNING, JobStatus.CANCELLING)
    return _one(session, func.count(Job.id), Job.project_id == project_id, Job.status.in_(running))


def count_running_steps(session: Session, project_id: str) -> int:
    return _one(
        session,
        func.count(Step.id),
        Step.status == StepStatus.RUNNING,
        Step.job_id == Job.id,
        Job.project_id == project_id,
    )


def stored_bytes(session: Session, project_id: str) -> int:
    """Bytes of uploads and of everything that jobs have made."""
    uploads = func.sum(func.coalesce(Dataset.bytes, 0))
    return _one(session, uploads, Dataset.project_id == project_id) + _one(
        session, func.sum(Artifact.bytes), Artifact.project_id == project_id
    )


def _one(session: Session, amount: ColumnElement[int], *where: ColumnElement[bool]) -> int:
    return int(session.execute(select(func.coalesce(amount, 0)).where(*where)).scalar_one())
