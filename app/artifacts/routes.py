"""Routes of artifacts."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import Response

from app.artifacts import service
from app.artifacts.content import Conditions, content, elsewhere
from app.artifacts.schemas import Artifact
from app.audit.window import NotedOnce
from app.auth.dependency import ArtifactsRead, guarded
from app.http.dependencies import Config, Db, Store
from app.http.errors import Code, Problem
from app.infra.ids import id_pattern

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"])
ArtifactId = Annotated[str, Path(pattern=id_pattern("art"))]


async def _downloads(request: Request) -> NotedOnce:  # no plain function: FastAPI would run it in a thread
    downloads: NotedOnce = request.app.state.downloads
    return downloads


Downloads = Annotated[NotedOnce, Depends(_downloads)]

_BYTES: dict[str, Any] = {"*/*": {"schema": {"type": "string", "format": "binary"}}}
_CONTENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole file.", "content": _BYTES},
    206: {"description": "The range that was asked for.", "content": _BYTES},
    304: {"description": "Not modified: files never are."},
    307: {"description": "The bytes are at `Location`, for a short time: a signed URL of the object store."},
    **guarded(Code.NOT_FOUND, Code.RANGE_NOT_SATISFIABLE, Code.UNAVAILABLE),
}


@router.get("/{artifact_id}", operation_id="artifacts.get", responses=guarded(Code.NOT_FOUND))
async def get(artifact_id: ArtifactId, principal: ArtifactsRead, db: Db) -> Artifact:
    return await db.read(service.get, artifact_id=artifact_id, principal=principal)


@router.get(
    "/{artifact_id}/content",
    operation_id="artifacts.content",
    response_class=Response,
    responses=_CONTENT_RESPONSES,
)
async def get_content(
    artifact_id: ArtifactId,
    principal: ArtifactsRead,
    db: Db,
    store: Store,
    settings: Config,
    conditions: Conditions,
    downloads: Downloads,
) -> Response:
    """The bytes. `Repr-Digest` and the strong ETag are of the whole file, whatever part is sent."""
    artifact, object_key = await downloads.run(
        (principal.project_id, principal.actor, artifact_id),
        first=partial(db.write, service.hand_out, artifact_id=artifact_id, principal=principal),
        again=partial(db.read, service.locate, artifact_id=artifact_id, principal=principal),
    )
    if settings.signed_download_seconds is not None and conditions.wants_bytes(artifact):
        return await elsewhere(store, object_key, seconds=settings.signed_download_seconds)
    try:
        return await content(store, artifact, object_key, conditions)
    except Problem as problem:
        if problem.code is Code.INTERNAL:  # the bytes are not there: deleted since, or lost
            await db.read(service.get, artifact_id=artifact_id, principal=principal)
        raise


@router.head(
    "/{artifact_id}/content",
    operation_id="artifacts.head_content",
    response_class=Response,
    responses={200: {"description": "The headers of the file."}, **guarded(Code.NOT_FOUND)},
)
async def head_content(
    artifact_id: ArtifactId, principal: ArtifactsRead, db: Db, store: Store, conditions: Conditions
) -> Response:
    """The headers alone: size, digest, type."""
    artifact, object_key = await db.read(service.locate, artifact_id=artifact_id, principal=principal)
    return await content(store, artifact, object_key, conditions)
