"""Statements over audit events: insert and read, nothing else."""

from __future__ import annotations

from sqlalchemy import select, true
from sqlalchemy.orm import Session

from app.audit.models import AuditEvent
from app.http.pagination import Cursor, cut


def list_events(
    session: Session, cursor: Cursor, *, project_id: str | None, action: str | None
) -> tuple[list[AuditEvent], bool]:
    statement = select(AuditEvent)
    if action is not None:
        statement = statement.where(AuditEvent.action == action)
    within = true() if project_id is None else AuditEvent.project_id == project_id
    return cut(session, statement, AuditEvent.id, cursor, within=within)
