"""Statements over projects and API keys."""

from __future__ import annotations

from functools import cache

from sqlalchemy import ColumnElement, Select, bindparam, or_, select, true, update
from sqlalchemy.orm import Session

from app.auth.models import ApiKey, Project
from app.http.pagination import Cursor, cut
from app.infra.database import now

_USED_EVERY_SECONDS = 60.0


def get_project(session: Session, project_id: str) -> Project | None:
    return session.get(Project, project_id)


def project_named(session: Session, name: str) -> Project | None:
    return session.execute(select(Project).where(Project.name == name)).scalar_one_or_none()


def lock_project(session: Session, project_id: str) -> Project:
    """The project, for one creating transaction at a time.

    The weaker lock of the two that exclude each other: rows that refer to the project can still be added.
    Taken after the locks of jobs and steps, never before.
    """
    statement = select(Project).where(Project.id == project_id).with_for_update(key_share=True)
    return session.execute(statement).scalar_one()


def list_projects(session: Session, cursor: Cursor) -> tuple[list[Project], bool]:
    return cut(session, select(Project), Project.id, cursor, within=true())


def usable_key(session: Session, key_id: str) -> tuple[ApiKey, bool] | None:
    """A key that is neither revoked nor expired, and whether its last use is due to be noted."""
    row = session.execute(_usable_key(), {"id": key_id}).one_or_none()
    return None if row is None else (row[0], bool(row[1]))


@cache
def _usable_key() -> Select[ApiKey, bool]:
    """Made once: every request asks it."""
    stale = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < now(-_USED_EVERY_SECONDS))
    return select(ApiKey, stale).where(ApiKey.id == bindparam("id"), _usable())


def has_usable_key(session: Session) -> bool:
    return session.execute(select(ApiKey.id).where(_usable()).limit(1)).scalar_one_or_none() is not None


def note_use(session: Session, key_id: str) -> None:
    session.execute(update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=now()))


def find_key(session: Session, key_id: str, *, project_id: str | None) -> ApiKey | None:
    """A key of this project, or with None of any project."""
    return session.execute(
        select(ApiKey).where(ApiKey.id == key_id, _of(project_id)).with_for_update()
    ).scalar_one_or_none()


def list_keys(session: Session, cursor: Cursor, *, project_id: str | None) -> tuple[list[ApiKey], bool]:
    return cut(session, select(ApiKey), ApiKey.id, cursor, within=_of(project_id))


def _usable() -> ColumnElement[bool]:
    return ApiKey.revoked_at.is_(None) & or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now())


def _of(project_id: str | None) -> ColumnElement[bool]:
    return true() if project_id is None else ApiKey.project_id == project_id
