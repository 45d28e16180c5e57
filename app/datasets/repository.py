"""Statements over datasets."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.datasets.models import Dataset
from app.http.pagination import Cursor, cut


def get_dataset(session: Session, dataset_id: str) -> Dataset | None:
    """A dataset of any project: for workers."""
    return session.get(Dataset, dataset_id)


def find_dataset(session: Session, dataset_id: str, *, project_id: str) -> Dataset | None:
    statement = select(Dataset).where(Dataset.id == dataset_id, Dataset.project_id == project_id)
    return session.execute(statement).scalar_one_or_none()


def lock_dataset(session: Session, dataset_id: str, *, project_id: str) -> Dataset | None:
    statement = select(Dataset).where(Dataset.id == dataset_id, Dataset.project_id == project_id)
    return session.execute(statement.with_for_update()).scalar_one_or_none()


def share_dataset(session: Session, dataset_id: str, *, project_id: str) -> Dataset | None:
    """As `find_dataset`, and until the transaction ends nobody deletes it."""
    statement = select(Dataset).where(Dataset.id == dataset_id, Dataset.project_id == project_id)
    return session.execute(statement.with_for_update(read=True)).scalar_one_or_none()


def list_datasets(session: Session, cursor: Cursor, *, project_id: str) -> tuple[list[Dataset], bool]:
    return cut(session, select(Dataset), Dataset.id, cursor, within=Dataset.project_id == project_id)


def known_keys(session: Session, keys: Iterable[str]) -> set[str]:
    """Which of these object keys belong to a dataset."""
    statement = select(Dataset.object_key).where(Dataset.object_key.in_(list(keys)))
    return {key for key in session.execute(statement).scalars() if key is not None}
