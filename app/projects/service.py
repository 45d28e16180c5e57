"""What may be done with projects and API keys."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.audit.service import record
from app.auth import repository
from app.auth.models import ApiKey as KeyRow
from app.auth.models import Project as ProjectRow
from app.http.errors import Code, FieldProblem, Problem, not_found
from app.http.pagination import Cursor, Page, page
from app.infra import keys
from app.infra.database import clock, now
from app.infra.ids import new_id
from app.principal import Principal, Scope
from app.projects.schemas import ApiKey, ApiKeyCreate, ApiKeyCreated, Limits, Project, ProjectCreate


def create_project(session: Session, *, body: ProjectCreate, principal: Principal) -> Project:
    if repository.project_named(session, body.name) is not None:
        raise Problem(Code.CONFLICT, "A project of this name exists already.")
    row = ProjectRow(id=new_id("proj"), name=body.name, **_columns(body.limits))
    session.add(row)
    session.flush()
    limits = body.limits.model_dump()
    record(session, principal, "project.created", row.id, project_id=row.id, data={"limits": limits})
    return Project.of(row)


def get_project(session: Session, *, project_id: str) -> Project:
    return Project.of(_project(session, project_id))


def list_projects(session: Session, *, cursor: Cursor) -> Page[Project]:
    rows, has_more = repository.list_projects(session, cursor)
    return page([Project.of(row) for row in rows], has_more)


def set_limits(session: Session, *, project_id: str, limits: Limits, principal: Principal) -> Project:
    row = _project(session, project_id)
    for name, value in _columns(limits).items():
        setattr(row, name, value)
    data = {"limits": limits.model_dump()}
    record(session, principal, "project.limits_changed", row.id, project_id=row.id, data=data)
    return Project.of(row)


def create_key(session: Session, *, body: ApiKeyCreate, principal: Principal, pepper: str) -> ApiKeyCreated:
    """A key with at most the scopes of the principal, in its project or, for an admin, in any."""
    project_id = body.project_id or principal.project_id
    if project_id != principal.project_id and not principal.may(Scope.ADMIN):
        raise not_found("project")
    _project(session, project_id)
    if not all(principal.may(scope) for scope in body.scopes):
        field = FieldProblem(pointer="/scopes", code="scope", message="has one that the asking key lacks")
        raise Problem(Code.INSUFFICIENT_SCOPE, "A key cannot give more than it has.", errors=[field])
    key_id = new_id("key")
    text = keys.generate(key_id)
    row = KeyRow(
        id=key_id,
        project_id=project_id,
        name=body.name,
        digest=keys.digest(text, pepper),
        scopes=sorted(set(body.scopes)),
        expires_at=None if body.expires_in_days is None else now(body.expires_in_days * 86_400),
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    data = {"name": row.name, "scopes": row.scopes}
    record(session, principal, "api_key.created", row.id, project_id=project_id, data=data)
    return ApiKeyCreated(**ApiKey.model_validate(row).model_dump(), key=text)


def get_key(session: Session, *, key_id: str, principal: Principal) -> ApiKey:
    return ApiKey.model_validate(_key(session, key_id, principal))


def list_keys(session: Session, *, cursor: Cursor, principal: Principal) -> Page[ApiKey]:
    rows, has_more = repository.list_keys(session, cursor, project_id=_reach(principal))
    return page([ApiKey.model_validate(row) for row in rows], has_more)


def revoke_key(session: Session, *, key_id: str, principal: Principal) -> ApiKey:
    """End a key from its next request on. Repeating it changes nothing."""
    row = _key(session, key_id, principal)
    if row.revoked_at is None:
        row.revoked_at = clock(session)
        record(session, principal, "api_key.revoked", row.id, project_id=row.project_id)
    return ApiKey.model_validate(row)


def _reach(principal: Principal) -> str | None:
    """The project whose keys the principal manages; None: every one."""
    return None if principal.may(Scope.ADMIN) else principal.project_id


def _key(session: Session, key_id: str, principal: Principal) -> KeyRow:
    row = repository.find_key(session, key_id, project_id=_reach(principal))
    if row is None:
        raise not_found("API key")
    return row


def _project(session: Session, project_id: str) -> ProjectRow:
    row = repository.get_project(session, project_id)
    if row is None:
        raise not_found("project")
    return row


def _columns(limits: Limits) -> dict[str, int | None]:
    return {f"max_{name}": value for name, value in limits.model_dump().items()}
