"""Statements over idempotency keys."""

from __future__ import annotations

from sqlalchemy import delete
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.idempotency.models import IdempotencyKey
from app.infra.database import now


def reserve(session: Session, *, project_id: str, key: str, fingerprint: str, keep_seconds: float) -> bool:
    """Take a key; False when it is taken. Waits for a transaction that is just taking the same key."""
    session.execute(
        delete(IdempotencyKey).where(
            IdempotencyKey.project_id == project_id,
            IdempotencyKey.key == key,
            IdempotencyKey.expires_at <= now(),
        )
    )
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    statement = (
        insert(IdempotencyKey)
        .values(
            project_id=project_id,
            key=key,
            fingerprint=fingerprint,
            created_at=now(),
            expires_at=now(keep_seconds),
        )
        .on_conflict_do_nothing()
        .returning(IdempotencyKey.key)
    )
    return session.execute(statement).scalar_one_or_none() is not None


def get(session: Session, *, project_id: str, key: str) -> IdempotencyKey:
    return session.get_one(IdempotencyKey, (project_id, key))


def delete_expired(session: Session) -> int:
    statement = delete(IdempotencyKey).where(IdempotencyKey.expires_at <= now()).returning(IdempotencyKey.key)
    return len(session.execute(statement).scalars().all())
