"""Projects and keys for tests, and every route of an application."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from sqlalchemy import update
from starlette.routing import Route

from app.auth.models import ApiKey
from app.infra.database import SyncDatabase, now
from app.infra.keys import generate_token
from app.principal import Principal, Scope, local_principal
from app.projects import service
from app.projects.schemas import ApiKeyCreate, Limits, ProjectCreate

TOKEN = generate_token()
"""Of the owner of every application in these tests that does not take keys alone."""
ALL = tuple(Scope)
TENANT = tuple(scope for scope in Scope if scope is not Scope.ADMIN)

PROBES = {"/livez", "/readyz"}
PUBLIC = {*PROBES, "/openapi.json", "/docs"}
"""Routes that anybody may call where keys guard the others: they tell nothing that is not in the repository, but whether the
server is well. On a loopback server only the probes are public."""


def new_project(database: SyncDatabase, name: str, **limits: int) -> str:
    body = ProjectCreate(name=name, limits=Limits(**limits))
    return database.write(service.create_project, body=body, principal=local_principal()).id


def principal_of(project_id: str) -> Principal:
    return replace(local_principal(), project_id=project_id, actor="key_test", owner=False)


def new_key(database: SyncDatabase, project_id: str, scopes: tuple[Scope, ...] = TENANT) -> str:
    body = ApiKeyCreate(name="test", scopes=list(scopes), project_id=project_id)
    return database.write(service.create_key, body=body, principal=local_principal(), pepper="").key


def expired_key(database: SyncDatabase, project_id: str) -> str:
    return _changed(database, new_key(database, project_id, ALL), expires_at=now(-0.001))


def revoked_key(database: SyncDatabase, project_id: str) -> str:
    return _changed(database, new_key(database, project_id, ALL), revoked_at=now())


def _changed(database: SyncDatabase, key: str, **values: Any) -> str:
    row = ApiKey.id == f"key_{key.split('_')[1]}"
    database.write(lambda session: session.execute(update(ApiKey).where(row).values(**values)))
    return key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


OWNER = bearer(TOKEN)


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    route: Route | APIRoute

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def operations(api: FastAPI) -> Iterator[Operation]:
    """Every method of every route, also of those that the OpenAPI document leaves out."""
    for context in iter_route_contexts(api.routes):
        route = context.original_route
        assert isinstance(route, Route | APIRoute), f"the walk does not know how to call {route!r}"
        assert context.path is not None
        for method in sorted(context.methods or set()):
            yield Operation(method, context.path, route)
