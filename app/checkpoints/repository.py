"""Statements over checkpoints."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.artifacts.models import Artifact
from app.checkpoints.models import Checkpoint, CheckpointFile
from app.http.pagination import Cursor, cut


def find_checkpoint(session: Session, checkpoint_id: str, *, project_id: str) -> Checkpoint | None:
    statement = select(Checkpoint).where(Checkpoint.id == checkpoint_id, Checkpoint.project_id == project_id)
    return session.execute(statement).scalar_one_or_none()


def list_checkpoints(
    session: Session, cursor: Cursor, *, project_id: str, profile_id: str | None = None
) -> tuple[list[Checkpoint], bool]:
    statement = select(Checkpoint)
    if profile_id is not None:
        statement = statement.where(Checkpoint.profile_id == profile_id)
    return cut(session, statement, Checkpoint.id, cursor, within=Checkpoint.project_id == project_id)


def manifest(session: Session, checkpoint_id: str) -> list[Artifact]:
    """Files of a checkpoint by name."""
    statement = (
        select(Artifact)
        .join(CheckpointFile, CheckpointFile.artifact_id == Artifact.id)
        .where(CheckpointFile.checkpoint_id == checkpoint_id)
        .order_by(CheckpointFile.filename)
    )
    return list(session.execute(statement).scalars())
