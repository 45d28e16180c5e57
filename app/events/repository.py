"""Statements over events."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.events.models import Event


def events_after(session: Session, job_id: str, *, after: int, limit: int) -> list[Event]:
    statement = (
        select(Event).where(Event.job_id == job_id, Event.seq > after).order_by(Event.seq).limit(limit)
    )
    return list(session.execute(statement).scalars())
