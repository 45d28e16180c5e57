"""Routes of datasets."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse

from app.auth.dependency import DatasetsRead, DatasetsWrite, guarded
from app.datasets import service
from app.datasets.schemas import Dataset, DatasetComplete, DatasetCreate
from app.datasets.uploads import expected_sha256
from app.http.dependencies import Config, Db, PageCursor, Store
from app.http.errors import Code
from app.http.pagination import Page
from app.http.routing import BoundedRoute
from app.idempotency.dependency import CREATION_CODES, Once
from app.infra.ids import id_pattern

router = APIRouter(prefix="/v1/datasets", tags=["datasets"], route_class=BoundedRoute)
# The one large body; the service counts its bytes as they arrive.
upload_router = APIRouter(prefix="/v1/datasets", tags=["datasets"])
DatasetId = Annotated[str, Path(pattern=id_pattern("ds"))]

_RAW_BODY = {
    "requestBody": {
        "required": False,  # no body is an upload of no bytes
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "",
    status_code=201,
    response_model=Dataset,
    operation_id="datasets.create",
    responses=guarded(*CREATION_CODES),
)
async def create(body: DatasetCreate, principal: DatasetsWrite, once: Once, settings: Config) -> JSONResponse:
    """Announce a dataset; the answer says where to PUT the bytes."""
    return await once.run(
        body,
        lambda session: service.create(session, body=body, principal=principal, settings=settings),
        principal=principal,
        status_code=201,
        collection="/v1/datasets",
    )


@router.get("", operation_id="datasets.list", responses=guarded(Code.INVALID_CURSOR))
async def list_page(principal: DatasetsRead, db: Db, cursor: PageCursor, settings: Config) -> Page[Dataset]:
    return await db.read(service.list_page, cursor=cursor, principal=principal, settings=settings)


@router.get("/{dataset_id}", operation_id="datasets.get", responses=guarded(Code.NOT_FOUND))
async def get(dataset_id: DatasetId, principal: DatasetsRead, db: Db, settings: Config) -> Dataset:
    return await db.read(service.get, dataset_id=dataset_id, principal=principal, settings=settings)


@upload_router.put(
    "/{dataset_id}/content",
    operation_id="datasets.upload",
    openapi_extra=_RAW_BODY,
    responses=guarded(
        Code.BAD_REQUEST,
        Code.FOREIGN_ORIGIN,
        Code.QUOTA_EXCEEDED,
        Code.NOT_FOUND,
        Code.CONFLICT,
        Code.BODY_TOO_LARGE,
        Code.UNSUPPORTED_MEDIA_TYPE,
        Code.DIGEST_MISMATCH,
        Code.STORAGE_ERROR,
    ),
)
async def upload(
    dataset_id: DatasetId,
    request: Request,
    principal: DatasetsWrite,
    db: Db,
    store: Store,
    settings: Config,
) -> Dataset:
    """Send the raw bytes, all of them. A repeated upload replaces the one before; a `Content-Digest` or `Repr-Digest` is
    checked before that."""
    return await service.upload(
        db,
        store,
        dataset_id=dataset_id,
        chunks=request.stream(),
        sha256=expected_sha256(request.headers),
        principal=principal,
        settings=settings,
    )


@router.post(
    "/{dataset_id}/complete",
    operation_id="datasets.complete",
    responses=guarded(
        Code.FOREIGN_ORIGIN,
        Code.NOT_FOUND,
        Code.CONFLICT,
        Code.DIGEST_MISMATCH,
        Code.BODY_TOO_LARGE,
        Code.UNSUPPORTED_MEDIA_TYPE,
    ),
)
async def complete(
    dataset_id: DatasetId, body: DatasetComplete, principal: DatasetsWrite, db: Db, settings: Config
) -> Dataset:
    """Confirm the upload by its SHA-256; the dataset is immutable from here on."""
    return await db.write(
        service.complete, dataset_id=dataset_id, body=body, principal=principal, settings=settings
    )
