"""Statements over profiles."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.http.pagination import Cursor, cut
from app.profiles.models import Profile


def get_profile(session: Session, profile_id: str) -> Profile | None:
    """A profile of any project: for workers."""
    return session.get(Profile, profile_id)


def find_profile(session: Session, profile_id: str, *, project_id: str) -> Profile | None:
    statement = select(Profile).where(Profile.id == profile_id, Profile.project_id == project_id)
    return session.execute(statement).scalar_one_or_none()


def share_profile(session: Session, profile_id: str, *, project_id: str) -> Profile | None:
    """As `find_profile`, and until the transaction ends nobody deletes it."""
    statement = select(Profile).where(Profile.id == profile_id, Profile.project_id == project_id)
    return session.execute(statement.with_for_update(read=True)).scalar_one_or_none()


def list_profiles(session: Session, cursor: Cursor, *, project_id: str) -> tuple[list[Profile], bool]:
    return cut(session, select(Profile), Profile.id, cursor, within=Profile.project_id == project_id)
