"""Statements over artifacts."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.artifacts.models import Artifact
from app.auth.models import Project
from app.jobs.models import Job, Step


def find_artifact(session: Session, artifact_id: str, *, project_id: str) -> Artifact | None:
    statement = select(Artifact).where(Artifact.id == artifact_id, Artifact.project_id == project_id)
    return session.execute(statement).scalar_one_or_none()


def files_of_job(session: Session, job_id: str, *steps: str) -> dict[str, Artifact]:
    """Committed files that these steps of a job made, by file name."""
    statement = (
        select(Artifact)
        .join(Step, Step.id == Artifact.step_id)
        .where(Artifact.job_id == job_id, Step.name.in_(steps))
        .order_by(Step.stage, Artifact.filename)
    )
    return {artifact.filename: artifact for artifact in session.execute(statement).scalars()}


def by_ids(session: Session, artifact_ids: Iterable[str]) -> dict[str, Artifact]:
    statement = select(Artifact).where(Artifact.id.in_(list(artifact_ids)))
    return {artifact.id: artifact for artifact in session.execute(statement).scalars()}


def ends_of_jobs(session: Session, job_ids: Iterable[str]) -> dict[str, tuple[datetime | None, int | None]]:
    """When these jobs ended, and the days that their project keeps them from then on."""
    statement = (
        select(Job.id, Job.finished_at, Project.max_retention_days)
        .join(Project, Project.id == Job.project_id)
        .where(Job.id.in_(set(job_ids)))
    )
    return {row[0]: (row[1], row[2]) for row in session.execute(statement)}


def known_keys(session: Session, keys: Iterable[str]) -> set[str]:
    """Which of these object keys belong to a row."""
    statement = select(Artifact.object_key).where(Artifact.object_key.in_(list(keys)))
    return set(session.execute(statement).scalars())
