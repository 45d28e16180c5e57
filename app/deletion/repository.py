"""Statements that delete. Objects of deleted rows go into `garbage` in the same transaction."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sqlalchemy import (
    ColumnElement,
    ColumnExpressionArgument,
    Select,
    Table,
    Text,
    cast,
    delete,
    func,
    insert,
    null,
    select,
)
from sqlalchemy.orm import InstrumentedAttribute, Session
from sqlalchemy.sql.dml import Insert

from app.artifacts import repository as artifacts
from app.artifacts.models import Artifact
from app.auth.models import Project
from app.checkpoints.models import Checkpoint, CheckpointFile
from app.datasets import repository as datasets
from app.datasets.models import Dataset
from app.infra.database import Base, now
from app.infra.garbage import Garbage
from app.jobs.models import Job, Layer, Step
from app.jobs.vocabulary import TERMINAL, StepName
from app.profiles.models import Profile

_SECONDS_A_DAY = 86_400.0
_PACKED = (StepName.PACKAGE, StepName.EVALUATE)


def lock_profile(session: Session, profile_id: str, *, project_id: str) -> Profile | None:
    """Locked against those who are about to start a job from it (see `share_profile`)."""
    statement = select(Profile).where(Profile.id == profile_id, Profile.project_id == project_id)
    return session.execute(statement.with_for_update()).scalar_one_or_none()


def lock_profile_of(session: Session, job_id: str) -> Profile | None:
    statement = select(Profile).where(Profile.job_id == job_id).with_for_update()
    return session.execute(statement).scalar_one_or_none()


def job_of_artifact(session: Session, artifact_id: str, *, project_id: str) -> str | None:
    statement = select(Artifact.job_id).where(Artifact.id == artifact_id, Artifact.project_id == project_id)
    return session.execute(statement).scalar_one_or_none()


def count_using_dataset(session: Session, dataset_id: str, *, project_id: str) -> int:
    """Jobs that have not ended and name the dataset, alone or as a part of a mixture."""
    return _count_open(session, project_id, cast(Job.spec, Text).contains(dataset_id))


def count_using_profile(session: Session, profile_id: str, *, project_id: str) -> int:
    """Jobs that have not ended and start from the profile."""
    return _count_open(session, project_id, Job.profile_id == profile_id)


def count_open_jobs(session: Session, project_id: str) -> int:
    return _count_open(session, project_id)


def _count_open(session: Session, project_id: str, *where: ColumnElement[bool]) -> int:
    statement = select(func.count(Job.id)).where(
        Job.project_id == project_id, Job.status.not_in(TERMINAL), *where
    )
    return session.execute(statement).scalar_one()


def holder_of(session: Session, artifact: str) -> str | None:
    """What needs this file: the id of a profile or of a checkpoint.

    The calibration blocks of a job count as its profile's: checkpoints of other budgets are measured on them.
    """
    columns = (Profile.json_artifact_id, Profile.tensors_artifact_id, Profile.plot_artifact_id)
    for column in columns:
        if (found := _first(session, select(Profile.id).where(column == artifact))) is not None:
            return found
    blocks = (
        select(Profile.id)
        .join(Artifact, Artifact.job_id == Profile.job_id)
        .join(Step, Step.id == Artifact.step_id)
        .where(Artifact.id == artifact, Step.name == StepName.CALIBRATE)
    )
    if (found := _first(session, blocks)) is not None:
        return found
    listed = select(CheckpointFile.checkpoint_id).where(CheckpointFile.artifact_id == artifact)
    return _first(session, listed)


def _first(session: Session, statement: Select[str]) -> str | None:
    return session.execute(statement.limit(1)).scalar_one_or_none()


def delete_dataset(session: Session, dataset_id: str) -> None:
    _bury_datasets(session, Dataset.id == dataset_id)
    session.execute(delete(Dataset).where(Dataset.id == dataset_id))


def delete_artifacts(session: Session, artifact_ids: Collection[str]) -> None:
    """Files that nothing but a layer's row refers to."""
    session.execute(delete(Layer).where(Layer.artifact_id.in_(artifact_ids)))
    _bury_artifacts(session, Artifact.id.in_(artifact_ids))
    session.execute(delete(Artifact).where(Artifact.id.in_(artifact_ids)))


def delete_profile(session: Session, profile: Profile) -> None:
    files = (profile.json_artifact_id, profile.tensors_artifact_id, profile.plot_artifact_id)
    session.execute(delete(Profile).where(Profile.id == profile.id))
    delete_artifacts(session, files)


def delete_checkpoint(session: Session, checkpoint: Checkpoint) -> None:
    """With its files, and with those that `evaluate` has replaced."""
    packed = (
        select(Artifact.id)
        .join(Step, Step.id == Artifact.step_id)
        .where(Artifact.job_id == checkpoint.job_id, Step.name.in_(_PACKED))
    )
    files = session.execute(packed).scalars().all()
    session.execute(delete(CheckpointFile).where(CheckpointFile.checkpoint_id == checkpoint.id))
    session.execute(delete(Checkpoint).where(Checkpoint.id == checkpoint.id))
    delete_artifacts(session, files)


def delete_job(session: Session, job_id: str) -> None:
    """With everything that it made, its events and its steps."""
    _bury_artifacts(session, Artifact.job_id == job_id)
    _delete_tree(session, Job, Job.id == job_id)


def delete_project(session: Session, project_id: str) -> None:
    """With every row that belongs to it, of whatever table. Audit events stay: they are append-only."""
    _bury_artifacts(session, Artifact.project_id == project_id)
    _bury_datasets(session, Dataset.project_id == project_id)
    _delete_tree(session, Project, Project.id == project_id)


def _bury_artifacts(session: Session, where: ColumnElement[bool]) -> None:
    session.execute(_tombstones(Artifact.object_key, Artifact.bytes, where))


def _bury_datasets(session: Session, where: ColumnElement[bool]) -> None:
    session.execute(_tombstones(Dataset.object_key, Dataset.bytes, where & Dataset.object_key.is_not(null())))


def _tombstones(
    key: InstrumentedAttribute[str] | InstrumentedAttribute[str | None],
    size: InstrumentedAttribute[int] | InstrumentedAttribute[int | None],
    where: ColumnElement[bool],
) -> Insert:
    columns = ["object_key", "bytes", "created_at"]
    return insert(Garbage).from_select(columns, select(key, size, now()).where(where))


def _delete_tree(session: Session, root: type[Base], which: ColumnExpressionArgument[bool]) -> None:
    """Delete rows with all rows that refer to them, directly or through others."""
    tables = Base.metadata.sorted_tables
    top = tables[[table.name for table in tables].index(root.__tablename__)]
    for table in reversed(tables):
        if table is top:
            session.execute(delete(table).where(which))
        elif (condition := _below(table, top, which)) is not None:
            session.execute(delete(table).where(condition))
    session.expire_all()


def _below(table: Table, top: Table, which: ColumnExpressionArgument[bool]) -> ColumnElement[bool] | None:
    """Which rows of a table belong to the rows of another; None when none can.

    A foreign key to the top itself goes before a way round: it says the same in one step.
    """
    for key in sorted(table.foreign_keys, key=lambda key: key.column.table is not top):
        parent = key.column.table
        if parent is top:
            return key.parent.in_(select(key.column).where(which))
        if parent is not table and (above := _below(parent, top, which)) is not None:
            return key.parent.in_(select(key.column).where(above))
    return None


def retentions(session: Session) -> dict[str, int]:
    """Days by project, where they are limited."""
    statement = select(Project.id, Project.max_retention_days).where(
        Project.max_retention_days.is_not(null())
    )
    return {row[0]: row[1] or 0 for row in session.execute(statement)}


def expired_jobs(session: Session, project_id: str, *, days: int, limit: int) -> list[str]:
    statement = (
        select(Job.id)
        .where(
            Job.project_id == project_id,
            Job.status.in_(TERMINAL),
            Job.finished_at < now(-days * _SECONDS_A_DAY),
        )
        .order_by(Job.finished_at)
        .limit(limit)
    )
    return list(session.execute(statement).scalars())


def unfinished_uploads(session: Session, *, age_seconds: float, limit: int) -> list[tuple[str, str]]:
    """(id, project) of datasets that were announced this long ago and never confirmed."""
    statement = (
        select(Dataset.id, Dataset.project_id)
        .where(Dataset.completed_at.is_(null()), Dataset.created_at < now(-age_seconds))
        .order_by(Dataset.id)
        .limit(limit)
    )
    return [(row[0], row[1]) for row in session.execute(statement)]


def garbage(session: Session, *, age_seconds: float, limit: int) -> list[str]:
    """Keys whose bytes are to go."""
    statement = (
        select(Garbage.object_key)
        .where(Garbage.created_at <= now(-age_seconds))
        .order_by(Garbage.created_at)
        .limit(limit)
    )
    return list(session.execute(statement).scalars())


def known_keys(session: Session, keys: Collection[str]) -> set[str]:
    """Which of these object keys belong to a row of any kind."""
    return artifacts.known_keys(session, keys) | datasets.known_keys(session, keys)


def forget_garbage(session: Session, keys: Iterable[str]) -> None:
    session.execute(delete(Garbage).where(Garbage.object_key.in_(list(keys))))
