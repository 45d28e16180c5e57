"""Table of profiles."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.infra.database import Base, Id, Json, UtcDateTime, now


class Profile(Base):
    """The error of every layer at every candidate rank, as files."""

    __tablename__ = "profile"
    __table_args__ = (Index(None, "project_id", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), unique=True)
    summary: Mapped[dict[str, Any]] = mapped_column(Json)
    json_artifact_id: Mapped[str] = mapped_column(ForeignKey("artifact.id"), index=True)
    tensors_artifact_id: Mapped[str] = mapped_column(ForeignKey("artifact.id"), index=True)
    plot_artifact_id: Mapped[str] = mapped_column(ForeignKey("artifact.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
