"""Tables of webhook endpoints and of deliveries."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Boolean, CheckConstraint, ForeignKey, Index, Integer, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from app.infra.database import Base, Id, Json, UtcDateTime, now


class WebhookEndpoint(Base):
    """Where a project wants to be told. The secrets are sealed (`app/infra/sealing.py`)."""

    __tablename__ = "webhook_endpoint"
    __table_args__ = (Index(None, "project_id", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    url: Mapped[str] = mapped_column(String(2048))
    description: Mapped[str] = mapped_column(String(255))
    event_types: Mapped[list[str] | None] = mapped_column(Json)
    """None: all of them."""
    cloud_events: Mapped[bool] = mapped_column(Boolean)
    enabled: Mapped[bool] = mapped_column(Boolean, default=True)
    disabled_reason: Mapped[str | None] = mapped_column(String(16))
    disabled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    secret: Mapped[str] = mapped_column(Text)
    previous_secret: Mapped[str | None] = mapped_column(Text)
    previous_secret_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())


class WebhookDelivery(Base):
    """One message to one endpoint, written in the transaction of what it tells. Its id is the `webhook-id`.

    `attempts` numbers the claims and is the fence of the one under way; `failures` is the place in the schedule.
    """

    __tablename__ = "webhook_delivery"
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'succeeded', 'failed')", name="status_closed"),
        Index(None, "endpoint_id", "id"),
        Index(None, "finished_at"),
        Index(
            "ix_webhook_delivery_due",
            "next_attempt_at",
            postgresql_where=text("status = 'pending'"),
            sqlite_where=text("status = 'pending'"),
        ),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoint.id"))
    type: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(Id)
    body: Mapped[str] = mapped_column(Text)
    """The exact text that is signed and sent."""
    status: Mapped[str] = mapped_column(String(16), default="pending")
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    failures: Mapped[int] = mapped_column(Integer, default=0)
    next_attempt_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_attempt_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    response_status: Mapped[int | None] = mapped_column(Integer)
    response_body: Mapped[str | None] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(String(255))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
