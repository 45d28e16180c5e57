"""Routes of checkpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query

from app.auth.dependency import CheckpointsRead, guarded
from app.checkpoints import service
from app.checkpoints.schemas import Checkpoint, Manifest
from app.http.dependencies import Db, PageCursor
from app.http.errors import Code
from app.http.pagination import Page
from app.infra.ids import id_pattern

router = APIRouter(prefix="/v1/checkpoints", tags=["checkpoints"])
CheckpointId = Annotated[str, Path(pattern=id_pattern("ckpt"))]


@router.get("", operation_id="checkpoints.list", responses=guarded(Code.INVALID_CURSOR))
async def list_page(
    principal: CheckpointsRead,
    db: Db,
    cursor: PageCursor,
    profile_id: Annotated[
        str | None, Query(pattern=id_pattern("prof"), description="Only checkpoints of this profile.")
    ] = None,
) -> Page[Checkpoint]:
    return await db.read(service.list_page, cursor=cursor, profile_id=profile_id, principal=principal)


@router.get("/{checkpoint_id}", operation_id="checkpoints.get", responses=guarded(Code.NOT_FOUND))
async def get(checkpoint_id: CheckpointId, principal: CheckpointsRead, db: Db) -> Checkpoint:
    return await db.read(service.get, checkpoint_id=checkpoint_id, principal=principal)


@router.get("/{checkpoint_id}/files", operation_id="checkpoints.files", responses=guarded(Code.NOT_FOUND))
async def files(checkpoint_id: CheckpointId, principal: CheckpointsRead, db: Db) -> Manifest:
    """The files to download, each with its size and digest."""
    return await db.read(service.manifest, checkpoint_id=checkpoint_id, principal=principal)
