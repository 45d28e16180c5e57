"""Routes of profiles."""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import JSONResponse

from app.artifacts.content import Conditions, content
from app.auth.dependency import CheckpointsWrite, ProfilesRead, guarded
from app.http.accept import prefers
from app.http.dependencies import Config, Db, Hints, PageCursor, Store
from app.http.errors import Code
from app.http.pagination import Page
from app.http.routing import BoundedRoute
from app.idempotency.dependency import CREATION_CODES, Once
from app.infra.ids import id_pattern
from app.jobs.schemas import Job
from app.profiles import service
from app.profiles.schemas import CheckpointCreate, Profile
from app.settings import DEFAULT_GPU_CLASS

router = APIRouter(prefix="/v1/profiles", tags=["profiles"], route_class=BoundedRoute)
ProfileId = Annotated[str, Path(pattern=id_pattern("prof"))]


@router.get("", operation_id="profiles.list", responses=guarded(Code.INVALID_CURSOR))
async def list_page(principal: ProfilesRead, db: Db, cursor: PageCursor) -> Page[Profile]:
    return await db.read(service.list_page, cursor=cursor, principal=principal)


@router.get(
    "/{profile_id}",
    operation_id="profiles.get",
    response_model=Profile,
    responses={
        200: {
            "description": "The profile, or its plot with `Accept: image/png`.",
            "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        },
        206: {"description": "A range of the plot."},
        304: {"description": "The plot has not changed."},
        **guarded(Code.NOT_FOUND, Code.RANGE_NOT_SATISFIABLE),
    },
)
async def get(
    profile_id: ProfileId,
    response: Response,
    principal: ProfilesRead,
    db: Db,
    store: Store,
    conditions: Conditions,
    accept: Annotated[str, Header()] = "application/json",
) -> Profile | Response:
    """A profile as JSON, or as a picture."""
    if not prefers(accept, "image/png"):
        response.headers["Vary"] = "Accept"
        return await db.read(service.get, profile_id=profile_id, principal=principal)
    plot, object_key = await db.write(service.hand_out_plot, profile_id=profile_id, principal=principal)
    picture = await content(store, plot, object_key, conditions, inline=True)
    picture.headers["Vary"] = "Accept"
    return picture


@router.post(
    "/{profile_id}/checkpoints",
    status_code=202,
    response_model=Job,
    operation_id="profiles.create_checkpoint",
    responses=guarded(
        *CREATION_CODES,
        Code.NOT_FOUND,
        Code.LOCAL_MODELS_DISABLED,
        Code.QUOTA_EXCEEDED,
        Code.QUEUE_FULL,
    ),
)
async def create_checkpoint(
    profile_id: ProfileId,
    body: CheckpointCreate,
    principal: CheckpointsWrite,
    once: Once,
    settings: Config,
    hints: Hints,
) -> JSONResponse:
    """Make a checkpoint for another budget. Nothing is fitted again; without a polish (`polish_steps` 0) it takes seconds."""
    response = await once.run(
        body,
        lambda session: service.create_checkpoint(
            session, profile_id=profile_id, body=body, principal=principal, settings=settings
        ),
        principal=principal,
        status_code=202,
        collection="/v1/jobs",
    )
    hints.hint(json.loads(bytes(response.body)).get("gpu_class", DEFAULT_GPU_CLASS))
    return response
