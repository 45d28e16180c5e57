"""Tables of projects and API keys."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from app.infra.database import Base, Id, Json, UtcDateTime, now
from app.infra.keys import prefix


class Project(Base):
    """A tenant. Everything that clients make belongs to one. A limit of None is the server's default."""

    __tablename__ = "project"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    max_queued_jobs: Mapped[int | None] = mapped_column(Integer)
    max_running_steps: Mapped[int | None] = mapped_column(Integer)
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    max_dataset_bytes: Mapped[int | None] = mapped_column(BigInteger)
    max_model_bytes: Mapped[int | None] = mapped_column(BigInteger)
    max_retention_days: Mapped[int | None] = mapped_column(Integer)
    """How long jobs are kept after their end; None: until somebody deletes them."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())


class ApiKey(Base):
    """A key's digest and what it may do. The key itself is shown once and stored nowhere."""

    __tablename__ = "api_key"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"), index=True)
    name: Mapped[str] = mapped_column(String(255))
    digest: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    @property
    def prefix(self) -> str:
        return prefix(self.id)
