"""Table of datasets."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from app.infra.database import Base, Id, UtcDateTime, now


class Dataset(Base):
    """Calibration text. `object_key` is set by the upload, `completed_at` by the client's confirmation."""

    __tablename__ = "dataset"
    __table_args__ = (Index(None, "project_id", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    filename: Mapped[str] = mapped_column(String(255))
    format: Mapped[str] = mapped_column(String(16))
    object_key: Mapped[str | None] = mapped_column(String(512), unique=True)
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
    completed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    @property
    def status(self) -> str:
        if self.completed_at is not None:
            return "ready"
        return "awaiting_upload" if self.object_key is None else "uploaded"
