"""Refusals of what a project has no room for.

Each check locks the project's row, so that two requests at once cannot both take the last place. Steps in the
work are held back by the claim itself (`app/jobs/lease.py`); files of a job that was accepted are never refused.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.auth.repository import get_project, lock_project
from app.http.errors import Code, Problem
from app.quotas import repository
from app.quotas.schemas import Quota, Usage
from app.settings import Settings

_RETRY_AFTER_SECONDS = 30


def require_room_for_job(session: Session, *, project_id: str, settings: Settings) -> None:
    """Refuse another queued job when enough wait, or when the store is full."""
    project = lock_project(session, project_id)
    limit = _or_default(project.max_queued_jobs, settings.max_queued_jobs)
    if limit is not None and (queued := repository.count_queued_jobs(session, project_id)) >= limit:
        raise Problem(
            Code.QUEUE_FULL,
            f"The project has {queued} jobs queued and may have {limit}; wait until one has started.",
            headers={"Retry-After": str(_RETRY_AFTER_SECONDS)},
        )
    require_room_for_bytes(session, project_id=project_id, more=0, settings=settings)


def require_room_for_bytes(session: Session, *, project_id: str, more: int, settings: Settings) -> None:
    """Refuse bytes beyond the project's share of the store; with `more=0`, refuse when none is left."""
    limit = _or_default(lock_project(session, project_id).max_stored_bytes, settings.max_stored_bytes)
    if limit is None:
        return
    used = repository.stored_bytes(session, project_id)
    if used + max(more, 1) > limit:
        raise Problem(
            Code.QUOTA_EXCEEDED,
            f"The project stores {used} bytes and may store {limit}; there is no room for "
            + (f"{more} more." if more else "more."),
        )


def largest_dataset(session: Session, *, project_id: str, settings: Settings) -> int:
    """Bytes that one dataset of the project may have."""
    project = get_project(session, project_id)
    assert project is not None, "a principal's project exists"
    limit = _or_default(project.max_dataset_bytes, settings.max_dataset_bytes)
    assert limit is not None, "the server's own limit is a number"
    return limit


def largest_model(session: Session, *, project_id: str, settings: Settings) -> int | None:
    """Bytes of weights that a model of the project may have; None: any."""
    project = get_project(session, project_id)
    assert project is not None, "a principal's project exists"
    return _or_default(project.max_model_bytes, settings.max_model_bytes)


def usage(session: Session, *, project_id: str, settings: Settings) -> Usage:
    """What the project uses and may use."""
    project = get_project(session, project_id)
    assert project is not None, "a principal's project exists"
    return Usage(
        project_id=project_id,
        queued_jobs=Quota.of(
            repository.count_queued_jobs(session, project_id),
            _or_default(project.max_queued_jobs, settings.max_queued_jobs),
        ),
        running_jobs=repository.count_running_jobs(session, project_id),
        running_steps=Quota.of(
            repository.count_running_steps(session, project_id),
            _or_default(project.max_running_steps, settings.max_running_steps),
        ),
        stored_bytes=Quota.of(
            repository.stored_bytes(session, project_id),
            _or_default(project.max_stored_bytes, settings.max_stored_bytes),
        ),
        dataset_bytes=largest_dataset(session, project_id=project_id, settings=settings),
        model_bytes=largest_model(session, project_id=project_id, settings=settings),
        retention_days=project.max_retention_days,
    )


def _or_default(own: int | None, default: int | None) -> int | None:
    return default if own is None else own
