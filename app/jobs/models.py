"""Tables of jobs, of their steps, of committed layers and of events."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    String,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from app.infra.database import Base, Id, Json, UtcDateTime, now
from app.jobs.vocabulary import JobStatus, StepStatus
from app.settings import DEFAULT_GPU_CLASS


def _closed(column: str, values: type[JobStatus] | type[StepStatus]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_closed")


class Job(Base):
    """A client's request and what became of it.

    `version` rises with every visible change (the ETag), `event_seq` with every event. Both change only in
    the functions of `states.py`, under this row's lock.
    """

    __tablename__ = "job"
    __table_args__ = (
        _closed("status", JobStatus),
        Index(None, "status", "id"),
        Index(None, "project_id", "id"),
        Index(None, "project_id", "status", "id"),
        Index(None, "project_id", "model_id", "id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    kind: Mapped[str] = mapped_column(String(16))
    status: Mapped[str] = mapped_column(String(16))
    phase: Mapped[str] = mapped_column(String(64))
    version: Mapped[int] = mapped_column(Integer, default=1)
    event_seq: Mapped[int] = mapped_column(Integer, default=0)
    attempt: Mapped[int] = mapped_column(Integer, default=1)
    priority: Mapped[int] = mapped_column(Integer, default=0)
    gpu_class: Mapped[str] = mapped_column(String(32), server_default=DEFAULT_GPU_CLASS)
    model_id: Mapped[str] = mapped_column(String(1024))
    dataset_id: Mapped[str | None] = mapped_column(Id)
    profile_id: Mapped[str | None] = mapped_column(Id, index=True)
    """The profile that a job of kind "checkpoint" starts from.

    Neither id is a foreign key: a job that has ended outlives what it was made from.
    """
    spec: Mapped[dict[str, Any]] = mapped_column(Json)
    labels: Mapped[dict[str, str]] = mapped_column("metadata", Json)
    progress: Mapped[dict[str, Any] | None] = mapped_column(Json)
    resolved: Mapped[dict[str, Any]] = mapped_column(Json)
    result: Mapped[dict[str, Any] | None] = mapped_column(Json)
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    traceparent: Mapped[str | None] = mapped_column(String(55))
    """The span of the request that made the job, by W3C Trace Context; attempts link to it."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    cancel_requested_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    by_owner: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    """Asked for by the owner of a loopback server, who may name any folder that the server can read."""
    max_runtime_minutes: Mapped[int | None] = mapped_column(Integer)
    deadline_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the job's time is up. Set by its first step; a retry sets it anew."""


class Step(Base):
    """One unit of work of a job: what a worker claims, under a lease and a fence.

    Steps of one `stage` are independent of each other; a stage begins when the one before it has succeeded.
    `attempts` numbers the claims, `failures` counts those lost since the last committed layer.
    """

    __tablename__ = "step"
    __table_args__ = (
        _closed("status", StepStatus),
        UniqueConstraint("job_id", "stage", "ordinal"),
        # The claim of a worker of one class walks exactly this order, over ready steps only.
        Index(
            "ix_step_ready",
            "gpu_class",
            "precedence",
            "job_id",
            "stage",
            "ordinal",
            postgresql_where=text("status = 'ready'"),
            sqlite_where=text("status = 'ready'"),
        ),
        Index(
            "ix_step_lease",
            "lease_expires_at",
            postgresql_where=text("status = 'running'"),
            sqlite_where=text("status = 'running'"),
        ),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"))
    name: Mapped[str] = mapped_column(String(32))
    stage: Mapped[int] = mapped_column(Integer)
    ordinal: Mapped[int] = mapped_column(Integer, default=0)
    layers: Mapped[list[int] | None] = mapped_column(Json)
    status: Mapped[str] = mapped_column(String(16))
    precedence: Mapped[int] = mapped_column(Integer)
    """Smaller goes first: the job's priority, negated so that one ascending index serves the claim."""
    gpu_class: Mapped[str] = mapped_column(String(32), server_default=DEFAULT_GPU_CLASS)
    """The job's, so that one index serves the claim."""
    fence: Mapped[int] = mapped_column(Integer, default=0)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    failures: Mapped[int] = mapped_column(Integer, default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(255))
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    not_before: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Layer(Base):
    """A fitted layer that is safe. The unique constraint is the second lock behind the fence."""

    __tablename__ = "layer"
    __table_args__ = (UniqueConstraint("job_id", "layer"),)

    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifact.id"), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"))
    step_id: Mapped[str] = mapped_column(ForeignKey("step.id"), index=True)
    layer: Mapped[int] = mapped_column(Integer)
    fence: Mapped[int] = mapped_column(Integer)
    attempt: Mapped[int] = mapped_column(Integer)
    metrics: Mapped[dict[str, Any]] = mapped_column(Json)
    committed_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())


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
