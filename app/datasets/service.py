"""Datasets: created, filled by one raw upload, confirmed by digest, then immutable."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import PurePath

from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect

from app.database import Database, clock
from app.datasets import repository
from app.datasets.models import Dataset as Row
from app.datasets.schemas import SUFFIXES, Dataset, DatasetComplete, DatasetCreate
from app.errors import Code, FieldProblem, Problem, not_found
from app.ids import new_id
from app.pagination import Cursor, Page, page
from app.settings import Settings
from app.storage import Storage, StorageError, Stored


def create(session: Session, *, body: DatasetCreate, settings: Settings) -> Dataset:
    kind = body.format or SUFFIXES.get(PurePath(body.filename).suffix.lower())
    if kind is None:
        field = FieldProblem(
            pointer="/format", code="missing", message="is needed: the name's ending tells none"
        )
        raise Problem(Code.INVALID_REQUEST, "The format of this dataset is not known.", errors=[field])
    row = Row(id=new_id("ds"), filename=body.filename, format=kind)
    session.add(row)
    session.flush()
    return Dataset.of(row, max_bytes=settings.max_dataset_bytes)


def get(session: Session, *, dataset_id: str, settings: Settings) -> Dataset:
    return Dataset.of(_get(session, dataset_id), max_bytes=settings.max_dataset_bytes)


def list_page(session: Session, *, cursor: Cursor, settings: Settings) -> Page[Dataset]:
    rows, has_more = repository.list_datasets(session, cursor)
    data = [Dataset.of(row, max_bytes=settings.max_dataset_bytes) for row in rows]
    return page(data, has_more)


async def upload(
    database: Database,
    storage: Storage,
    *,
    dataset_id: str,
    chunks: AsyncIterator[bytes],
    settings: Settings,
) -> Dataset:
    """Stream the bytes to a new key, then point the row at it. A repeated upload replaces the one before."""
    await database.read(require_open, dataset_id=dataset_id)
    key = f"datasets/{dataset_id}/{new_id('up')}"
    try:
        stored = await storage.put_stream(key, _limited(chunks, settings.max_dataset_bytes))
    except ClientDisconnect as error:
        raise Problem(Code.BAD_REQUEST, "The upload broke off; nothing of it was kept.") from error
    except StorageError as error:
        raise Problem(
            Code.STORAGE_ERROR, "The upload could not be stored; nothing of it was kept."
        ) from error
    return await database.write(
        _point_at, dataset_id=dataset_id, object_key=key, stored=stored, settings=settings
    )


def complete(session: Session, *, dataset_id: str, body: DatasetComplete, settings: Settings) -> Dataset:
    """Confirm the upload. Repeating it is harmless."""
    row = repository.lock_dataset(session, dataset_id)
    if row is None:
        raise not_found("dataset")
    if row.sha256 is None:
        raise Problem(Code.CONFLICT, "Nothing has been uploaded to this dataset yet.")
    if row.sha256 != body.sha256:
        raise Problem(Code.DIGEST_MISMATCH, f"The upload's SHA-256 is {row.sha256}; upload it again.")
    if row.completed_at is None:
        row.completed_at = clock(session)
    return Dataset.of(row, max_bytes=settings.max_dataset_bytes)


def require_open(session: Session, *, dataset_id: str) -> None:
    _refuse_ready(_get(session, dataset_id))


def require_ready(session: Session, dataset_id: str) -> Row:
    """The dataset that a job is to use."""
    row = _get(session, dataset_id)
    if row.completed_at is None:
        raise Problem(Code.DATASET_NOT_READY, "Upload and complete the dataset first.")
    return row


def _point_at(
    session: Session, *, dataset_id: str, object_key: str, stored: Stored, settings: Settings
) -> Dataset:
    row = repository.lock_dataset(session, dataset_id)
    if row is None:
        raise not_found("dataset")
    _refuse_ready(row)
    row.object_key, row.bytes, row.sha256 = object_key, stored.bytes, stored.sha256
    return Dataset.of(row, max_bytes=settings.max_dataset_bytes)


def _get(session: Session, dataset_id: str) -> Row:
    row = repository.get_dataset(session, dataset_id)
    if row is None:
        raise not_found("dataset")
    return row


def _refuse_ready(row: Row) -> None:
    if row.completed_at is not None:
        raise Problem(Code.CONFLICT, "This dataset is complete and does not change; create another one.")


async def _limited(chunks: AsyncIterator[bytes], max_bytes: int) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            raise Problem(Code.BODY_TOO_LARGE, f"A dataset may have at most {max_bytes} bytes.")
        yield chunk
