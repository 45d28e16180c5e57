"""Table of what finished steps have taken."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Float, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from app.infra.database import Base, Id, UtcDateTime, now


class RunCost(Base):
    """One finished attempt at one step: how much arithmetic, how many seconds.

    It names no project, no job and no model, and outlives them all.
    """

    __tablename__ = "run_cost"
    __table_args__ = (Index(None, "gpu_class", "method", "step", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    gpu_class: Mapped[str] = mapped_column(String(32))
    method: Mapped[str] = mapped_column(String(32))
    step: Mapped[str] = mapped_column(String(32))
    flop: Mapped[float] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
