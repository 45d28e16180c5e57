"""Datasets: created, filled by one raw upload, confirmed by digest, then immutable."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import PurePath

from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect

from app.audit.service import record
from app.datasets import repository
from app.datasets.models import Dataset as Row
from app.datasets.schemas import SUFFIXES, Dataset, DatasetComplete, DatasetCreate
from app.http.errors import Code, FieldProblem, Problem, not_found
from app.http.pagination import Cursor, Page, page
from app.infra import failpoints
from app.infra.database import Database, clock
from app.infra.garbage import Garbage
from app.infra.ids import new_id
from app.infra.storage import Storage, StorageError, Stored, WrongDigest
from app.principal import Principal
from app.quotas.service import largest_dataset, require_room_for_bytes
from app.settings import Settings


def create(session: Session, *, body: DatasetCreate, principal: Principal, settings: Settings) -> Dataset:
    kind = body.format or SUFFIXES.get(PurePath(body.filename).suffix.lower())
    if kind is None:
        field = FieldProblem(
            pointer="/format", code="missing", message="is needed: the name's ending tells none"
        )
        raise Problem(Code.INVALID_REQUEST, "The format of this dataset is not known.", errors=[field])
    row = Row(id=new_id("ds"), project_id=principal.project_id, filename=body.filename, format=kind)
    session.add(row)
    session.flush()
    record(session, principal, "dataset.created", row.id)
    return _dataset(session, row, settings)


def get(session: Session, *, dataset_id: str, principal: Principal, settings: Settings) -> Dataset:
    return _dataset(session, _get(session, dataset_id, principal), settings)


def list_page(session: Session, *, cursor: Cursor, principal: Principal, settings: Settings) -> Page[Dataset]:
    rows, has_more = repository.list_datasets(session, cursor, project_id=principal.project_id)
    max_bytes = largest_dataset(session, project_id=principal.project_id, settings=settings)
    data = [Dataset.of(row, max_bytes=max_bytes) for row in rows]
    return page(data, has_more)


async def upload(
    database: Database,
    storage: Storage,
    *,
    dataset_id: str,
    chunks: AsyncIterator[bytes],
    sha256: str | None,
    principal: Principal,
    settings: Settings,
) -> Dataset:
    """Stream the bytes to a new key, then point the row at it. A repeated upload replaces the one before."""
    max_bytes = await database.read(
        require_open, dataset_id=dataset_id, principal=principal, settings=settings
    )
    key = f"datasets/{dataset_id}/{new_id('up')}"
    try:
        stored = await storage.put_stream(key, _limited(chunks, max_bytes), sha256=sha256)
    except WrongDigest as error:
        raise Problem(
            Code.DIGEST_MISMATCH, "The upload is not what its digest says; nothing of it was kept."
        ) from error
    except ClientDisconnect as error:
        raise Problem(Code.BAD_REQUEST, "The upload broke off; nothing of it was kept.") from error
    except StorageError as error:
        raise Problem(
            Code.STORAGE_ERROR, "The upload could not be stored; nothing of it was kept."
        ) from error
    failpoints.hit("dataset.stored")
    return await database.write(
        _point_at,
        dataset_id=dataset_id,
        object_key=key,
        stored=stored,
        principal=principal,
        settings=settings,
    )


def complete(
    session: Session, *, dataset_id: str, body: DatasetComplete, principal: Principal, settings: Settings
) -> Dataset:
    """Confirm the upload. Repeating it is harmless."""
    row = repository.lock_dataset(session, dataset_id, project_id=principal.project_id)
    if row is None:
        raise not_found("dataset")
    if row.sha256 is None:
        raise Problem(Code.CONFLICT, "Nothing has been uploaded to this dataset yet.")
    if row.sha256 != body.sha256:
        raise Problem(Code.DIGEST_MISMATCH, f"The upload's SHA-256 is {row.sha256}; upload it again.")
    if row.completed_at is None:
        row.completed_at = clock(session)
        record(session, principal, "dataset.completed", row.id)
        session.flush()
        failpoints.hit("dataset.completing")
    return _dataset(session, row, settings)


def require_open(session: Session, *, dataset_id: str, principal: Principal, settings: Settings) -> int:
    """Refuse an upload before its first byte, where that is possible; returns how many bytes it may have."""
    row = _get(session, dataset_id, principal)
    _refuse_ready(row)
    if row.bytes is None:
        require_room_for_bytes(session, project_id=principal.project_id, more=0, settings=settings)
    return largest_dataset(session, project_id=principal.project_id, settings=settings)


def require_ready(session: Session, dataset_id: str, principal: Principal) -> Row:
    """The dataset that a job is to use, and that nobody deletes until that job is committed."""
    row = repository.share_dataset(session, dataset_id, project_id=principal.project_id)
    if row is None:
        raise not_found("dataset")
    if row.completed_at is None:
        raise Problem(Code.DATASET_NOT_READY, "Upload and complete the dataset first.")
    return row


def _point_at(
    session: Session,
    *,
    dataset_id: str,
    object_key: str,
    stored: Stored,
    principal: Principal,
    settings: Settings,
) -> Dataset:
    row = repository.lock_dataset(session, dataset_id, project_id=principal.project_id)
    if row is None:
        raise not_found("dataset")
    _refuse_ready(row)
    more = stored.bytes - (row.bytes or 0)
    if more > 0:
        require_room_for_bytes(session, project_id=row.project_id, more=more, settings=settings)
    if row.object_key is not None:
        session.add(Garbage(object_key=row.object_key, bytes=row.bytes or 0))
    row.object_key, row.bytes, row.sha256 = object_key, stored.bytes, stored.sha256
    data = {"bytes": stored.bytes, "sha256": stored.sha256}
    record(session, principal, "dataset.uploaded", row.id, data=data)
    return _dataset(session, row, settings)


def _get(session: Session, dataset_id: str, principal: Principal) -> Row:
    row = repository.find_dataset(session, dataset_id, project_id=principal.project_id)
    if row is None:
        raise not_found("dataset")
    return row


def _dataset(session: Session, row: Row, settings: Settings) -> Dataset:
    max_bytes = largest_dataset(session, project_id=row.project_id, settings=settings)
    return Dataset.of(row, max_bytes=max_bytes)


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
