"""Tables of checkpoints and of their files."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from app.infra.database import Base, Id, Json, UtcDateTime, now


class Checkpoint(Base):
    """A finished checkpoint: packed, loaded again and measured. It exists only once its job has succeeded."""

    __tablename__ = "checkpoint"
    __table_args__ = (Index(None, "project_id", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), unique=True)
    profile_id: Mapped[str] = mapped_column(Id, index=True)
    """No foreign key: a checkpoint is whole without the profile that it was made from."""
    form: Mapped[str] = mapped_column(String(16))
    budget: Mapped[dict[str, Any]] = mapped_column(Json)
    plan: Mapped[dict[str, Any]] = mapped_column(Json)
    measured: Mapped[dict[str, Any]] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())


class CheckpointFile(Base):
    """One line of a checkpoint's manifest."""

    __tablename__ = "checkpoint_file"

    checkpoint_id: Mapped[str] = mapped_column(ForeignKey("checkpoint.id"), primary_key=True)
    filename: Mapped[str] = mapped_column(String(255), primary_key=True)
    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifact.id"), index=True)
