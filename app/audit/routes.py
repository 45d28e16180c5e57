"""Route of audit events."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from app.audit import service
from app.audit.schemas import AuditEvent
from app.auth.dependency import Admin, guarded
from app.http.dependencies import Db, PageCursor
from app.http.errors import Code
from app.http.pagination import Page
from app.infra.ids import id_pattern

router = APIRouter(prefix="/v1/audit_events", tags=["audit_events"])


@router.get("", operation_id="audit_events.list", responses=guarded(Code.INVALID_CURSOR))
async def list_page(
    _principal: Admin,
    db: Db,
    cursor: PageCursor,
    project_id: Annotated[str | None, Query(pattern=id_pattern("proj"))] = None,
    action: Annotated[str | None, Query(max_length=64)] = None,
) -> Page[AuditEvent]:
    """Who did what, newest first: keys, projects, jobs, uploads and downloads."""
    return await db.read(service.list_page, cursor=cursor, project_id=project_id, action=action)
