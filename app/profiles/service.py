"""Reading profiles and asking for checkpoints of them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from app.artifacts.repository import by_ids
from app.artifacts.schemas import Artifact
from app.artifacts.service import describe
from app.audit.service import record
from app.http.errors import not_found
from app.http.pagination import Cursor, Page, page
from app.jobs.repository import jobs_by_ids
from app.jobs.schemas import CompressSpec, Job
from app.jobs.service import create_from_profile
from app.principal import Principal
from app.profiles import repository
from app.profiles.models import Profile as Row
from app.profiles.schemas import CheckpointCreate, Profile, ProfileFiles
from app.settings import Settings


def get(session: Session, *, profile_id: str, principal: Principal) -> Profile:
    return _profiles(session, [_row(session, profile_id, principal)])[0]


def list_page(session: Session, *, cursor: Cursor, principal: Principal) -> Page[Profile]:
    rows, has_more = repository.list_profiles(session, cursor, project_id=principal.project_id)
    data = _profiles(session, rows)
    return page(data, has_more)


def hand_out_plot(session: Session, *, profile_id: str, principal: Principal) -> tuple[Artifact, str]:
    """The plot and the key of its object. The download is noted."""
    artifact_id = _row(session, profile_id, principal).plot_artifact_id
    record(session, principal, "artifact.downloaded", artifact_id)
    row = by_ids(session, [artifact_id])[artifact_id]
    return describe(session, [row])[0], row.object_key


def create_checkpoint(
    session: Session, *, profile_id: str, body: CheckpointCreate, principal: Principal, settings: Settings
) -> Job:
    """Queue the job that makes the checkpoint: it plans, packs and measures, and fits nothing."""
    profile = repository.share_profile(session, profile_id, project_id=principal.project_id)
    if profile is None:
        raise not_found("profile")
    spec = {"profile_id": profile.id, **body.model_dump(mode="json", exclude={"metadata"})}
    return create_from_profile(
        session,
        profile_id=profile.id,
        spec=spec,
        labels=body.metadata,
        origin_id=profile.job_id,
        principal=principal,
        settings=settings,
    )


def _profiles(session: Session, rows: Sequence[Row]) -> list[Profile]:
    jobs = jobs_by_ids(session, [row.job_id for row in rows])
    keys = [
        key for row in rows for key in (row.json_artifact_id, row.tensors_artifact_id, row.plot_artifact_id)
    ]
    files = describe(session, list(by_ids(session, keys).values()))
    artifacts = {file.id: file for file in files}
    return [
        Profile(
            id=row.id,
            job_id=row.job_id,
            spec=CompressSpec.model_validate(jobs[row.job_id].spec),
            resolved=jobs[row.job_id].resolved,
            summary=row.summary,
            files=ProfileFiles(
                json_=artifacts[row.json_artifact_id],
                tensors=artifacts[row.tensors_artifact_id],
                plot=artifacts[row.plot_artifact_id],
            ),
            created_at=row.created_at,
        )
        for row in rows
    ]


def _row(session: Session, profile_id: str, principal: Principal) -> Row:
    row = repository.find_profile(session, profile_id, project_id=principal.project_id)
    if row is None:
        raise not_found("profile")
    return row
