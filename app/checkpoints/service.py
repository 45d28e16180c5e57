"""Reading checkpoints."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.artifacts.service import describe
from app.checkpoints import repository
from app.checkpoints.schemas import Checkpoint, Manifest
from app.http.errors import not_found
from app.http.pagination import Cursor, Page, page
from app.principal import Principal


def get(session: Session, *, checkpoint_id: str, principal: Principal) -> Checkpoint:
    row = repository.find_checkpoint(session, checkpoint_id, project_id=principal.project_id)
    if row is None:
        raise not_found("checkpoint")
    return Checkpoint.of(row)


def list_page(
    session: Session, *, cursor: Cursor, profile_id: str | None, principal: Principal
) -> Page[Checkpoint]:
    rows, has_more = repository.list_checkpoints(
        session, cursor, project_id=principal.project_id, profile_id=profile_id
    )
    data = [Checkpoint.of(row) for row in rows]
    return page(data, has_more)


def manifest(session: Session, *, checkpoint_id: str, principal: Principal) -> Manifest:
    get(session, checkpoint_id=checkpoint_id, principal=principal)
    data = describe(session, repository.manifest(session, checkpoint_id))
    return Manifest(data=data, bytes=sum(artifact.bytes for artifact in data))
