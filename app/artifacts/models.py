"""Table of artifacts."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.infra.database import Base, Id, UtcDateTime, now


class Artifact(Base):
    """One immutable file. The object was complete and verified before this row was written."""

    __tablename__ = "artifact"
    __table_args__ = (
        UniqueConstraint("step_id", "filename"),
        Index(None, "project_id", "bytes"),  # the sum of a project is read from the index alone
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), index=True)
    step_id: Mapped[str] = mapped_column(ForeignKey("step.id"))
    fence: Mapped[int] = mapped_column(Integer)
    filename: Mapped[str] = mapped_column(String(255))
    object_key: Mapped[str] = mapped_column(String(512), unique=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    media_type: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
