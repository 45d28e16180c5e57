"""Recording and reading audit events."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from app.audit import repository
from app.audit.models import AuditEvent as Row
from app.audit.schemas import AuditEvent
from app.http.pagination import Cursor, Page, page
from app.infra.ids import new_id
from app.principal import Principal


def record(
    session: Session,
    principal: Principal,
    action: str,
    subject_id: str,
    *,
    project_id: str | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Note an act in the transaction that performs it. `project_id`: of the subject, if not the actor's."""
    session.add(
        Row(
            id=new_id("aud"),
            project_id=project_id or principal.project_id,
            actor=principal.actor,
            action=action,
            subject_id=subject_id,
            request_id=principal.request_id,
            data=data or {},
        )
    )


def list_page(
    session: Session, *, cursor: Cursor, project_id: str | None, action: str | None
) -> Page[AuditEvent]:
    rows, has_more = repository.list_events(session, cursor, project_id=project_id, action=action)
    return page([AuditEvent.model_validate(row) for row in rows], has_more)
