"""Routes of projects and API keys."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse

from app.auth.dependency import Admin, KeysManage, guarded
from app.http.dependencies import Config, Db, PageCursor
from app.http.errors import Code
from app.http.pagination import Page
from app.http.routing import BoundedRoute
from app.idempotency.dependency import CREATION_CODES, Once
from app.infra.ids import id_pattern
from app.projects import service
from app.projects.schemas import ApiKey, ApiKeyCreate, ApiKeyCreated, Project, ProjectCreate, ProjectUpdate

projects = APIRouter(prefix="/v1/projects", tags=["projects"], route_class=BoundedRoute)
keys = APIRouter(prefix="/v1/api_keys", tags=["api_keys"], route_class=BoundedRoute)
ProjectId = Annotated[str, Path(pattern=id_pattern("proj"))]
KeyId = Annotated[str, Path(pattern=id_pattern("key"))]


@projects.post(
    "",
    status_code=201,
    response_model=Project,
    operation_id="projects.create",
    responses=guarded(*CREATION_CODES, Code.CONFLICT),
)
async def create_project(body: ProjectCreate, principal: Admin, once: Once) -> JSONResponse:
    return await once.run(
        body,
        lambda session: service.create_project(session, body=body, principal=principal),
        principal=principal,
        status_code=201,
        collection="/v1/projects",
    )


@projects.get("", operation_id="projects.list", responses=guarded(Code.INVALID_CURSOR))
async def list_projects(_principal: Admin, db: Db, cursor: PageCursor) -> Page[Project]:
    return await db.read(service.list_projects, cursor=cursor)


@projects.get("/{project_id}", operation_id="projects.get", responses=guarded(Code.NOT_FOUND))
async def get_project(project_id: ProjectId, _principal: Admin, db: Db) -> Project:
    return await db.read(service.get_project, project_id=project_id)


@projects.patch(
    "/{project_id}",
    operation_id="projects.update",
    responses=guarded(Code.FOREIGN_ORIGIN, Code.NOT_FOUND, Code.BODY_TOO_LARGE),
)
async def update_project(project_id: ProjectId, body: ProjectUpdate, principal: Admin, db: Db) -> Project:
    """Set the limits of a project."""
    return await db.write(service.set_limits, project_id=project_id, limits=body.limits, principal=principal)


@keys.post(
    "",
    status_code=201,
    operation_id="api_keys.create",
    responses=guarded(Code.FOREIGN_ORIGIN, Code.NOT_FOUND, Code.BODY_TOO_LARGE),
)
async def create_key(body: ApiKeyCreate, principal: KeysManage, db: Db, settings: Config) -> ApiKeyCreated:
    """Make a key. It is in this answer and nowhere else, so this route takes no idempotency key."""
    pepper = settings.key_pepper.get_secret_value()
    return await db.write(service.create_key, body=body, principal=principal, pepper=pepper)


@keys.get("", operation_id="api_keys.list", responses=guarded(Code.INVALID_CURSOR))
async def list_keys(principal: KeysManage, db: Db, cursor: PageCursor) -> Page[ApiKey]:
    """Keys of the project; for an admin, of all."""
    return await db.read(service.list_keys, cursor=cursor, principal=principal)


@keys.get("/{key_id}", operation_id="api_keys.get", responses=guarded(Code.NOT_FOUND))
async def get_key(key_id: KeyId, principal: KeysManage, db: Db) -> ApiKey:
    return await db.read(service.get_key, key_id=key_id, principal=principal)


@keys.delete(
    "/{key_id}", operation_id="api_keys.revoke", responses=guarded(Code.FOREIGN_ORIGIN, Code.NOT_FOUND)
)
async def revoke_key(key_id: KeyId, principal: KeysManage, db: Db) -> ApiKey:
    """Revoke a key. Its row stays, for the record."""
    return await db.write(service.revoke_key, key_id=key_id, principal=principal)
