"""Probes, outside of /v1."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.http.dependencies import Db, Store
from app.http.errors import Code, Problem, documented
from app.infra.storage import StorageError
from app.schemas import Resource

router = APIRouter(tags=["health"])


class Health(Resource):
    status: Literal["ok"] = "ok"


@router.get("/livez", operation_id="health.live", responses=documented())
async def live() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", operation_id="health.ready", responses=documented(Code.UNAVAILABLE))
async def ready(db: Db, store: Store) -> Health:
    """The process can do its work: database and object store answer."""
    try:
        await db.read(_ask)
    except SQLAlchemyError as error:
        raise Problem(Code.UNAVAILABLE, "The database does not answer, or has no schema.") from error
    try:
        await store.check()
    except StorageError as error:
        raise Problem(Code.UNAVAILABLE, "The object store does not answer.") from error
    return Health()


def _ask(session: Session) -> None:
    session.execute(text("SELECT version_num FROM alembic_version"))
