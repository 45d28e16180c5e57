"""Table of events."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from app.infra.database import Base, Json, UtcDateTime, now


class Event(Base):
    """One line of a job's history.

    `seq` counts per job and comes from the job's own row in the same transaction. A table-wide sequence would
    not do: Postgres commits out of order, so a reader that asks for greater numbers than the last it saw
    skips rows.
    """

    __tablename__ = "event"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(String(64))
    data: Mapped[dict[str, Any]] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
