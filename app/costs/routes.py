"""Route that says what a job would cost."""

from __future__ import annotations

from pathlib import Path

from anyio import to_thread
from fastapi import APIRouter

from app.auth.dependency import JobsWrite, guarded
from app.costs import service
from app.costs.probe import NOTHING, Known, Unfit, ask_hub, read_folder
from app.costs.schemas import Validation
from app.http.dependencies import Config, Db
from app.http.errors import Code, Problem
from app.http.routing import BoundedRoute
from app.jobs.schemas import JobCreate
from app.jobs.service import check_model
from app.principal import Principal
from app.settings import Settings
from orthokv.spec.hub_ids import is_hub_id

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=BoundedRoute)


@router.post(
    ":validate",
    operation_id="jobs.validate",
    responses=guarded(Code.FOREIGN_ORIGIN, Code.BODY_TOO_LARGE, Code.UNSUPPORTED_MEDIA_TYPE),
)
async def validate(body: JobCreate, principal: JobsWrite, db: Db, settings: Config) -> Validation:
    """Whether a job would be taken, and what it would take: bytes, memory, minutes. Nothing is stored or charged."""
    known = await _look(body, principal, settings)
    return await db.read(service.validate, body=body, known=known, principal=principal, settings=settings)


async def _look(body: JobCreate, principal: Principal, settings: Settings) -> Known | Unfit:
    if is_hub_id(body.model.id):
        return (
            await ask_hub(settings.hub_url, body.model.id, body.model.revision)
            if settings.hub_url
            else NOTHING
        )
    try:
        return await to_thread.run_sync(_read, body.model.id, principal, settings)
    except Unfit as unfit:
        return unfit
    except OSError:
        return NOTHING


def _read(folder: str, principal: Principal, settings: Settings) -> Known:
    """What is in a folder that the principal may name; of others not even whether they exist."""
    try:
        check_model(folder, "adapter", principal, settings)
    except Problem:
        return NOTHING  # among the refusals of the job
    return read_folder(Path(folder))
