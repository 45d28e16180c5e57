"""Routes of jobs."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from app.auth.dependency import JobsRead, JobsWrite, guarded
from app.http.dependencies import Config, Db, Hints, PageCursor
from app.http.errors import Code
from app.http.etags import matches
from app.http.pagination import Page
from app.http.routing import BoundedRoute
from app.idempotency.dependency import CREATION_CODES, Once
from app.infra import failpoints
from app.jobs import service
from app.jobs.dependencies import JobId, Watch
from app.jobs.schemas import Job, JobCreate, LayerList
from app.jobs.vocabulary import JobStatus
from app.jobs.waiting import wait_for_change

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=BoundedRoute)

RETRY_AFTER_SECONDS = 2
_VERSION_TAG = re.compile(r'(?:W/)?"v(\d{1,9})"', re.ASCII)
_METADATA_PARAMETER = re.compile(r"metadata\[([A-Za-z0-9_.-]{1,64})\]")
_METADATA_DOCUMENT = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "description": "Only jobs with these labels: `metadata[team]=x`.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}


@router.post(
    "",
    status_code=201,
    response_model=Job,
    operation_id="jobs.create",
    responses=guarded(
        *CREATION_CODES,
        Code.NOT_FOUND,
        Code.DATASET_NOT_READY,
        Code.LOCAL_MODELS_DISABLED,
        Code.QUOTA_EXCEEDED,
        Code.QUEUE_FULL,
    ),
)
async def create(
    body: JobCreate, principal: JobsWrite, once: Once, settings: Config, hints: Hints
) -> JSONResponse:
    """Queue a job. Once this answers the job is safe; it runs when a worker is free."""
    response = await once.run(
        body,
        lambda session: service.create(session, body=body, principal=principal, settings=settings),
        principal=principal,
        status_code=201,
        collection="/v1/jobs",
    )
    failpoints.hit("job.committed")
    hints.hint(body.gpu_class)
    return response


@router.get(
    "",
    operation_id="jobs.list",
    openapi_extra=_METADATA_DOCUMENT,
    responses=guarded(Code.INVALID_CURSOR),
)
async def list_page(
    request: Request,
    principal: JobsRead,
    db: Db,
    cursor: PageCursor,
    status: JobStatus | None = None,
    model: Annotated[str | None, Query(max_length=1024, description="Only jobs of this model id.")] = None,
) -> Page[Job]:
    labels = {
        match[1]: value
        for name, value in request.query_params.items()
        if (match := _METADATA_PARAMETER.fullmatch(name))
    }
    return await db.read(
        service.list_page, cursor=cursor, principal=principal, status=status, model=model, labels=labels
    )


@router.get(
    "/{job_id}",
    operation_id="jobs.get",
    response_model=Job,
    responses={304: {"description": "Not modified: the ETag still matches."}, **guarded(Code.NOT_FOUND)},
)
async def get(
    job_id: JobId,
    response: Response,
    principal: JobsRead,
    db: Db,
    watch: Watch,
    settings: Config,
    wait: Annotated[
        float, Query(ge=0, le=60, description="Seconds to wait for a change before answering.")
    ] = 0.0,
    if_version: Annotated[
        int | None,
        Query(
            ge=0,
            description="With `wait`: the version already seen; absent: that of If-None-Match.",
        ),
    ] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Job | Response:
    """A job as it is now, or as it is after its next change."""
    if if_version is None and (seen := _VERSION_TAG.fullmatch(if_none_match or "")):
        if_version = int(seen[1])
    job = await wait_for_change(
        db,
        watch,
        job_id=job_id,
        principal=principal,
        wait_seconds=min(wait, settings.max_wait_seconds),
        if_version=if_version,
    )
    etag = f'"v{job.version}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if not job.ended:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    return job


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    response_model=Job,
    operation_id="jobs.cancel",
    responses={
        200: {"description": "The job is cancelled already.", "model": Job},
        **guarded(Code.FOREIGN_ORIGIN, Code.NOT_FOUND, Code.CONFLICT),
    },
)
async def cancel(job_id: JobId, response: Response, principal: JobsWrite, db: Db, hints: Hints) -> Job:
    """Ask for the end of a job. Once this answers the job cannot succeed any more."""
    job, pending = await db.write(service.cancel, job_id=job_id, principal=principal)
    hints.hint(job.gpu_class)
    response.status_code = 202 if pending else 200
    return job


@router.post(
    "/{job_id}/retry",
    status_code=202,
    operation_id="jobs.retry",
    responses=guarded(
        Code.FOREIGN_ORIGIN, Code.NOT_FOUND, Code.CONFLICT, Code.QUOTA_EXCEEDED, Code.QUEUE_FULL
    ),
)
async def retry(job_id: JobId, principal: JobsWrite, db: Db, settings: Config, hints: Hints) -> Job:
    """Run a failed or cancelled job again, from the first step or layer that it lacks."""
    job = await db.write(service.retry, job_id=job_id, principal=principal, settings=settings)
    hints.hint(job.gpu_class)
    return job


@router.get("/{job_id}/layers", operation_id="jobs.layers", responses=guarded(Code.NOT_FOUND))
async def layers(job_id: JobId, principal: JobsRead, db: Db) -> LayerList:
    """Layers that are fitted and safe."""
    return await db.read(service.layers, job_id=job_id, principal=principal)
