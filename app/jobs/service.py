"""What clients may do with jobs. Functions run in the caller's transaction; routes commit, then hint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import structlog
from sqlalchemy.orm import Session

from app.artifacts.repository import by_ids
from app.audit.service import record as audit
from app.datasets.service import require_ready
from app.http.errors import Code, FieldProblem, Problem, not_found
from app.http.pagination import Cursor, Page, page
from app.infra import tracing
from app.infra.database import after_commit
from app.infra.ids import new_id
from app.jobs import model_folders, repository
from app.jobs.lease import stop_others
from app.jobs.model_folders import FolderRefused
from app.jobs.models import Job as Row
from app.jobs.schemas import Job, JobCreate, Layer, LayerList
from app.jobs.states import record, transition
from app.jobs.unfold import add_first_steps, first_step, reopen
from app.jobs.vocabulary import JobKind, JobStatus
from app.principal import Principal
from app.profiles.repository import share_profile
from app.quotas.service import require_room_for_job
from app.settings import Settings
from orthokv.spec.hub_ids import is_hub_id

log = structlog.get_logger(__name__)

# As the hub spells repositories. Anything else is a path, and paths are the server's own affair.


def create(session: Session, *, body: JobCreate, principal: Principal, settings: Settings) -> Job:
    """Queue a job that compresses a model. The queued row is the whole promise; a hint only speeds it up."""
    for check in _checks(session, body, principal, settings):
        check()
    spec = body.model_dump(mode="json", exclude={"metadata", "priority", "gpu_class", "max_runtime_minutes"})
    return _queue(
        session,
        principal=principal,
        settings=settings,
        kind=JobKind.COMPRESS,
        spec=spec,
        model_id=body.model.id,
        dataset_id=body.dataset.id,
        labels=body.metadata,
        priority=body.priority,
        gpu_class=body.gpu_class,
        max_runtime_minutes=body.max_runtime_minutes,
    )


def refusals(
    session: Session, body: JobCreate, principal: Principal, settings: Settings
) -> Iterator[Problem]:
    """Everything for which `create` would refuse this request now. Writes nothing."""
    checks = _checks(session, body, principal, settings)
    checks.append(partial(require_room_for_job, session, project_id=principal.project_id, settings=settings))
    for check in checks:
        try:
            check()
        except Problem as problem:
            yield problem


def _checks(
    session: Session, body: JobCreate, principal: Principal, settings: Settings
) -> list[Callable[[], object]]:
    checks: list[Callable[[], object]] = [
        partial(check_model, body.model.id, body.form, principal, settings),
        partial(_check_gpu_class, body.gpu_class, settings.gpu_classes),
    ]
    ids = [text.id for text in body.dataset.texts if text.id is not None]
    checks += [partial(require_ready, session, dataset_id, principal) for dataset_id in ids]
    return checks


def create_from_profile(
    session: Session,
    *,
    profile_id: str,
    spec: dict[str, Any],
    labels: dict[str, str],
    origin_id: str,
    principal: Principal,
    settings: Settings,
) -> Job:
    """Queue a job that makes another checkpoint of what the origin job has fitted."""
    origin = repository.find_job(session, origin_id, project_id=principal.project_id)
    if origin is None:
        raise not_found("job")
    check_model(origin.model_id, spec["form"], principal, settings)
    return _queue(
        session,
        principal=principal,
        settings=settings,
        kind=JobKind.CHECKPOINT,
        spec=spec,
        model_id=origin.model_id,
        profile_id=profile_id,
        resolved=origin.resolved,
        labels=labels,
        priority=origin.priority,
        gpu_class=origin.gpu_class,
    )


def get(session: Session, *, job_id: str, principal: Principal) -> Job:
    row = repository.find_job(session, job_id, project_id=principal.project_id)
    if row is None:
        raise not_found("job")
    return _job(session, row)


def get_version(session: Session, *, job_id: str, principal: Principal) -> tuple[int, str]:
    """Version and status, for those who wait."""
    version = repository.find_version(session, job_id, project_id=principal.project_id)
    if version is None:
        raise not_found("job")
    return version


def list_page(
    session: Session,
    *,
    cursor: Cursor,
    principal: Principal,
    status: JobStatus | None,
    model: str | None,
    labels: Mapping[str, str],
) -> Page[Job]:
    rows, has_more = repository.list_jobs(
        session, cursor, project_id=principal.project_id, status=status, model=model, labels=labels
    )
    steps = repository.steps_of(session, [row.id for row in rows])
    data = [Job.of(row, [step for step in steps if step.job_id == row.id]) for row in rows]
    return page(data, has_more)


def cancel(session: Session, *, job_id: str, principal: Principal) -> tuple[Job, bool]:
    """Ask for the end of a job; True when it still has to come. Asking again changes nothing."""
    row = _lock(session, job_id, principal)
    if row.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        raise Problem(Code.CONFLICT, f"The job has already {row.status}.")
    if row.status in (JobStatus.QUEUED, JobStatus.RUNNING):
        audit(session, principal, "job.cancelled", row.id)
        stop_others(session, row, running=False)
        if repository.count_running(session, row.id):
            transition(session, row, JobStatus.CANCELLING, event="job.cancelling")
        else:
            transition(session, row, JobStatus.CANCELLED, event="job.cancelled")
    return _job(session, row), row.status == JobStatus.CANCELLING


def retry(session: Session, *, job_id: str, principal: Principal, settings: Settings) -> Job:
    """Open a failed or cancelled job again. Steps that succeeded and committed layers are kept."""
    row = _lock(session, job_id, principal)
    if row.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
        raise Problem(Code.CONFLICT, "Only a failed or cancelled job can be retried.")
    _require_origins(session, row, principal)
    require_room_for_job(session, project_id=row.project_id, settings=settings)
    audit(session, principal, "job.retried", row.id)
    row.deadline_at = None
    row.attempt += 1
    row.error = None
    row.cancel_requested_at = None
    reopen(session, row)
    transition(session, row, JobStatus.QUEUED, event="job.retried", data={"attempt": row.attempt})
    return _job(session, row)


def layers(session: Session, *, job_id: str, principal: Principal) -> LayerList:
    get_version(session, job_id=job_id, principal=principal)
    rows = repository.committed_layers(session, job_id)
    artifacts = by_ids(session, [row.artifact_id for row in rows])
    data = [
        Layer(
            layer=row.layer,
            artifact_id=row.artifact_id,
            bytes=artifacts[row.artifact_id].bytes,
            sha256=artifacts[row.artifact_id].sha256,
            metrics=row.metrics,
            attempt=row.attempt,
            committed_at=row.committed_at,
        )
        for row in rows
    ]
    return LayerList(data=data)


def _queue(
    session: Session,
    *,
    principal: Principal,
    settings: Settings,
    kind: JobKind,
    spec: dict[str, Any],
    model_id: str,
    labels: dict[str, str],
    priority: int,
    gpu_class: str,
    dataset_id: str | None = None,
    profile_id: str | None = None,
    resolved: dict[str, Any] | None = None,
    max_runtime_minutes: int | None = None,
) -> Job:
    require_room_for_job(session, project_id=principal.project_id, settings=settings)
    row = Row(
        id=new_id("job"),
        project_id=principal.project_id,
        kind=kind,
        status=JobStatus.QUEUED,
        phase=first_step(kind).phase,
        version=0,
        event_seq=0,
        priority=priority,
        gpu_class=gpu_class,
        by_owner=principal.owner,
        max_runtime_minutes=max_runtime_minutes or settings.max_runtime_minutes,
        model_id=model_id,
        dataset_id=dataset_id,
        profile_id=profile_id,
        spec=spec,
        labels=labels,
        resolved=resolved or {},
        traceparent=tracing.traceparent(),
    )
    session.add(row)
    session.flush()
    add_first_steps(session, row)
    record(session, row, "job.created", {"kind": kind})
    after_commit(session, partial(log.info, "job.created", job_id=row.id, gpu_class=gpu_class))
    audit(session, principal, "job.created", row.id)
    session.flush()
    return _job(session, row)


def _job(session: Session, row: Row) -> Job:
    session.flush()
    return Job.of(row, repository.steps_of(session, [row.id]))


def _lock(session: Session, job_id: str, principal: Principal) -> Row:
    row = repository.find_locked_job(session, job_id, project_id=principal.project_id)
    if row is None:
        raise not_found("job")
    return row


def _require_origins(session: Session, row: Row, principal: Principal) -> None:
    """Refuse to run again what can no longer end well, and keep the rest from being deleted meanwhile."""
    profiles = [row.profile_id, (row.result or {}).get("profile_id")]
    for profile_id in {one for one in profiles if one is not None}:
        if share_profile(session, profile_id, project_id=principal.project_id) is None:
            raise Problem(Code.CONFLICT, "The profile that the job needs has been deleted.")
    asked = row.spec.get("dataset")
    if asked is None:
        return
    for part in (asked, *asked.get("also", [])):
        if part["id"] is not None:
            try:
                require_ready(session, part["id"], principal)
            except Problem as problem:
                raise Problem(Code.CONFLICT, "A dataset that the job needs has been deleted.") from problem


def _check_gpu_class(gpu_class: str, known: Sequence[str]) -> None:
    """A job of a class that no worker has would wait for ever."""
    if gpu_class not in known:
        field = FieldProblem(
            pointer="/gpu_class", code="gpu_class", message=f"must be one of {', '.join(known)}"
        )
        raise Problem(Code.INVALID_REQUEST, "The server has no such GPU class.", errors=[field])


def check_model(model_id: str, form: str, principal: Principal, settings: Settings) -> None:
    """Refuse what names no model, and folders that are not the principal's to name."""
    if is_hub_id(model_id):
        return
    if not model_folders.is_folder(model_id):
        field = FieldProblem(
            pointer="/model/id", code="model_id", message="is neither a hub id nor an absolute folder"
        )
        raise Problem(Code.INVALID_REQUEST, "The model id cannot be used.", errors=[field])
    try:
        model_folders.require(model_id, form=form, by_owner=principal.owner, roots=settings.model_roots)
    except FolderRefused as refused:
        raise Problem(Code.LOCAL_MODELS_DISABLED, str(refused)) from refused
