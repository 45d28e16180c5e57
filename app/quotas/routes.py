"""Route of what a project uses."""

from __future__ import annotations

from fastapi import APIRouter

from app.auth.dependency import JobsRead, guarded
from app.http.dependencies import Config, Db
from app.quotas import service
from app.quotas.schemas import Usage

router = APIRouter(prefix="/v1/usage", tags=["usage"])


@router.get("", operation_id="usage.get", responses=guarded())
async def get(principal: JobsRead, db: Db, settings: Config) -> Usage:
    """What the key's project uses of its limits."""
    return await db.read(service.usage, project_id=principal.project_id, settings=settings)
