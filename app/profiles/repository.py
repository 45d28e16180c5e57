"""Statements over profiles."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.pagination import Cursor, cut
from app.profiles.models import Profile


def get_profile(session: Session, profile_id: str) -> Profile | None:
    return session.get(Profile, profile_id)


def list_profiles(session: Session, cursor: Cursor) -> tuple[list[Profile], bool]:
    return cut(session, select(Profile), Profile.id, cursor)
